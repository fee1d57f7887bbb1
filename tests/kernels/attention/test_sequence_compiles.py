"""Kernels for TPUs and GPUs are made for real chips at the sizes of Scout, ahead of time; nothing runs, nothing is timed."""

import json
import os
import re
import subprocess
import sys

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LENGTH, CHUNK = 16_384, 8192
HEADS, KV_HEADS, HEAD_DIM = 40, 8, 128


def gradient(chunk_size):
    """Of attention to itself, with what the policy of rematerialisation "attention" keeps."""
    import jax
    import jax.numpy as jnp

    from llama4_jax.kernels import attention

    def loss(query, key, value, positions, segments):
        names = jax.checkpoint_policies.save_only_these_names("attended")
        attend = jax.checkpoint(lambda *x: attention.attend_sequence(*x, chunk_size), policy=names)
        return attend(query, key, value, positions, segments).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def compiled(topology_name: str, chunk_size: int | None) -> dict:
    """Facts of the program, rows over one axis of a mesh and heads over another."""
    import jax
    import jax.numpy as jnp

    from llama4_jax.core import partitioning
    from llama4_jax.plan import topology

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


def test_splash_attention_compiles_for_every_generation_on_a_mesh(root):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment.pop("XLA_FLAGS", None)
    environment["PYTHONPATH"] = str(root)
    ran = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    facts = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert len(facts) == 2 * len(TOPOLOGIES)
    for fact in facts:
        # One forward pass: what it gave is kept, not computed again.
        forward, *backward = (
            f"splash_mha_{name}" for name in ("fwd_segmented_residuals", "dkv_segmented", "dq_segmented")
        )
        assert [name.removesuffix("_no_residuals") for name in fact["kernels"]] == sorted([forward, *backward])
        assert fact["loops"] == 0 and fact["collectives"] == []
        scores = HEADS // 2 * LENGTH**2
        assert fact["temporaries"] < scores / 4  # bytes: far below one byte a score


if __name__ == "__main__":
    for name in TOPOLOGIES:
        for size in (CHUNK, None):
            print(json.dumps(compiled(name, size)), flush=True)
