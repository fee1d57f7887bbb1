"""Cross-entropy in pieces equals cross-entropy in one, and never holds all logits."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CountingLoader, quick_model, small_config

from llama4_jax.config.train import TrainConfig
from llama4_jax.train import losses

B, T, D, V = 3, 13, 16, 50


def plain(hidden, unembedding, targets, weights, z_loss):
    """The definition, with all logits and autodiff."""
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    nll = normaliser - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * normaliser**2)), jnp.sum(weights * nll)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    unembedding = (2 * jax.random.normal(keys[1], (D, V)) / D**0.5).astype(dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jnp.where(jax.random.uniform(keys[3], (B, T)) < 0.3, 0.0, jax.random.uniform(keys[3], (B, T)))
    return hidden, unembedding, targets, weights


@pytest.mark.parametrize("chunks, worth_sorting", [(1, 2**20), (2, 2**20), (5, 2**20), (13, 2**20), (1, 0), (13, 0)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunks, worth_sorting, z_loss, monkeypatch):
    monkeypatch.setattr(losses, "WORTH_SORTING", worth_sorting)
    limit = -(-B * T * V // chunks)
    compute = functools.partial(losses.cross_entropy, z_loss=z_loss, logits_limit=limit)
    wanted, wanted_gradient = jax.value_and_grad(plain, (0, 1), has_aux=True)(*inputs(), z_loss)
    got, gradient = jax.jit(jax.value_and_grad(compute, (0, 1), has_aux=True))(*inputs())
    # Sums of B * T terms and products of length V or B * T, each term of size about 1.
    tolerance = 4 * B * T * np.finfo(np.float32).eps
    np.testing.assert_allclose(got, wanted, rtol=tolerance)
    np.testing.assert_allclose(jax.jit(compute)(*inputs()), wanted, rtol=tolerance)
    for g, w in zip(gradient, wanted_gradient):
        np.testing.assert_allclose(g, w, atol=tolerance * float(jnp.abs(w).max()), rtol=0)


def test_bfloat16_gradients_are_as_good_as_the_plain_ones():
    exact = jax.grad(lambda *a: plain(*a, 0.0)[0], (0, 1))(*inputs())
    for limit in (B * T * V, B * V):
        compute = lambda *a, n=limit: losses.cross_entropy(*a, logits_limit=n)[0]  # noqa: E731
        gradient = jax.grad(compute, (0, 1))(*inputs("bfloat16"))
        for g, w in zip(gradient, exact):
            assert g.dtype == jnp.bfloat16
            error = jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)
            assert error < 4 * float(jnp.finfo(jnp.bfloat16).eps)  # inputs, logit gradients and results are rounded


def test_the_metric_carries_no_gradient():
    gradient = jax.grad(lambda h: losses.cross_entropy(h, *inputs()[1:])[1])(inputs()[0])
    np.testing.assert_array_equal(gradient, 0.0)


def test_tokens_of_weight_zero_do_not_count():
    hidden, unembedding, targets, weights = inputs()
    weights = weights.at[0, 3].set(0.0)
    changed = targets.at[0, 3].add(1) % V
    for limit in (B * T * V, B * V):
        compute = lambda t, n=limit: losses.cross_entropy(hidden, unembedding, t, weights, logits_limit=n)[0]  # noqa: E731
        assert compute(targets) == compute(changed)


def test_chunks_of_tokens_without_weight_are_not_computed(monkeypatch):
    """39 tokens in 8 pieces of 5: five that count fill one, and what the others would compute is not a number."""
    monkeypatch.setattr(losses, "WORTH_SORTING", 0)
    hidden, unembedding, targets, _ = inputs()
    counts = jnp.zeros(B * T, bool).at[jnp.array([3, 4, 17, 30, 38])].set(True).reshape(B, T)
    weights = counts.astype(jnp.float32)
    compute = jax.jit(jax.value_and_grad(losses.cross_entropy, (0, 1), has_aux=True))
    got, (to_hidden, to_unembedding) = compute(
        jnp.where(counts[..., None], hidden, jnp.nan), unembedding, targets, weights
    )
    wanted, (hidden_wanted, unembedding_wanted) = jax.value_and_grad(plain, (0, 1), has_aux=True)(
        hidden, unembedding, targets, weights, 0.0
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_allclose(to_hidden, hidden_wanted, atol=1e-5)
    np.testing.assert_allclose(to_unembedding, unembedding_wanted, atol=1e-5)


def test_nothing_counts_and_nothing_is_learned(monkeypatch):
    monkeypatch.setattr(losses, "WORTH_SORTING", 0)
    hidden, unembedding, targets, weights = inputs()
    got, gradients = jax.jit(jax.value_and_grad(losses.cross_entropy, (0, 1), has_aux=True))(
        hidden, unembedding, targets, jnp.zeros_like(weights)
    )
    assert got == (0.0, 0.0) and not any(jnp.any(gradient) for gradient in gradients)


def test_a_full_vocabulary_never_has_all_its_logits_in_memory():
    t, d, v, limit = 4096, 8, 202_048, 2**24
    shapes = (
        jax.ShapeDtypeStruct((1, t, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((1, t), jnp.int32),
        jax.ShapeDtypeStruct((1, t), jnp.float32),
    )

    def peak(loss):
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * t * v  # 3.3 GB
    assert peak(lambda *a: plain(*a, 0.0)[0]) >= all_logits
    assert peak(lambda *a: losses.cross_entropy(*a, logits_limit=limit)[0]) <= 6 * 4 * limit  # 0.4 GB


def test_chunking_is_said_once(caplog):
    losses._report_chunks.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            losses.cross_entropy(*inputs(), logits_limit=B * V * 4)
        losses.cross_entropy(*inputs())
    assert [record.message for record in caplog.records if "chunks" in record.message] == [
        "cross-entropy in 4 chunks: 39 tokens x 50 vocabulary exceed logits_limit=600"
    ]


def test_router_losses_enter_with_their_weights():
    model = quick_model(small_config())
    batch = next(CountingLoader())
    config = TrainConfig(steps=1, balance_loss=0.5, router_z_loss=0.25)
    terms = jax.jit(functools.partial(losses.next_token, config=config))(model, batch, jax.random.key(0))
    assert terms.weight == batch["loss_weights"].sum()
    added = 0.5 * terms.sums["router_balance_loss"] + 0.25 * terms.sums["router_z_loss"]
    assert added > 0
    np.testing.assert_allclose(terms.loss, terms.sums["loss"] + added, rtol=1e-6)
    np.testing.assert_allclose(terms.sums["load"].sum(-1) / terms.weight, 1.0, rtol=1e-6)  # shares
