"""What top-k and top-p rule out, by hand, and draws that a seed repeats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.infer import GREEDY, Sampler

OUT = -np.inf
# Probabilities 0.4, 0.1, 0.3, 0.2.
LOGITS = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2]]))


def kept(**options) -> list[int]:
    """Tokens that a sampler leaves in the draw; those keep their logits."""
    filtered = np.asarray(Sampler(temperature=1.0, **options).filter(LOGITS))[0]
    left = np.flatnonzero(filtered != OUT)
    np.testing.assert_array_equal(filtered[left], np.asarray(LOGITS)[0, left])
    return left.tolist()


@pytest.mark.parametrize(("k", "left"), [(0, [0, 1, 2, 3]), (1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_the_likeliest(k, left):
    assert kept(top_k=k) == left


@pytest.mark.parametrize(
    ("p", "left"), [(0.01, [0]), (0.39, [0]), (0.5, [0, 2]), (0.75, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_it(p, left):
    assert kept(top_p=p) == left


def test_top_p_measures_what_top_k_left():
    """Of 0.4 and 0.3 alone the first has 4/7: 0.5 is reached with it."""
    assert kept(top_p=0.5, top_k=2) == [0]
    assert kept(top_p=0.6, top_k=2) == [0, 2]


def test_rows_are_filtered_each_by_its_own_logits():
    rows = jnp.concatenate([LOGITS, LOGITS[:, ::-1]])
    filtered = Sampler(temperature=1.0, top_k=1).filter(rows)
    np.testing.assert_array_equal(np.isfinite(filtered), [[True, False, False, False], [False, False, False, True]])


def test_temperature_zero_is_greedy_whatever_the_key():
    for seed in range(3):
        assert GREEDY(LOGITS, jax.random.key(seed)).tolist() == [0]


def test_draws_follow_the_probabilities_at_the_temperature():
    """4,000 rows: a share near 1/2 has a deviation of 0.008, and five of those are allowed."""
    rows = jnp.tile(LOGITS, (4000, 1))
    for temperature in (1.0, 0.5):
        drawn = Sampler(temperature=temperature)(rows, jax.random.key(0))
        found = np.bincount(drawn, minlength=4) / 4000
        wanted = np.array([0.4, 0.1, 0.3, 0.2]) ** (1 / temperature)
        np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.04)


def test_what_is_ruled_out_is_never_drawn():
    drawn = Sampler(temperature=5.0, top_k=2)(jnp.tile(LOGITS, (500, 1)), jax.random.key(1))
    assert set(np.asarray(drawn).tolist()) == {0, 2}


def test_a_key_repeats_its_draws_and_another_does_not():
    rows, sampler = jnp.tile(LOGITS, (50, 1)), Sampler(temperature=1.0)
    first, again, other = (np.asarray(sampler(rows, jax.random.key(seed))) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted temperature >= 0, top_k >= 0 and 0 < top_p <= 1"):
        Sampler(**wrong)


@pytest.mark.parametrize("vocab_size", [1, 7, 256, 521, 1000, 2021])  # primes and products, few and many parts
def test_greedy_takes_the_first_of_the_likeliest(vocab_size):
    logits = np.random.default_rng(vocab_size).integers(-3, 3, (5, vocab_size)).astype(np.float32)  # many are equal
    logits[0], logits[1, :-1] = -np.inf, -np.inf
    np.testing.assert_array_equal(GREEDY(jnp.asarray(logits), jax.random.key(0)), logits.argmax(-1))
