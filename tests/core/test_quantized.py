"""Arrays of few bits: what they stand for, how they round, and that they pass for a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import names, partitioning, quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.nn.linear import Linear


def drawn(*shape, seed=0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_small_example_by_hand():
    weight = jnp.array([[7.0, -14.0], [-3.4, 2.0], [1.0, 0.0], [0.6, 0.0]])  # [inputs outputs], groups of two inputs
    held = quantized.quantize(weight, QuantSpec(group=2), (0,))
    np.testing.assert_array_equal(held.values.astype(jnp.int32), [[7, -7], [-3, 1], [7, 0], [4, 0]])
    scales = np.asarray(jnp.array([[1.0, 2.0], [1 / 7, 1.0]], jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(np.asarray(held.scales, np.float32), scales)
    np.testing.assert_allclose(held.dequantize()[:2], [[7.0, -14.0], [-3.0, 2.0]])


@pytest.mark.parametrize("values", ["int4", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(values, symmetric):
    if values == "float8_e4m3fn" and not symmetric:
        with pytest.raises(ValueError, match="has no offset"):
            QuantSpec(values=values, symmetric=False)
        return
    weight = drawn(64, 6) + 0.7
    spec = QuantSpec(values=values, group=16, symmetric=symmetric, scales="float32")
    held = quantized.quantize(weight, spec, (0,))
    error = jnp.abs(held.dequantize() - weight)
    step = quantized.spread(held.scales, weight.shape)
    if values == "float8_e4m3fn":  # three bits after the first: half a step of the number itself, or of the least
        step = jnp.maximum(jnp.abs(weight) / 8, step * 2.0**-9)
    # An offset is rounded too, so that the ends of a range may be half a step outside.
    assert jnp.all(error <= step * (0.5 if symmetric else 1.0) + 1e-6)
    assert held.values.dtype == values and held.shape == weight.shape


def test_offsets_use_the_whole_range_of_one_sided_weights():
    weight = jax.random.uniform(jax.random.key(0), (128, 8), minval=1.0, maxval=2.0)
    errors = [
        float(jnp.mean((quantized.quantize(weight, QuantSpec(symmetric=symmetric), (0,)).dequantize() - weight) ** 2))
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("shape", "inputs", "group", "scales"),
    [
        ((64, 3), (0,), 16, (4, 3)),
        ((64, 3), (0,), None, (1, 3)),
        ((4, 32, 8), (0, 1), 16, (4, 2, 8)),  # within the last input axis
        ((4, 32, 8), (0, 1), 64, (2, 1, 8)),  # several entries of the one before it
        ((4, 32, 8), (0, 1), None, (1, 1, 8)),
        ((2, 64, 2, 8), (1,), 32, (2, 2, 2, 8)),
    ],
)
def test_a_group_is_successive_inputs_of_one_output(shape, inputs, group, scales):
    assert quantized.scales_shape(shape, inputs, group) == scales
    held = quantized.quantize(drawn(*shape), QuantSpec(group=group, scales="float32"), inputs)
    flat = np.moveaxis(np.asarray(drawn(*shape)), inputs, range(len(inputs))).reshape(
        np.prod([shape[i] for i in inputs]), -1
    )
    groups = flat.reshape(-1, group or flat.shape[0], flat.shape[1])
    np.testing.assert_allclose(
        np.sort(np.abs(groups).max(1).ravel()) / 7, np.sort(np.asarray(held.scales).ravel()), rtol=1e-6
    )


@pytest.mark.parametrize("group", [24, 1000, 96])
def test_a_group_that_does_not_fit_is_refused_with_those_that_do(group):
    with pytest.raises(ValueError, match=f"group={group} .*use 16, 32, or None"):
        quantized.quantize(drawn(4, 32, 8), QuantSpec(group=group), (0, 1))


def test_a_block_of_zeros_stays_zero():
    held = quantized.quantize(jnp.zeros((32, 2)), QuantSpec(group=16), (0,))
    assert jnp.all(held.dequantize() == 0) and jnp.all(held.scales == 1)


def test_bits_count_packed_values_and_scales():
    held = quantized.quantize(drawn(256, 4), QuantSpec(group=128), (0,))
    assert held.bits == 256 * 4 * 4 + 2 * 4 * 16


def test_it_takes_the_place_of_a_weight_in_a_module_and_under_jit_and_scan():
    linear = Linear((64,), (3, 8), ("embed", "heads", "head_dim"), rngs=nnx.Rngs(0))
    structure, params = names.split(linear)
    held = quantized.quantize(params["kernel"], QuantSpec(group=32), (0,))
    axes = linear.kernel.axes
    quantised = jax.tree.map(lambda p: p.replace(held), linear, is_leaf=lambda node: isinstance(node, nnx.Param))
    x = drawn(2, 5, 64, seed=1)
    plain = structure.merge({"kernel": held.dequantize()})(x)
    np.testing.assert_array_equal(quantised(x), plain)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(quantised, x), plain, rtol=1e-6, atol=1e-6)
    assert (
        quantised.kernel.axes == axes and quantised.kernel.shape == (64, 3, 8) and quantised.kernel.dtype == "float32"
    )

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), held)
    _, out = jax.lax.scan(lambda _, one: (None, jnp.tensordot(x, one, axes=1)), None, stacked)
    np.testing.assert_allclose(out[1], plain, rtol=1e-6, atol=1e-6)


def test_values_and_scales_lie_together_on_a_mesh():
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 1, 2), partitioning.MESH_AXES)
    held = jax.eval_shape(lambda: quantized.quantize(jnp.zeros((64, 4, 8)), QuantSpec(group=32), (0,)))
    places = partitioning.shardings(nnx.Param(held, axes=("embed", "heads", "head_dim")), partitioning.TRAIN, mesh)
    assert places.get_value().values.spec == places.get_value().scales.spec == jax.P("fsdp", "tensor", None)

    held = jax.eval_shape(lambda: quantized.quantize(jnp.zeros((64, 4, 8)), QuantSpec(group=None), (0,)))
    places = partitioning.shardings(nnx.Param(held, axes=("embed", "heads", "head_dim")), partitioning.TRAIN, mesh)
    assert places.get_value().scales.spec == jax.P(None, "tensor", None)


def test_scales_that_a_mesh_cannot_split_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 1, 4, 1, 1, 1), partitioning.MESH_AXES)
    held = jax.eval_shape(lambda: quantized.quantize(jnp.zeros((64, 4)), QuantSpec(group=32), (0,)))
    with pytest.raises(ValueError, match="embed=2 is not divisible by fsdp=4"):
        partitioning.shardings(nnx.Param(held, axes=("embed", "mlp")), partitioning.TRAIN, mesh)


def test_rows_have_a_scale_of_their_own():
    x = jnp.array([[1.0, -2.0], [100.0, 50.0]])
    values, scales = quantized.quantize_rows(x, "int8")
    np.testing.assert_array_equal(values, [[64, -127], [127, 64]])
    np.testing.assert_allclose(values * scales, x, atol=0.5)


def test_clipping_trades_the_ends_for_the_middle():
    weight = drawn(128, 4)
    plain, clipped = (quantized.quantize(weight, QuantSpec(), (0,), clip=clip) for clip in (1.0, 0.8))
    assert jnp.all(clipped.scales < plain.scales)
    assert jnp.max(jnp.abs(clipped.dequantize())) < jnp.max(jnp.abs(plain.dequantize()))


def test_quantised_array_is_a_pytree_of_its_arrays():
    held = QuantizedArray(jnp.zeros((4, 2), jnp.int8), jnp.ones((1, 2)))
    assert len(jax.tree.leaves(held)) == 2
    assert held.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16
