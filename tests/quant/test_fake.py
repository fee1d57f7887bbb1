"""Fake quantisation: the bits that packing will give, and gradients that pass through rounding where nothing is clipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config.quant import PRESETS, QuantSpec
from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import int4_matmul
from llama4_jax.quant import fake, recipe
from llama4_jax.testing import tiny

OUTPUT, EXPERTS, NORM = (
    "decoder.tail.0.attention.output.kernel",
    "decoder.period.0.feed_forward.experts.down",
    "norm.scale",
)
DOWN = "decoder.tail.0.feed_forward.down.kernel"


def drawn(seed=0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        OUTPUT: jax.random.normal(keys[0], (4, 8, 24)),
        EXPERTS: jax.random.normal(keys[1], (2, 3, 16, 8)) + 0.3,  # layers, experts
        NORM: jax.random.normal(keys[2], (24,)),
    }


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(group=8),
        QuantSpec(group=None, scales="float32"),
        QuantSpec(values="int8", group=16, symmetric=False),
        QuantSpec(values="float8_e4m3fn", group=None),
        QuantSpec(group=8, activations="int8"),
    ],
    ids=str,
)
def test_what_training_sees_is_what_is_packed_to_the_last_bit(spec):
    params = drawn()
    ranges = fake.learned(params, {OUTPUT: spec})
    params |= {name: 0.7 * array for name, array in ranges.items()}  # one learned, one not
    specs = {OUTPUT: spec, EXPERTS: spec}
    packed, seen = fake.packed(params, specs), jax.jit(lambda params: fake.fake(params, specs))(params)
    assert packed.keys() == seen.keys() == drawn().keys()
    for name in specs:
        assert packed[name].values.dtype == spec.values
        plain = seen[name].dequantize() if spec.activations else seen[name]
        np.testing.assert_array_equal(plain, packed[name].dequantize(), err_msg=name)
        assert len(np.unique(plain)) > 10
    np.testing.assert_array_equal(seen[NORM], drawn()[NORM])


def pulled(weight, share, cotangent):
    """Gradients in one block of four weights, and in its learned range if there is one."""
    specs = {DOWN: QuantSpec(group=4, scales="float32")}
    params = {DOWN: jnp.array(weight)[:, None]} | (
        {} if share is None else {DOWN + fake.RANGE: jnp.full((1, 1), share)}
    )
    _, pull = jax.vjp(lambda params: fake.fake(params, specs)[DOWN], params)
    (gradients,) = pull(jnp.array(cotangent)[:, None])
    return [np.ravel(gradients[name]) for name in params]


def test_a_gradient_passes_straight_through_the_whole_range():
    (weight,) = pulled([7.0, 3.4, -1.2, 0.6], None, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(weight, [1.0, 2.0, 3.0, 4.0], rtol=1e-6)


def test_what_is_clipped_moves_its_range_and_the_rest_its_weights():
    """Half the range of 7: scale 1/2, ratios 14, 6.8, -2.4, 1.2 round to 7 (clipped), 7, -2, 1."""
    weight, share = pulled([7.0, 3.4, -1.2, 0.6], 0.5, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(weight, [0.0, 2.0, 3.0, 4.0], rtol=1e-6)
    # Of a scale, which is the share times 7/7: 7 where clipped, else what rounding added, times the gradients above.
    np.testing.assert_allclose(share, [1 * 7 + 2 * 0.2 + 3 * 0.4 + 4 * -0.2], rtol=1e-5)


def test_a_range_that_training_has_lost_stays_positive():
    specs = {DOWN: QuantSpec(group=4)}
    params = {DOWN: jnp.ones((4, 1)), DOWN + fake.RANGE: jnp.full((1, 1), -3.0)}
    assert fake.packed(params, specs)[DOWN].scales > 0 and jnp.all(fake.fake(params, specs)[DOWN] > 0)


def test_where_inputs_are_rounded_the_product_rounds_them_and_both_have_gradients():
    spec = QuantSpec(group=8, activations="int8")
    params, x = {DOWN: jax.random.normal(jax.random.key(0), (16, 8))}, jax.random.normal(jax.random.key(1), (5, 16))
    target = jax.random.normal(jax.random.key(2), (5, 8))

    def product(params, x):
        held = fake.fake(params, {DOWN: spec})[DOWN]
        assert isinstance(held, QuantizedArray) and held.values.dtype == jnp.float32
        return int4_matmul.matmul(x, held)

    out, pull = jax.vjp(product, params, x)
    np.testing.assert_array_equal(out, int4_matmul.matmul(x, fake.packed(params, {DOWN: spec})[DOWN]))
    to_params, to_x = pull(target)
    rows, matrix = int4_matmul.rounded(x, "int8"), fake.packed(params, {DOWN: spec})[DOWN].dequantize()
    assert jnp.any(rows != x) and jnp.any(matrix != params[DOWN])
    np.testing.assert_allclose(to_params[DOWN], rows.T @ target, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_x, target @ matrix.T, rtol=1e-4, atol=1e-5)


def test_a_spec_for_no_parameter_is_refused():
    with pytest.raises(ValueError, match="specs name decoder.*output.kernel, which is no parameter"):
        fake.fake({NORM: jnp.ones(3)}, {OUTPUT: QuantSpec()})


CASES = [("int4_all", True), ("w4a8", False)]
MORE = [(preset, scan) for preset in PRESETS for scan in (True, False) if (preset, scan) not in CASES]


@pytest.mark.parametrize("preset, scan", CASES + [pytest.param(*case, marks=pytest.mark.thorough) for case in MORE])
def test_a_packed_model_has_the_very_logits_of_training(preset, scan):
    """Several chunks of 4 tokens; scanned over periods of both kinds of layer, or with every layer standing alone."""
    structure, params = names.split(tiny.model(tiny.text_config(4 if scan else 2), scan=scan))
    specs = recipe.specs(params, PRESETS[preset](8))
    tokens = jax.random.randint(jax.random.key(0), (2, 11), 0, 128)
    logits = jax.jit(lambda params: structure.merge(params)(tokens).logits)
    seen = logits(fake.fake(params, specs))
    np.testing.assert_array_equal(seen, logits(fake.packed(params, specs)))
    assert jnp.max(jnp.abs(seen - logits(params))) > 1e-3
