"""Builds the sources beside it for the machine at hand, once, and calls it from compiled programs.

The library is kept in ~/.cache/llama4_jax under a name made of its sources, the version of JAX and the processor, so that
a change of any of them builds it anew. It takes a C++17 compiler some seconds; without one, `api` uses XLA's products.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from llama4_jax.kernels.few_rows.packed import Packed

_FOLDER = pathlib.Path(__file__).parent
SOURCES = tuple(_FOLDER / name for name in ("few_rows.cc", "low_bit.cc"))
HEADERS = tuple(_FOLDER / name for name in ("blocks.h", "vectors.h", "work.h"))
HANDLERS = {jnp.dtype(dtype): f"few_rows_{dtype}" for dtype in ("float32", "bfloat16")}
PLAIN = {
    jnp.dtype(dtype): f"few_rows_plain_{dtype}" for dtype in ("float32", "bfloat16")
}  # matrices that are not transposed
LOW_BIT = {kind: f"few_rows_{kind}" for kind in ("int4", "int8", "float8_e4m3fn")}  # by the dtype of weights
LOW_BIT_ROWS = {(kind, "int8"): f"few_rows_{kind}_int8" for kind in ("int4", "int8")}  # and by that of rows

_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")

_logger = logging.getLogger(__name__)


@functools.cache
def available() -> bool:
    """Whether the library is there, built now if need be; says once why not."""
    try:
        library = ctypes.CDLL(str(build(pathlib.Path.home() / ".cache" / "llama4_jax")))
    except (OSError, RuntimeError) as error:
        _logger.warning("decoding on this CPU takes XLA's slower products: %s", error)
        return False
    for name in (*HANDLERS.values(), *PLAIN.values(), *LOW_BIT.values(), *LOW_BIT_ROWS.values()):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def build(folder: pathlib.Path) -> pathlib.Path:
    """The shared library in `folder`, compiled unless it is there. Raises RuntimeError with the compiler's last words."""
    path = folder / f"few_rows_{_identity()}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"found no C++ compiler among {', '.join(_COMPILERS)}; install one, such as g++")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *_OPTIONS, f"-I{jax.ffi.include_dir()}", *map(str, SOURCES), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    unfinished.replace(path)  # whole or not at all, whoever else builds it
    return path


def grouped(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped`; float32 results."""
    return _grouped(HANDLERS, matrices.shape[1], rows, matrices, group_sizes)


def plain(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same for matrices [e k n]."""
    return _grouped(PLAIN, matrices.shape[2], rows, matrices, group_sizes)


def _grouped(names: dict, outputs: int, rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((rows.shape[0], outputs), jnp.float32)
    call = jax.ffi.ffi_call(names[matrices.dtype], out, vmap_method="sequential")
    return call(rows.astype(jnp.float32), matrices, group_sizes.astype(jnp.int32))


def low_bit(rows: jax.Array, matrices: Packed, group_sizes: jax.Array) -> jax.Array:
    """The same for rows [m k], filled up, and weights of few bits, of which the offsets are left out."""
    call = _call(LOW_BIT[matrices.kind], rows, matrices)
    return call(rows.astype(jnp.float32), matrices.values, matrices.scales, group_sizes.astype(jnp.int32))


def low_bit_rows(values: jax.Array, scales: jax.Array, matrices: Packed, group_sizes: jax.Array) -> jax.Array:
    """The same for rows that stand for `values [m k] * scales [m]`, filled up; values are int8."""
    call = _call(LOW_BIT_ROWS[matrices.kind, values.dtype.name], values, matrices)
    return call(values, scales, matrices.values, matrices.scales, group_sizes.astype(jnp.int32))


def _call(name: str, rows: jax.Array, matrices: Packed):
    out = jax.ShapeDtypeStruct((rows.shape[0], matrices.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")


def _identity() -> str:
    """Of all that decides what the compiler makes."""
    processor = pathlib.Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, jax.__version__, platform.machine(), flags, " ".join(_OPTIONS))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
