"""Error feedback against a slow version that goes input by input, and against rounding to nearest; clipping by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.quant import gptq, rounding

WHOLE = rounding.WHOLE


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Inputs [r i] that have much in common, as those of a model have: a quarter as many directions, and some noise."""
    directions = np.random.default_rng(0).normal(size=(width // 4, width))
    rng = np.random.default_rng(seed)
    return ((rng.normal(size=(rows, width // 4)) @ directions + rng.normal(size=(rows, width))) / 4).astype(np.float32)


def drawn(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow(weight: np.ndarray, moments: np.ndarray, group: int, offsets: bool) -> np.ndarray:
    """What int4 weights [i o] stand for, as the paper's section 3 derives it: float64, one input after another.

    The inverse of the moments of the inputs that are left is kept as such, and loses a row and a column each time.
    """
    weight, size = weight.astype(np.float64), len(weight)
    inverse = np.linalg.inv(moments.astype(np.float64) + 0.01 * np.mean(np.diag(moments)) * np.eye(size))
    result = np.zeros_like(weight)
    for i in range(size):
        if i % group == 0:
            block = weight[i : i + group]
            low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
            scale = (high - low) / 15 if offsets else np.abs(block).max(0) / 7
            offset = np.round(-8 - low / scale) if offsets else 0
        value = np.clip(np.round(weight[i] / scale + offset), -8 if offsets else -7, 7)
        result[i] = (value - offset) * scale
        error = (weight[i] - result[i]) / inverse[0, 0]
        weight[i:] -= np.outer(inverse[0], error)
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return result


@pytest.mark.parametrize(
    ("group", "block", "symmetric"),
    [(16, 128, True), (16, 8, False), (None, 16, True)],
    ids=["groups", "offsets", "channels"],
)
def test_it_equals_the_slow_version_across_groups_and_blocks(group, block, symmetric, monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, x = drawn(48, 6), correlated(200, 48)
    spec = QuantSpec(group=group, symmetric=symmetric, scales="float32")
    held = gptq.gptq(jnp.asarray(weight), jnp.asarray(x.T @ x), spec, (0,), clips=WHOLE)
    np.testing.assert_allclose(
        held.dequantize(), slow(weight, x.T @ x, group or 48, not symmetric), rtol=2e-3, atol=2e-3
    )
    assert held.values.dtype == "int4" and held.scales.shape == (48 // (group or 48), 6)


@pytest.mark.parametrize("values", ["int4", "float8_e4m3fn"])
def test_its_products_are_nearer_than_those_of_rounding_to_nearest(values):
    weight, x = jnp.asarray(drawn(48, 6)), correlated(512, 48)
    spec, unseen = QuantSpec(values=values, group=16, scales="float32"), correlated(256, 48, seed=1)
    fed_back = gptq.gptq(weight, jnp.asarray(x.T @ x), spec, (0,), clips=WHOLE)

    def error(held) -> float:
        return float(np.linalg.norm(unseen @ np.asarray(held.dequantize() - weight)))

    assert error(fed_back) < 0.8 * error(quantized.quantize(weight, spec, (0,)))


def test_it_is_rounding_to_nearest_where_inputs_have_nothing_in_common():
    weight, importance = jnp.asarray(drawn(2, 32, 3, seed=3)), jnp.asarray(np.abs(drawn(64, seed=4)))
    spec = QuantSpec(group=16)
    found = gptq.gptq(weight, jnp.diag(importance), spec, (0, 1))
    wanted = rounding.nearest(weight, spec, (0, 1), importance=importance.reshape(2, 32, 1))
    np.testing.assert_array_equal(found.values.astype(jnp.int32), wanted.values.astype(jnp.int32))
    np.testing.assert_array_equal(found.scales, wanted.scales)
    assert found.scales.shape == (2, 2, 3)


def test_axes_of_inputs_need_not_come_first():
    weight, x = drawn(3, 32, 2), correlated(100, 32)
    spec = QuantSpec(group=16, activations="int8")
    held = gptq.gptq(jnp.asarray(weight, jnp.bfloat16), jnp.asarray(x.T @ x), spec, (1,))
    first = np.asarray(jnp.asarray(weight, jnp.bfloat16).astype(jnp.float32)).transpose(1, 0, 2).reshape(32, 6)
    alone = gptq.gptq(jnp.asarray(first), jnp.asarray(x.T @ x), spec, (0,))
    np.testing.assert_array_equal(
        np.asarray(held.values.astype(jnp.int32)).transpose(1, 0, 2).reshape(32, 6), alone.values.astype(jnp.int32)
    )
    assert held.dtype == "bfloat16" and held.activations == "int8" and held.scales.shape == (3, 2, 2)


def test_inputs_that_never_occur_and_moments_of_no_text_are_harmless():
    weight, x, spec = jnp.asarray(drawn(48, 6)), correlated(200, 48), QuantSpec(group=16, scales="float32")
    x[:, 5] = 0
    held = gptq.gptq(weight, jnp.asarray(x.T @ x), spec, (0,), clips=WHOLE)
    step = quantized.spread(held.scales, (48, 6))
    assert np.all(np.abs(np.asarray(held.dequantize() - weight))[5] <= 0.51 * np.asarray(step)[5])
    blind = gptq.gptq(weight, jnp.zeros((48, 48)), spec, (0,), clips=WHOLE)
    np.testing.assert_array_equal(
        blind.values.astype(jnp.int32), quantized.quantize(weight, spec, (0,)).values.astype(jnp.int32)
    )


def test_moments_that_do_not_belong_or_are_not_finite_are_refused():
    weight, spec = jnp.asarray(drawn(48, 6)), QuantSpec(group=16, scales="float32")
    with pytest.raises(ValueError, match=r"wanted moments \[48 48\]"):
        gptq.gptq(weight, jnp.eye(16), spec, (0,))
    with pytest.raises(ValueError, match="not finite"):
        gptq.gptq(weight, jnp.full((48, 48), jnp.nan), spec, (0,), clips=WHOLE)


def test_clipping_is_chosen_for_each_scale_by_what_it_costs():
    # The first output has one weight far out, which the rest pay for; the second fills its range evenly.
    weight = np.stack([np.r_[7.0, np.linspace(0.3, 3.4, 63)], np.arange(64) % 15 - 7.0], axis=1).astype(np.float32)
    spec = QuantSpec(group=None, scales="float32")
    clip = rounding.best_clip(jnp.asarray(weight), spec, (0,))

    def cost(clip: float, output: int) -> float:
        scale = np.abs(weight[:, output]).max() * clip / 7
        return float(np.sum((np.clip(np.round(weight[:, output] / scale), -7, 7) * scale - weight[:, output]) ** 2))

    best = [min(rounding.CLIPS, key=lambda clip, output=output: cost(clip, output)) for output in (0, 1)]
    np.testing.assert_allclose(clip, [best], rtol=1e-6)
    assert best[0] < 1 == best[1]
    # An input that is a hundred times as large as the others is not worth clipping.
    important = jnp.where(jnp.arange(64) == 0, 1e4, 1.0)[:, None]
    assert rounding.best_clip(jnp.asarray(weight), spec, (0,), importance=important)[0, 0] == 1
