"""Memory by the compiler's own count: blockwise attention grows with length, the reference with its square."""

import jax
import jax.numpy as jnp
import pytest

from llama4_jax.kernels.attention import api, workloads

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def temporary_bytes(implementation, length, chunk_size, gradient):
    """Scratch memory of one compiled call at batch 1; nothing is run."""
    workload = workloads.Workload(
        batch=1,
        query_length=length,
        key_length=length,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        chunk_size=chunk_size,
    )

    def call(arrays, tokens):
        return api.attend(**arrays, **tokens, chunk_size=chunk_size, implementation=implementation)

    def loss(arrays, tokens):
        return call(arrays, tokens).sum()

    shapes = jax.eval_shape(workload.arrays), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, workload.tokens()))
    compiled = jax.jit(jax.grad(loss) if gradient else call).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("chunk_size", [None, 8192], ids=["global", "chunked"])
def test_blockwise_memory_grows_with_length(gradient, chunk_size):
    short, long = (temporary_bytes("blockwise", t, chunk_size, gradient) for t in (8192, 32_768))
    assert long <= 4 * short
    # A handful of arrays the size of the query: copies, output, its cotangent, float32 sums. One [t t] would be 256.
    query = 4 * 32_768 * HEADS * HEAD_DIM
    assert long <= 6 * query
    assert long <= 0.05 * 4 * 32_768**2


def test_reference_memory_grows_with_the_square_so_the_measure_can_fail():
    assert temporary_bytes("reference", 8192, None, gradient=False) >= HEADS * 4 * 8192**2
