"""Numbers behind docs/numerics.md that a golden of few tokens cannot show; letters are those of its traps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import Attention, FeedForward, LayerKind, MoeConfig, RopeScaling, presets
from llama4_jax.kernels.attention import mask
from llama4_jax.nn import rope
from llama4_jax.nn.attention import Context, DecoderAttention, temperature
from llama4_jax.nn.mlp import swiglu
from llama4_jax.nn.moe import Moe

SCOUT, MAVERICK = presets.scout().text.attention, presets.maverick().text.attention


def test_f_scout_divides_exactly_its_29_slowest_frequencies_by_16():
    base = 500_000.0 ** -(np.arange(64) / 64)
    found = rope.frequencies(SCOUT)
    np.testing.assert_allclose(found[:35], base[:35], rtol=1e-6)  # fp32 powers
    np.testing.assert_allclose(found[35:], base[35:] / 16, rtol=1e-6)
    np.testing.assert_allclose(rope.frequencies(MAVERICK), base, rtol=1e-6)


def test_f_the_first_published_scaling_would_be_seven_radians_off_within_one_chunk():
    wrong = dataclasses.replace(
        MAVERICK,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
    )
    error = 8191 * np.abs(rope.frequencies(wrong) - rope.frequencies(MAVERICK)).max()
    assert error == pytest.approx(7.3, abs=0.05)


def test_h_temperature_is_exact_at_every_step_of_a_long_context():
    positions = np.array([0, 8190, 8191, 16_383, 131_071, 262_143])
    found = temperature(jnp.asarray(positions), SCOUT)
    np.testing.assert_allclose(found, [1.0, 1.0, 1.0693, 1.1099, 1.2833, 1.3497], atol=5e-5)  # four digits are given
    every = np.arange(300_000)
    steps = np.asarray((temperature(jnp.asarray(every), SCOUT) - 1) / SCOUT.attn_scale, np.float64)
    np.testing.assert_array_equal(np.round(np.expm1(steps)), (every + 1) // 8192)


def test_h_positions_in_bfloat16_would_miss_steps_from_8176_on():
    every = jnp.arange(300_000)
    rounded = every.astype(jnp.bfloat16).astype(jnp.int32)
    wrong = np.flatnonzero(temperature(rounded, SCOUT) != temperature(every, SCOUT))
    assert wrong[0] == 8176
    assert 0.04 < wrong.size / every.size < 0.06


def attention(seed: int = 0) -> tuple[DecoderAttention, jax.Array, Context]:
    """A chunked layer with QK norm, inputs [1 6 d], and where they stand."""
    config = presets.tiny().text.attention
    kind = LayerKind(
        attention=Attention.CHUNKED, rope=True, qk_norm=True, temperature=False, feed_forward=FeedForward.DENSE
    )
    layer = DecoderAttention(config, kind, 32, norm_eps=1e-6, rngs=nnx.Rngs(seed))
    positions = jnp.arange(6)[None]
    context = Context(positions, jnp.ones_like(positions), rope.turns(rope.text_angles(config, positions)))
    return layer, jax.random.normal(jax.random.key(1), (1, 6, 32)), context


def with_query(layer: DecoderAttention, kernel: jax.Array) -> DecoderAttention:
    """The layer with another query kernel; the given one stays as it is."""
    graph, leaves = nnx.split(layer)
    copy = nnx.merge(graph, leaves)
    copy.query.kernel = nnx.Param(kernel)
    return copy


def test_e_qk_norm_sees_one_head_at_a_time():
    """Scaling one head's queries changes nothing at all, which a norm across heads would turn into another scale."""
    layer, x, context = attention()
    scaled = with_query(layer, layer.query.kernel[...].at[:, 1].multiply(8.0))
    # 6 tokens, norms of unit size: fp32 rounding, and eps=1e-6 beside squares of about 1/64 and more
    np.testing.assert_allclose(scaled(x, context)[0], layer(x, context)[0], atol=1e-4)


def test_k_the_score_multiplies_the_input_of_a_sigmoid_chosen_expert():
    """Two tokens, two experts, computed by hand."""
    moe = Moe(MoeConfig(num_experts=2, expert_dim=4), 3, rngs=nnx.Rngs(0))
    moe.router.kernel[...] = jnp.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])  # the sign of x[0] chooses
    x = jnp.array([[[0.5, 1.0, -1.0], [-2.0, 0.3, 0.7]]])
    found, _ = moe(x, jnp.ones((1, 2), bool))
    scores = [1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-2.0))]
    for token, (expert, score) in enumerate(zip((0, 1), scores)):
        vector = x[0, token]
        hidden = swiglu(jnp.einsum("d,dgf->gf", score * vector, moe.experts.gate_up[expert]))
        shared = swiglu(jnp.einsum("d,dgf->gf", vector, moe.shared.gate_up.kernel[...])) @ moe.shared.down.kernel[...]
        np.testing.assert_allclose(found[0, token], hidden @ moe.experts.down[expert] + shared, rtol=1e-5, atol=1e-6)
        on_output = score * (
            swiglu(jnp.einsum("d,dgf->gf", vector, moe.experts.gate_up[expert])) @ moe.experts.down[expert]
        )
        assert jnp.abs(hidden @ moe.experts.down[expert] - on_output).max() > 1e-3


def test_a_decoding_past_a_border_sees_its_own_chunk_only():
    """The one query of a decode step at position 18, chunks of 16, every key in the cache."""
    keys = jnp.arange(19)[None]
    seen = mask.visible(jnp.array([[18]]), keys, jnp.ones((1, 1), int), jnp.ones_like(keys), 16)
    assert np.flatnonzero(seen[0, 0]).tolist() == [16, 17, 18]
