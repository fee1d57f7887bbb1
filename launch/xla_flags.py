"""Flags of XLA for each chip, each with what it is for; only such as the installed compilers know.

    python -m launch.xla_flags --chip=v5p

TPUs read LIBTPU_INIT_ARGS, GPUs XLA_FLAGS. A compiler refuses to start with a flag that it does not know, so a test starts
both with every line. What a flag gains here has not been measured: there was no such chip. Start without, and compare.
Source: MaxText, `benchmarks/xla_flags_library.py` (Google, Apache-2.0), from which the TPU flags are known; OpenXLA, "XLA
flags guidance", and JAX, "GPU performance tips", for the GPU ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import app, flags


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as it is written, and its reason."""

    text: str
    why: str


_TPU = (
    Flag("--xla_enable_async_all_gather=true", "gathers may be in flight while something else runs"),
    Flag("--xla_tpu_overlap_compute_collective_tc=true", "the tensor core computes while collectives are in flight"),
)
# The compiler that comes with JAX 0.12 refuses programs with these on any other chip, and warns of wrong results there.
_FUSION = (
    Flag(
        "--xla_tpu_enable_async_collective_fusion=true",
        "weights of the next layer are gathered (fsdp) while this one computes",
    ),
    Flag(
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "puts such gathers into the fusions that hide them",
    ),
)
_GPU = (
    Flag("--xla_gpu_enable_latency_hiding_scheduler=true", "collectives start early and are awaited late"),
    Flag(
        "--xla_gpu_enable_triton_gemm=false", "cuBLAS has the better products on Hopper and Blackwell at these shapes"
    ),
    Flag(
        "--xla_gpu_all_gather_combine_threshold_bytes=1073741824", "few large gathers of weights instead of many small"
    ),
    Flag("--xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824", "the same for gradients"),
)
FLAGS = {"v5e": _TPU + _FUSION, "v5p": _TPU, "v6e": _TPU, "tpu7x": _TPU, "h100": _GPU, "b200": _GPU}
GPUS = ("h100", "b200")
CHIP = flags.DEFINE_enum("chip", "v5p", list(FLAGS), "for which to print them")


def line(chip: str) -> str:
    """All flags of a chip, as its variable takes them; raises ValueError for a chip that is not here."""
    if chip not in FLAGS:
        raise ValueError(f"no flags for chip {chip!r}; known are {', '.join(FLAGS)}")
    return " ".join(flag.text for flag in FLAGS[chip])


def variable(chip: str) -> str:
    """The environment variable that they belong in."""
    return "XLA_FLAGS" if chip in GPUS else "LIBTPU_INIT_ARGS"


def main(_: Sequence[str]) -> None:
    for flag in FLAGS[CHIP.value]:
        print(f"# {flag.text}: {flag.why}")
    print(f"export {variable(CHIP.value)}='{line(CHIP.value)}'")


if __name__ == "__main__":
    app.run(main)
