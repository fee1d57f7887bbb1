"""Keys and values of int8 with a scale for each token and head: read as they lie, and as if they were floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.attention import api, blockwise, mask, workloads
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.testing import budget


def stored(array: jax.Array) -> QuantizedArray:
    values, scales = quantized.quantize_rows(array, "int8")
    return QuantizedArray(values, scales, dtype=array.dtype.name)


def attend(implementation, arrays, tokens, chunk_size):
    if implementation == "blockwise 8x16":  # several blocks, the last of them filled up
        blocking = Blocking(queries=8, keys=16, chunk_size=chunk_size)
        return blockwise.attend(**arrays, **tokens, chunk_size=chunk_size, blocking=blocking)
    return api.attend(**arrays, **tokens, chunk_size=chunk_size, implementation=implementation)


def exactly(query, key, value, visible):
    """[b t n h] in float64, by the formula."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(np.where(visible[:, None], scores, -np.inf))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [
        ("reference", "chunked_prefill", jnp.float32),
        ("blockwise 8x16", "chunked_prefill", jnp.float32),
        ("few_queries", "decode", jnp.float32),
        ("few_queries", "decode", jnp.bfloat16),
    ],
)
def test_attention_is_that_over_what_they_stand_for(implementation, name, dtype):
    workload = workloads.SMALL[name]
    tokens, arrays = workload.tokens(), workload.arrays(dtype=dtype)
    arrays["value"] = arrays["value"] * (1 + jnp.arange(workload.key_length) % 7)[:, None, None].astype(
        dtype
    )  # scales differ
    low = arrays | {each: stored(arrays[each]) for each in ("key", "value")}
    exact = {each: np.asarray(low[each].astype("float32").dequantize(), np.float64) for each in ("key", "value")}
    visible = np.asarray(mask.visible(*tokens.values(), workload.chunk_size))
    allowed = budget.attention(dtype, arrays["query"], **exact, cotangent=arrays["query"], visible=visible).output
    wanted = exactly(np.asarray(arrays["query"], np.float64), *exact.values(), visible)
    found = attend(implementation, low, tokens, workload.chunk_size)
    assert found.dtype == dtype
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= allowed).all()


def test_the_implementation_is_chosen_by_size_as_for_floats():
    workload = workloads.SMALL["decode"]
    arrays = workload.arrays()
    low = arrays | {each: stored(arrays[each]) for each in ("key", "value")}
    chosen, named = (attend(name, low, workload.tokens(), workload.chunk_size) for name in (None, "few_queries"))
    np.testing.assert_array_equal(chosen, named)


def test_other_forms_are_refused():
    workload = workloads.SMALL["decode"]
    arrays, rest = workload.arrays(), workload.tokens() | {"chunk_size": workload.chunk_size}
    low = stored(arrays["key"])
    grouped = dataclasses.replace(low, scales=jnp.repeat(low.scales, 2, axis=3))
    with pytest.raises(NotImplementedError, match="only a scale for each token and head is read"):
        api.attend(arrays["query"], grouped, grouped, **rest)
    with pytest.raises(ValueError, match="make them alike"):
        api.attend(arrays["query"], low, arrays["value"], **rest)
    with pytest.raises(NotImplementedError, match="attention over key of dtype int8"):
        api.attend(arrays["query"], low.values, low.values, **rest)
