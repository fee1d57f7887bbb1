"""Rows times a transposed matrix, for row counts on both sides of where the operands change places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.kernels import transposed
from llama4_jax.testing import budget


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 7, transposed.FEW_ROWS, transposed.FEW_ROWS + 1])
def test_product_equals_that_of_exact_arithmetic(rows, dtype):
    left, right = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(rows, 48), (33, 48)]))
    got = jax.jit(transposed.multiply)(left, right)
    wanted = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
    magnitude = (np.abs(np.asarray(left, np.float64)) @ np.abs(np.asarray(right, np.float64)).T).max()
    assert got.dtype == jnp.float32 and got.shape == (rows, 33)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=budget.matmul_tolerance(jnp.float32, 48, magnitude))
