"""The remote ring compiles for real chips at the sizes of Scout, ahead of time; nothing runs here, and nothing is timed."""

import json
import re

import jax.numpy as jnp
import pytest

from llama4_jax.kernels.attention.ring import remote

# (topology, devices along the ring), the rest along heads: 5 query heads and 1 key-value head of Scout a device.
PROGRAMS = [("v5e:2x4", 4), ("v5e:2x4", 8), ("v5p:2x2x2", 4), ("v6e:2x4", 4), ("tpu7x:2x2x1", 4)]
PIECE, HEADS, KV_HEADS, HEAD_DIM = 4096, 5, 1, 128


def compiled(topology_name: str, ring: int) -> dict:
    """Facts of the compiled gradient; in a process that may start libtpu."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llama4_jax.kernels.attention import ring as ring_attention
    from llama4_jax.testing.spread_attention import output_and_gradients

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)
    mesh = Mesh(devices.reshape(ring, -1), ("context", "tensor"))
    spec = PartitionSpec(None, "context", "tensor", None)

    def shape(dtype, spec, *sizes):
        return jax.ShapeDtypeStruct((1, ring * PIECE, *sizes), dtype, sharding=NamedSharding(mesh, spec))

    tensor = mesh.shape["tensor"]
    query = shape(jnp.bfloat16, spec, tensor * HEADS, HEAD_DIM)
    key = shape(jnp.bfloat16, spec, tensor * KV_HEADS, HEAD_DIM)
    arrays = {"query": query, "key": key, "value": key, "cotangent": query}
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    tokens = dict.fromkeys(names, shape(jnp.int32, PartitionSpec(None, "context")))
    attend = ring_attention.over_mesh(mesh, spec, implementation="remote")
    traced = jax.jit(output_and_gradients, static_argnums=(0, 3)).trace(attend, arrays, tokens, None)
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    return {
        "kernels": sorted(re.findall(r"%(ring_attention_\w+)\S* = .* custom-call\(", text)),
        "collectives": re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def test_the_kernels_compile_for_every_generation_and_memory_does_not_grow_with_the_ring(printed):
    facts = printed(__file__)
    assert len(facts) == len(PROGRAMS)
    for fact in facts:
        assert fact["kernels"] == ["ring_attention_backward", "ring_attention_forward"]
        assert fact["collectives"] == []  # what travels, travels inside the kernels
    of_four, of_eight = (fact["temporaries"] for fact in facts[:2])
    assert abs(of_eight - of_four) <= 0.02 * of_four


@pytest.mark.parametrize(
    "dtype, axis, message",
    [
        ("float16", "context", "float16; cast to bfloat16"),
        ("float32", ("data", "context"), "spread the length over one"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_by_name(dtype, axis, message):
    array, tokens = jnp.zeros((1, 8, 1, 8), dtype), jnp.zeros((1, 8), jnp.int32)
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    with pytest.raises(NotImplementedError, match=message):
        remote.attend(array, array, array, **dict.fromkeys(names, tokens), chunk_size=None, axis_name=axis)


if __name__ == "__main__":
    for program in PROGRAMS:
        print(json.dumps(compiled(*program)), flush=True)
