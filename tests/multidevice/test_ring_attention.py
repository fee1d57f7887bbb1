"""Ring attention over 2, 4 and 8 devices: the reference's output and gradients, in memory and bytes that its pieces need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.core.partitioning import TimeOrder
from llama4_jax.kernels.attention import Layout, ring, workloads
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.testing import spread_attention
from llama4_jax.testing.spread_attention import check, output_and_gradients

pytestmark = pytest.mark.multidevice

# (workload, devices, zig-zag order); lengths of 50, 61, 64, 45 and 33 tokens are filled up to whole pieces.
CASES = [(name, 4, True) for name in ("chunk_divides_no_block", "packed", "five_heads_a_group")]
CASES += [("packed_global", 2, False), ("packed_global", 8, True)]
MORE = [("causal", 4, True), ("left_padded", 4, True), ("several_chunks", 8, False)]
CASES += [pytest.param(*case, marks=pytest.mark.thorough) for case in MORE]


def spread_inputs(name, devices, zigzag, dtype=jnp.float32):
    layout = Layout(devices=devices, order=TimeOrder.ZIGZAG if zigzag else TimeOrder.ROW)
    return workloads.SMALL[name], *spread_attention.inputs(workloads.SMALL[name], layout, dtype)


def over(devices, blocking=None):
    """Ring attention over the first few devices."""
    mesh = Mesh(jax.devices()[:devices], ("context",))
    return ring.over_mesh(mesh, PartitionSpec(None, "context", None, None), blocking=blocking)


@pytest.mark.parametrize("name, devices, zigzag", CASES)
def test_a_ring_equals_the_reference(name, devices, zigzag):
    workload, arrays, tokens = spread_inputs(name, devices, zigzag)
    attend = over(devices, Blocking(queries=8, keys=4, chunk_size=workload.chunk_size))
    check(attend, arrays, tokens, workload.chunk_size)


def test_bfloat16_is_merged_in_float32():
    workload, arrays, tokens = spread_inputs("packed_global", 4, True, jnp.bfloat16)
    check(over(4), arrays, tokens, workload.chunk_size)


def test_a_ring_goes_with_rows_and_heads_spread_over_other_axes():
    workload, arrays, tokens = spread_inputs("packed", 2, True)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "context", "tensor"))
    attend = ring.over_mesh(mesh, PartitionSpec("data", "context", "tensor", None))
    check(attend, arrays, tokens, workload.chunk_size)


def test_a_row_that_sees_nothing_anywhere_gives_zeros():
    workload, arrays, tokens = spread_inputs("causal", 4, False)
    blind = tokens | {"query_segments": tokens["query_segments"].at[1].set(7)}
    found = jax.jit(output_and_gradients, static_argnums=(0, 3))(over(4), arrays, blind, None)
    for value in found.values():
        assert not np.asarray(value[1]).any() and np.isfinite(value[0]).all() and np.asarray(value[0]).any()


def compiled(devices, piece):
    """The gradient of a ring of `devices` with `piece` tokens each."""
    attend = over(devices, Blocking(queries=32, keys=32, chunk_size=None))
    mesh = Mesh(jax.devices()[:devices], ("context",))
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    array = jax.ShapeDtypeStruct((1, devices * piece, 4, 16), jnp.float32, sharding=place(None, "context"))
    token = jax.ShapeDtypeStruct((1, devices * piece), jnp.int32, sharding=place(None, "context"))
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    arrays = dict.fromkeys(("query", "key", "value", "cotangent"), array)
    run = jax.jit(output_and_gradients, static_argnums=(0, 3))
    return run.lower(attend, arrays, dict.fromkeys(names, token), None).compile()


def test_memory_of_a_device_does_not_grow_with_the_length_of_the_whole():
    few, many = (compiled(devices, 128).memory_analysis().temp_size_in_bytes for devices in (2, 8))
    assert many <= 1.02 * few
    assert compiled(8, 256).memory_analysis().temp_size_in_bytes > 1.5 * many  # but with its own piece it does


def test_nothing_travels_but_from_neighbour_to_neighbour():
    text = compiled(4, 128).as_text()
    kinds = set(
        re.findall(r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?=\(|-start\()", text)
    )
    assert kinds == {"collective-permute"}
