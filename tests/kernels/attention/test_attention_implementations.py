"""One suite for every implementation of attention: output and gradients against exact arithmetic, within the budget."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels.attention import (
    api,
    blockwise,
    chunks,
    cudnn,
    mask,
    reference,
    splash,
    triton,
    workloads,
)
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.testing import budget

IMPLEMENTATIONS = ["reference", "few_queries", "blockwise", "blockwise 16x8"]
# The sizes here make one block of blockwise attention by default, so most cases set smaller ones.
CASES = [(i, name, jnp.float32) for name in workloads.SMALL for i in ("reference", "blockwise 16x8")]
CASES += [("blockwise", name, jnp.float32) for name in ("several_chunks", "decode", "one_token")]
CASES += [("few_queries", name, jnp.float32) for name in ("several_chunks", "packed", "decode", "one_token")]
CASES += [("few_queries", "decode", jnp.bfloat16)]
CASES += [(i, "several_chunks", jnp.bfloat16) for i in ("reference", "blockwise 16x8")]

# For a sequence to itself alone. The last two are given rows as they are promised to be.
KERNELS = {
    "splash": partial(splash.attend, interpret=True),
    "triton": partial(triton.attend, block=16, interpret=True),
    "splash by chunks": chunks.apart(partial(splash.attend, interpret=True)),
    "cudnn": partial(cudnn.attend, implementation="xla"),  # all that is not cuDNN's own
    "cudnn by chunks": chunks.apart(partial(cudnn.attend, implementation="xla")),
}
CASES += [("splash", "five_heads_a_group", jnp.float32), ("triton", "packed", jnp.float32)]
CASES += [(i, name, jnp.float32) for name in ("several_blocks", "several_blocks_global") for i in ("splash", "triton")]
CASES += [(i, "several_blocks", jnp.bfloat16) for i in ("splash", "triton")]
CASES += [("splash by chunks", "aligned", jnp.float32)]
CASES += [("cudnn by chunks", name, jnp.float32) for name in ("several_chunks", "chunk_divides_no_block")]
CASES += [("cudnn", name, jnp.float32) for name in ("causal", "five_heads_a_group")]


def run(implementation, query, key, value, tokens, chunk_size):
    """Attention by name; 'blockwise 16x8' sets the block sizes."""
    if implementation in KERNELS:
        return KERNELS[implementation](query, key, value, **tokens, chunk_size=chunk_size)
    name, _, sizes = implementation.partition(" ")
    if not sizes:
        return api.attend(query, key, value, **tokens, chunk_size=chunk_size, implementation=name)
    queries, keys = map(int, sizes.split("x"))
    blocking = Blocking(queries=queries, keys=keys, chunk_size=chunk_size)
    return blockwise.attend(query, key, value, **tokens, chunk_size=chunk_size, blocking=blocking)


def output_and_gradients(implementation, arrays, tokens, cotangent, chunk_size):
    # Interpreted kernels are large programs and run once: most of their time would go into making them fast.
    options = {"xla_backend_optimization_level": 0} if implementation in KERNELS else None
    call = jax.jit(_output_and_gradients, static_argnames=("implementation", "chunk_size"), compiler_options=options)
    return call(implementation, arrays, tokens, cotangent, chunk_size)


def _output_and_gradients(implementation, arrays, tokens, cotangent, chunk_size):
    def call(query, key, value):
        return run(implementation, query, key, value, tokens, chunk_size)

    output, pullback = jax.vjp(call, arrays["query"], arrays["key"], arrays["value"])
    return dict(zip(("output", "query", "key", "value"), (output, *pullback(cotangent))))


@functools.cache
def inputs(name, dtype):
    workload = (workloads.SMALL | workloads.SEQUENCES)[name]
    arrays = workload.arrays(dtype=dtype)
    cotangent = jax.random.normal(jax.random.key(9), arrays["query"].shape, dtype)
    return workload, arrays, {k: jnp.asarray(v) for k, v in workload.tokens().items()}, cotangent


def visible(tokens, chunk_size):
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    return np.asarray(mask.visible(*(tokens[name] for name in names), chunk_size))


def exact_attention(query, key, value, cotangent, seen):
    """Output and gradients in float64, by the formulas, one row and head at a time."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    results = {"output": query * 0, "query": query * 0, "key": key * 0, "value": value * 0}
    for row, head in np.ndindex(query.shape[0], query.shape[2]):
        kv_head = head // (query.shape[2] // key.shape[2])
        q, pull = query[row, :, head], cotangent[row, :, head]  # [t h]
        k, v = key[row, :, kv_head], value[row, :, kv_head]  # [s h]
        scale = q.shape[-1] ** -0.5
        weights = seen[row] * np.exp(q @ k.T * scale)  # [t s]
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        results["output"][row, :, head] = weights @ v
        p = pull @ v.T
        scores_grad = scale * weights * (p - (weights * p).sum(-1, keepdims=True))
        results["query"][row, :, head] = scores_grad @ k
        results["key"][row, :, kv_head] += scores_grad.T @ q
        results["value"][row, :, kv_head] += weights.T @ pull
    return results


@functools.cache
def exact(name, dtype):
    """The exact results for the inputs as rounded to `dtype`, and the budget around them."""
    workload, arrays, tokens, cotangent = inputs(name, dtype)
    arguments = {**arrays, "cotangent": cotangent}
    seen = visible(tokens, workload.chunk_size)
    return exact_attention(**arguments, seen=seen), budget.attention(dtype, **arguments, visible=seen)


@pytest.mark.parametrize("implementation, name, dtype", CASES, ids=[f"{i}-{n}-{np.dtype(d).name}" for i, n, d in CASES])
def test_output_and_gradients_are_within_the_rounding_budget(implementation, name, dtype):
    workload, arrays, tokens, cotangent = inputs(name, dtype)
    wanted, allowed = exact(name, dtype)
    got = output_and_gradients(implementation, arrays, tokens, cotangent, workload.chunk_size)
    for result, value in got.items():
        assert value.dtype == dtype
        excess = np.abs(np.asarray(value, np.float64) - wanted[result]) / getattr(allowed, result)
        assert excess.max() <= 1, f"{result} errs by {excess.max():.2f} times its budget"


def test_budget_is_far_below_the_effect_of_one_wrong_key():
    workload, arrays, tokens, cotangent = inputs("several_chunks", jnp.float32)
    wrong = output_and_gradients("reference", arrays, tokens, cotangent, workload.chunk_size + 1)
    wanted, allowed = exact("several_chunks", jnp.float32)
    for result, value in wrong.items():
        assert (np.abs(np.asarray(value) - wanted[result]) / getattr(allowed, result)).max() > 1000


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_query_that_sees_nothing_gives_zeros_and_zero_gradients(implementation):
    workload, arrays, tokens, cotangent = inputs("several_chunks", jnp.float32)
    blind = tokens | {"query_segments": tokens["query_segments"].at[1].set(7)}
    got = output_and_gradients(implementation, arrays, blind, cotangent, workload.chunk_size)
    for value in got.values():
        assert not np.asarray(value[1]).any()
        assert np.asarray(value[0]).any() and np.isfinite(value[0]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    workload, arrays, tokens, cotangent = inputs("several_chunks", jnp.float32)
    loud = arrays | {"query": 1e4 * arrays["query"]}
    for value in output_and_gradients(implementation, loud, tokens, cotangent, workload.chunk_size).values():
        assert np.isfinite(value).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mapping_over_a_new_axis_equals_calling_one_by_one(implementation):
    workload, arrays, tokens, _ = inputs("packed", jnp.float32)
    rows = [{k: v[i : i + 1] for k, v in (arrays | tokens).items()} for i in range(2)]

    def call(row):
        row = dict(row)
        query, key, value = (row.pop(k) for k in ("query", "key", "value"))
        return run(implementation, query, key, value, row, workload.chunk_size)

    mapped = jax.jit(jax.vmap(call))(jax.tree.map(lambda *x: jnp.stack(x), *rows))
    allowed = exact("packed", jnp.float32)[1].output
    for i, row in enumerate(rows):
        assert (np.abs(np.asarray(mapped[i]) - np.asarray(call(row))) <= 2 * allowed[i : i + 1]).all()


def test_attend_all_equals_attend_when_every_query_sees_every_key():
    _, arrays, tokens, _ = inputs("causal", jnp.float32)
    last = tokens | {"query_positions": jnp.full_like(tokens["query_positions"], 1000)}
    everything = reference.attend(**arrays, **last, chunk_size=None)
    np.testing.assert_array_equal(reference.attend_all(**arrays), everything)
