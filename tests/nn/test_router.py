"""The router on a story of four tokens and three experts, whose sigmoids are quarters: log 3 gives 3/4, 0 gives 1/2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import MoeConfig
from llama4_jax.nn.router import Router, statistics

L = float(np.log(3.0))
STORY = jnp.array(
    [
        [L, -L, 0.0],  # sigmoids 3/4 1/4 1/2, shares 1/2 1/6 1/3
        [L, 0.0, -L],  # shares 1/2 1/3 1/6
        [-L, L, 0.0],  # shares 1/6 1/2 1/3
        [L, 0.0, 0.0],  # sigmoids 3/4 1/2 1/2, shares 3/7 2/7 2/7
    ]
)
CHOSEN = jnp.array([[0], [0], [1], [0]])
EPS = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 16 * EPS, "atol": 16 * EPS}  # a handful of fp32 operations on numbers near 1


def entropy(*shares: float) -> float:
    return -sum(share * np.log(share) for share in shares)


def router(**config) -> Router:
    """One whose logits are its inputs."""
    module = Router(MoeConfig(num_experts=3, expert_dim=4, **config), 3, rngs=nnx.Rngs(0))
    module.kernel[...] = jnp.eye(3)
    return module


def test_statistics_of_the_story_by_hand():
    found = statistics(STORY, CHOSEN, jnp.ones(4, bool))
    np.testing.assert_allclose(found["load"], [3 / 4, 1 / 4, 0], **CLOSE)
    assert found["max_load"] == pytest.approx(9 / 4)
    assert found["dead"] == 1
    mean_entropy = (3 * entropy(1 / 2, 1 / 3, 1 / 6) + entropy(3 / 7, 2 / 7, 2 / 7)) / 4
    np.testing.assert_allclose(found["entropy"], mean_entropy, **CLOSE)
    share_0, share_1 = (1 / 2 + 1 / 2 + 1 / 6 + 3 / 7) / 4, (1 / 6 + 1 / 3 + 1 / 2 + 2 / 7) / 4
    np.testing.assert_allclose(found["balance_loss"], 3 * (3 / 4 * share_0 + 1 / 4 * share_1), **CLOSE)
    z_loss = (3 * np.log(3 + 1 + 1 / 3) ** 2 + np.log(3 + 1 + 1) ** 2) / 4
    np.testing.assert_allclose(found["z_loss"], z_loss, **CLOSE)


def test_padding_counts_in_no_statistic():
    logits = jnp.concatenate([STORY, jnp.array([[-5.0, -5.0, 9.0]] * 3)])
    experts, present = jnp.concatenate([CHOSEN, jnp.full((3, 1), 2)]), jnp.arange(7) < 4
    alone = statistics(STORY, CHOSEN, jnp.ones(4, bool))
    for name, value in statistics(logits, experts, present).items():
        np.testing.assert_allclose(value, alone[name], err_msg=name, **CLOSE)


def test_a_call_of_nothing_but_padding_has_finite_statistics():
    found = statistics(STORY, CHOSEN, jnp.zeros(4, bool))
    assert found.pop("dead") == 3
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.zeros_like(value), err_msg=name)


def test_an_even_load_has_balance_loss_one():
    """Whatever the size of the logits: the loss is defined on normalised scores."""
    logits = jnp.array([[L, 0.0, 0.0], [0.0, L, 0.0], [0.0, 0.0, L]])
    found = statistics(logits, jnp.array([[0], [1], [2]]), jnp.ones(3, bool))
    np.testing.assert_allclose(found["balance_loss"], 1.0, **CLOSE)
    np.testing.assert_allclose(found["max_load"], 1.0, **CLOSE)
    assert found["dead"] == 0


def test_the_balance_loss_pushes_the_crowded_expert_down():
    gradient = jax.grad(lambda logits: statistics(logits, CHOSEN, jnp.ones(4, bool))["balance_loss"])(STORY)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 2] < 0).all()


def test_scores_are_the_sigmoids_of_the_chosen_logits():
    routing, _ = router(top_k=2)(STORY, jnp.ones(4, bool))
    np.testing.assert_array_equal(routing.experts, [[0, 2], [0, 1], [1, 2], [0, 1]])
    np.testing.assert_allclose(routing.scores, [[0.75, 0.5]] * 4, **CLOSE)


def test_logits_whose_sigmoids_are_both_one_still_have_an_order():
    routing, _ = router()(jnp.array([[100.0, 101.0, 0.0]]), jnp.ones(1, bool))
    assert routing.experts.tolist() == [[1]]
    assert routing.scores.tolist() == [[1.0]]


def test_selection_bias_moves_the_choice_and_never_the_score():
    steered = router(selection_bias=True)
    np.testing.assert_array_equal(steered(STORY, jnp.ones(4, bool))[0].experts, CHOSEN)  # it starts at zero
    steered.selection_bias[...] = jnp.array([0.0, 0.0, 1.0])  # more than sigmoids can differ by
    routing, found = steered(STORY, jnp.ones(4, bool))
    np.testing.assert_array_equal(routing.experts, [[2]] * 4)
    np.testing.assert_allclose(routing.scores, [[0.5], [0.25], [0.5], [0.5]], **CLOSE)
    np.testing.assert_array_equal(found["load"], [0, 0, 1])


def test_no_gradient_reaches_the_selection_bias():
    def total(module):
        routing, found = module(STORY, jnp.ones(4, bool))
        return jnp.sum(routing.scores) + found["balance_loss"] + found["z_loss"]

    gradient = jax.grad(total)(router(selection_bias=True, top_k=2))
    assert not np.any(gradient.selection_bias[...])
    assert np.any(gradient.kernel[...])


def test_an_fp32_router_hands_scores_back_in_the_dtype_of_bfloat16_activations():
    routing, found = router()(STORY.astype(jnp.bfloat16), jnp.ones(4, bool))
    assert routing.scores.dtype == jnp.bfloat16
    assert found["z_loss"].dtype == jnp.float32
