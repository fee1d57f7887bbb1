"""Attention over several devices against the reference on one: outputs and gradients, to the budget of their dtype."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.kernels.attention import mask, reference
from llama4_jax.kernels.attention.layout import Layout
from llama4_jax.kernels.attention.workloads import Workload
from llama4_jax.testing import budget


def inputs(workload: Workload, layout: Layout, dtype=jnp.float32):
    """Arrays and tokens of a workload, filled up to whole pieces and in their places; the cotangent too."""
    arrays = workload.arrays(dtype=dtype)
    arrays["cotangent"] = jax.random.normal(jax.random.key(9), arrays["query"].shape, dtype)
    filling = -workload.query_length % layout.pieces

    def lay_out(x):
        filled = np.pad(np.asarray(x), [(0, 0), (0, filling)] + [(0, 0)] * (x.ndim - 2))
        return jnp.asarray(np.moveaxis(layout.place(np.moveaxis(filled, 1, -1)), -1, 1))

    return jax.tree.map(lay_out, arrays), jax.tree.map(lay_out, workload.tokens())


def output_and_gradients(attend, arrays, tokens, chunk_size):
    def call(query, key, value):
        return attend(query, key, value, **tokens, chunk_size=chunk_size)

    output, pullback = jax.vjp(call, arrays["query"], arrays["key"], arrays["value"])
    return dict(zip(("output", "query", "key", "value"), (output, *pullback(arrays["cotangent"]))))


@functools.partial(jax.jit, static_argnums=3)
def _wanted(arrays, tokens, chunk_size, chunked: bool):
    """By the reference; one program for any chunk size."""
    return output_and_gradients(reference.attend, arrays, tokens, chunk_size if chunked else None)


def check(attend, arrays, tokens, chunk_size: int | None):
    """Raises AssertionError unless within the budget of exact arithmetic, twice: the reference has errors of its own."""
    got = jax.jit(output_and_gradients, static_argnums=(0, 3))(attend, arrays, tokens, chunk_size)
    wanted = _wanted(arrays, tokens, chunk_size or 0, chunk_size is not None)
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    seen = np.asarray(mask.visible(*(tokens[name] for name in names), chunk_size))
    allowed = budget.attention(arrays["query"].dtype, **arrays, visible=seen)
    for name, value in got.items():
        assert value.dtype == wanted[name].dtype
        excess = np.abs(np.asarray(value, np.float64) - np.asarray(wanted[name], np.float64)) / getattr(allowed, name)
        assert excess.max() <= 2, f"{name} errs by {excess.max():.2f} times its budget"
