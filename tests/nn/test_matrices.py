"""Weights as matrices, of which each device has its part of the outputs side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import MoeConfig
from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.nn.linear import Linear, MatrixLinear
from llama4_jax.nn.matrices import Outputs
from llama4_jax.nn.moe import Experts, MatrixExperts


@pytest.mark.parametrize(
    ("shape", "split", "ways"),
    [((2, 12), 1, 4), ((6, 5), 0, 3), ((300,), 0, 2), ((256,), 0, 2), ((2, 12), 1, 1)],
    ids=["gates and ups", "heads", "no whole tiles", "whole tiles", "one device"],
)
def test_columns_are_found_again_whatever_parts_a_device_has(shape, split, ways):
    weight = np.arange(3 * np.prod(shape)).reshape(3, *shape)
    form = Outputs(shape, split, ways)
    columns = np.asarray(form.columns(jnp.asarray(weight), 1, -1))
    assert columns.shape == (3, ways * form.width) and form.width % 128 == 0
    assert np.count_nonzero(columns == -1) == columns.size - weight.size
    np.testing.assert_array_equal(form.rows(jnp.asarray(columns)), weight)
    for part, own in enumerate(np.split(weight, ways, axis=1 + split)):
        held = columns[:, part * form.width : (part + 1) * form.width]
        np.testing.assert_array_equal(form.rows(jnp.asarray(held)), own)


def test_a_part_that_is_no_whole_one_asks_for_the_layout_of_its_mesh():
    with pytest.raises(
        ValueError, match="in parts of 128 outputs, 2 in all, and a device has 64; prepare the model on"
    ):
        Outputs((2, 64), 1, 2).rows(jnp.zeros((1, 64)))


# Rounded rows, and a group of inputs that is part of a head.
SPEC = QuantSpec(group=4, symmetric=False, activations="int8")


def held(module, **inputs):
    """`module` with each kernel named in few bits; its inputs: the axes that a product sums over."""
    kernels = {name: getattr(module, name) for name in inputs}
    few = {id(kernel): quantized.quantize(kernel[...], SPEC, inputs[name]) for name, kernel in kernels.items()}
    is_param = lambda node: isinstance(node, nnx.Param)  # noqa: E731
    return jax.tree.map(lambda node: node.replace(few.get(id(node), node[...])), module, is_leaf=is_param)


@pytest.mark.parametrize(
    ("inputs", "outputs", "axes"),
    [
        ((16,), (2, 24), ("embed", "gate_up", "mlp")),
        ((16,), (3, 8), ("embed", "heads", "head_dim")),
        ((3, 8), (16,), ("heads", "head_dim", "embed")),
    ],
)
@pytest.mark.parametrize("few_bits", [True, False])
def test_a_linear_map_makes_the_same_as_a_matrix(inputs, outputs, axes, few_bits):
    linear = Linear(inputs, outputs, axes, rngs=nnx.Rngs(0), bias=True)
    x = jax.random.normal(jax.random.key(1), (2, 3, *inputs)).astype(jnp.bfloat16)

    @jax.jit
    def both(linear):
        linear = held(linear, kernel=range(len(inputs))) if few_bits else linear
        matrix = MatrixLinear(linear)
        assert matrix.kernel.shape == (np.prod(inputs), 128)
        assert not few_bits or matrix.kernel[...].values.dtype == jnp.int4
        return [[module(x, dtype) for dtype in (None, jnp.float32)] for module in (matrix, linear)]

    found, wanted = both(linear)
    assert [product.dtype for product in found] == [jnp.bfloat16, jnp.float32]
    atol = 0 if few_bits else 1e-6  # floats may be added up in another order
    for product, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(product.astype(np.float32), other.astype(np.float32), rtol=0, atol=atol)


@pytest.mark.parametrize("inputs", [{"gate_up": (1,), "down": (1,)}, {}], ids=["few bits", "floats"])
def test_experts_make_the_same_as_matrices(inputs):
    experts = Experts(MoeConfig(num_experts=3, expert_dim=24, top_k=1), 16, rngs=nnx.Rngs(0), output_gain=1.0)
    rows, sizes = jax.random.normal(jax.random.key(1), (9, 16)), jnp.array([4, 0, 3])

    @jax.jit
    def both(experts):
        experts = held(experts, **inputs)
        matrix = MatrixExperts(experts)
        assert matrix.gate_up.shape == (3, 16, 128) and matrix.down.shape == (3, 24, 128)
        return matrix(rows, sizes), experts(rows, sizes)

    np.testing.assert_allclose(*both(experts), rtol=0, atol=1e-5)  # sums of at most 24 numbers, in another order
