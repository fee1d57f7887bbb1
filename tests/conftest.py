"""Settings that every test process needs before JAX starts."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time: keep what was compiled, for every process that a test starts too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


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
