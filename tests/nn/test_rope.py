"""Rotary positions against complex numbers, and the frequency rule against its three cases."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import RopeScaling, VisionConfig, presets
from llama4_jax.nn import rope

CONFIG = presets.tiny().text.attention  # head_dim 8
EPS = float(jnp.finfo(jnp.float32).eps)


def as_complex(x) -> np.ndarray:
    """Dimensions (2j, 2j+1) of the last axis as one number."""
    x = np.asarray(x, np.float64)
    return x[..., 0::2] + 1j * x[..., 1::2]


def test_rotation_multiplies_interleaved_pairs_by_unit_complex_numbers():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
    angles = jax.random.uniform(jax.random.key(1), (2, 3, 4), minval=-3, maxval=3)
    wanted = as_complex(x) * np.exp(1j * np.asarray(angles, np.float64))[:, :, None]  # one angle for all heads
    np.testing.assert_allclose(as_complex(rope.rotate(x, rope.turns(angles))), wanted, atol=16 * EPS)


def test_a_quarter_turn_by_hand():
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    angles = jnp.array([math.pi / 2, math.pi]).reshape(1, 1, 2)
    np.testing.assert_allclose(rope.rotate(x, rope.turns(angles)).ravel(), [0.0, 1.0, 0.0, -1.0], atol=4 * EPS)


def test_scores_depend_on_the_distance_of_two_positions_alone():
    query, key = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 8))

    def score(at: int, distance: int):
        turned = [
            rope.rotate(x, rope.turns(rope.text_angles(CONFIG, jnp.array([[p]]))))
            for x, p in ((query, at + distance), (key, at))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    # An angle near 100 is off by half an ulp of it, and scores here stay below 20.
    assert score(0, 5) == pytest.approx(score(100, 5), abs=20 * 100 * EPS)
    assert abs(score(0, 5) - score(0, 6)) > 1e-2


def test_bfloat16_is_rotated_in_fp32_and_rounded_once():
    x = jax.random.normal(jax.random.key(3), (1, 4, 2, 8)).astype(jnp.bfloat16)
    turns = rope.turns(rope.text_angles(CONFIG, jnp.arange(4)[None]))
    found = rope.rotate(x, turns)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rope.rotate(x.astype(jnp.float32), turns).astype(jnp.bfloat16))


def test_angles_are_exact_to_the_end_of_ten_million_tokens():
    """The fastest pair turns by one radian a token, so its angle is the position itself."""
    positions = jnp.array([[0, 257, 8191, 262_143, 10_485_759]])
    np.testing.assert_array_equal(rope.text_angles(CONFIG, positions)[0, :, 0], positions[0])


def by_the_rule(theta: float, head_dim: int, scaling: RopeScaling) -> list[float]:
    """The published rule as it is written: three cases by wavelength."""
    frequencies = []
    for j in range(head_dim // 2):
        frequency = theta ** (-2 * j / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_length / scaling.high_freq_factor:
            frequencies.append(frequency)
        elif wavelength > scaling.original_length / scaling.low_freq_factor:
            frequencies.append(frequency / scaling.factor)
        else:
            band = scaling.high_freq_factor - scaling.low_freq_factor
            blend = (scaling.original_length / wavelength - scaling.low_freq_factor) / band
            frequencies.append((1 - blend) * frequency / scaling.factor + blend * frequency)
    return frequencies


@pytest.mark.parametrize(
    "scaling",
    [
        presets.scout().text.attention.rope_scaling,
        RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
        RopeScaling(factor=4.0, low_freq_factor=0.5, high_freq_factor=32.0, original_length=4096),
    ],
    ids=["scout", "smooth", "wide"],
)
def test_frequencies_follow_the_published_rule(scaling):
    config = dataclasses.replace(presets.scout().text.attention, rope_scaling=scaling)
    wanted = by_the_rule(config.rope_theta, config.head_dim, scaling)
    # Near the ends of the band the blend is a difference of numbers up to high_freq_factor.
    np.testing.assert_allclose(rope.frequencies(config), wanted, rtol=2e-5)


def test_without_scaling_frequencies_are_powers_of_theta():
    config = dataclasses.replace(CONFIG, rope_scaling=None, rope_theta=10_000.0)
    np.testing.assert_allclose(rope.frequencies(config), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_patches_turn_by_column_then_row_counted_from_one_and_the_class_token_stands_still():
    config = VisionConfig(
        embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, image_size=8, patch_size=4, output_dim=8, rope_theta=100.0
    )
    wanted = [  # a head of 8 has 4 pairs; speeds of each axis are 1 and 100^(-1/2)
        [1, 0.1, 1, 0.1],
        [2, 0.2, 1, 0.1],  # one column to the right
        [1, 0.1, 2, 0.2],  # one row down
        [2, 0.2, 2, 0.2],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(rope.image_angles(config), wanted, rtol=1e-6)
