"""Kernels for TPUs and GPUs are made for real chips with the heads of Scout, ahead of time; nothing runs, nothing is timed."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from llama4_jax.core import partitioning
from llama4_jax.kernels import attention
from llama4_jax.plan import topology

LENGTH, CHUNK = 8192, 2048
PROGRAMS = [("v5e:2x2", None), ("v5p:2x2x1", CHUNK), ("v6e:2x2", None), ("tpu7x:2x2x1", CHUNK)]
HEADS, KV_HEADS, HEAD_DIM = 40, 8, 128


def gradient(chunk_size: int | None):
    """Of the sum of what attention of a sequence to itself gives."""

    def loss(*arrays):
        return attention.attend_sequence(*arrays, chunk_size).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def compiled(topology_name: str, chunk_size: int | None) -> dict:
    """Facts of the program, rows over one axis of a mesh and heads over another."""
    mesh = partitioning.make_mesh({"fsdp": -1, "tensor": 2}, topology.devices(topology_name))

    def shape(dtype, axes, *sizes):
        sizes = (mesh.shape["fsdp"], LENGTH, *sizes)
        sharding = partitioning.sharding(axes, sizes, partitioning.TRAIN, mesh)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    query = shape(jnp.bfloat16, ("batch", "time", "heads", "head_dim"), HEADS, HEAD_DIM)
    key = shape(jnp.bfloat16, ("batch", "time", "kv_heads", "head_dim"), KV_HEADS, HEAD_DIM)
    token = shape(jnp.int32, ("batch", "time"))
    with partitioning.use(mesh):
        program = jax.jit(gradient(chunk_size)).lower(query, key, key, token, token).compile()
    text = program.as_text()
    return {
        "kernels": sorted(re.findall(r"%(splash_\w+?)(?:\.\d+)? = ", text)),
        "loops": len(re.findall(r" while\(", text)),
        "collectives": re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def test_splash_attention_compiles_for_every_generation_on_a_mesh(printed):
    facts = printed(__file__)
    assert len(facts) == len(PROGRAMS)
    for fact in facts:
        forward, *backward = (
            f"splash_mha_{name}" for name in ("fwd_segmented_residuals", "dkv_segmented", "dq_segmented")
        )
        assert [name.removesuffix("_no_residuals") for name in fact["kernels"]] == sorted([forward, *backward])
        assert fact["loops"] == 0 and fact["collectives"] == []
        scores = HEADS // 2 * LENGTH**2
        assert fact["temporaries"] < scores / 4  # bytes: far below one byte a score


@pytest.mark.parametrize("gpu", ["NVIDIA H100", "NVIDIA B200"])
def test_on_a_gpu_a_long_sequence_is_given_to_three_triton_kernels(gpu):
    """As far as they are made without a compiler for GPUs; experiments/gpu_attention.py has one."""
    device = AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    query, key = (jax.ShapeDtypeStruct((1, LENGTH, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    token = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        traced = jax.jit(gradient(CHUNK)).trace(query, key, key, token, token)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @__gpu$xla.gpu.triton") == 3


if __name__ == "__main__":
    for each in PROGRAMS:
        print(json.dumps(compiled(*each)), flush=True)
