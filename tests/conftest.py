"""Settings that every test process needs before JAX starts."""

import os
import pathlib
import sys
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time: keep what was compiled, for every process that a test starts too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Nearly all programs here are small and run once: LLVM's optimisations would take longer than they save, and so would the
# newer of XLA's two ways to write a loop (half of the suite's time on JAX 0.10; JAX 0.12 has no other, and no such flag).
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if metadata.version("jaxlib").startswith("0.10."):
    QUICK += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The project's top folder."""
    return ROOT


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Each compiled program takes dozens of the 65,530 pieces of memory that Linux allows a process: all tests' do not fit."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def pytest_collection_modifyitems(items):
    """The eight devices' process comes first, so that workers do not end by waiting for one of them."""
    items.sort(key=lambda item: item.path.stem != "test_on_eight_devices")
