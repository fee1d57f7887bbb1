"""The small models and loaders of tests/train serve here too; threads for the interpreter of TPU kernels."""

import os
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.with_name("train")))

if "device_count" in os.environ.get("XLA_FLAGS", ""):
    # Interpreted devices wait for each other: with fewer threads than devices JAX 0.10 would wait for ever.
    os.environ.setdefault("NPROC", "16")
    os.environ.setdefault("PJRT_NPROC", "16")
