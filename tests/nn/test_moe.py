"""The mixture against a plain loop over tokens, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import MoeConfig
from llama4_jax.core import names
from llama4_jax.nn.mlp import swiglu
from llama4_jax.nn.moe import Moe
from llama4_jax.testing import budget

EXPERTS, DIM, HIDDEN = 5, 6, 7
PRESENT = np.array([[False, True, True, True], [True, True, True, False], [True, True, True, True]])
# No output and no gradient here is a sum of terms that exceed 30 together; the longest chain of products has 3 of them.
TOLERANCE = budget.matmul_tolerance(jnp.float32, DIM + HIDDEN + DIM, magnitude=30.0)


@pytest.fixture(scope="module", params=[1, 2], ids=["top1", "top2"])
def case(request):
    """(structure, parameters by name, inputs [3 4 d])"""
    config = MoeConfig(num_experts=EXPERTS, expert_dim=HIDDEN, top_k=request.param)
    structure, params = names.split(Moe(config, DIM, rngs=nnx.Rngs(0)))
    params["router.kernel"] = 4 * params["router.kernel"]  # decides clearly
    return structure, params, jax.random.normal(jax.random.key(1), (*PRESENT.shape, DIM))


def grouped(structure, params, x, present=PRESENT):
    return structure.merge(params)(x, jnp.asarray(present))


def choose(params, x, top_k: int) -> np.ndarray:
    """[b t k], in numpy: the experts of the largest logits."""
    return np.argsort(-np.asarray(x) @ np.asarray(params["router.kernel"]), axis=-1, kind="stable")[..., :top_k]


def plain(params, x, chosen: np.ndarray, present=PRESENT):
    """One token after another, one expert after another."""

    def expert(vector, gate_up, down):
        return swiglu(jnp.einsum("d,dgf->gf", vector, gate_up)) @ down

    def token(row: int, column: int):
        vector = x[row, column]
        out = expert(vector, params["shared.gate_up.kernel"], params["shared.down.kernel"])
        for e in chosen[row, column] if present[row, column] else ():
            score = jax.nn.sigmoid(vector @ params["router.kernel"][:, e])
            out += expert(score * vector, params["experts.gate_up"][e], params["experts.down"][e])
        return out

    rows, columns = x.shape[:2]
    return jnp.stack([jnp.stack([token(row, column) for column in range(columns)]) for row in range(rows)])


def gradients(function, params, x):
    """Of a sum with fixed weights, by all parameters and by the input."""
    weights = jax.random.normal(jax.random.key(2), x.shape)
    return jax.jit(jax.grad(lambda params, x: jnp.sum(function(params, x) * weights), argnums=(0, 1)))(params, x)


def test_output_and_gradients_equal_a_loop_over_tokens(case):
    structure, params, x = case
    chosen = choose(params, x, structure.merge(params).config.top_k)
    found, statistics = grouped(structure, params, x)
    np.testing.assert_allclose(found, plain(params, x, chosen), rtol=0, atol=TOLERANCE)
    assert statistics["dropped"] == 0
    got = gradients(lambda params, x: grouped(structure, params, x)[0], params, x)
    wanted = gradients(lambda params, x: plain(params, x, chosen), params, x)
    for path, leaf in jax.tree.leaves_with_path(got):
        wanted_leaf = dict(jax.tree.leaves_with_path(wanted))[path]
        np.testing.assert_allclose(leaf, wanted_leaf, rtol=0, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path))


def test_the_gradient_keeps_gate_and_up_and_not_what_down_multiplies(case):
    structure, params, x = case
    _, pullback = jax.vjp(lambda params, x: grouped(structure, params, x)[0], params, x)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[-1:] == (HIDDEN,)]
    kept = [leaf.shape for leaf in kept if not any(leaf is param for param in params.values())]
    assert {shape[-2] for shape in kept} == {2}, kept


def test_all_tokens_to_one_expert_leaves_the_others_without_gradient(case):
    structure, params, x = case
    top_k = structure.merge(params).config.top_k
    x = x.at[..., 0].set(1.0)
    kernel = jnp.zeros((DIM, EXPERTS)).at[0].set(jnp.array([0.0, 1.0, 0.0, 3.0, -1.0]))  # 3, then 1
    params = params | {"router.kernel": kernel}
    chosen = np.broadcast_to([3, 1][:top_k], (*PRESENT.shape, top_k))
    found, statistics = grouped(structure, params, x)
    np.testing.assert_allclose(found, plain(params, x, chosen), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(statistics["load"][3], np.float32(1 / top_k))
    assert statistics["dead"] == EXPERTS - top_k
    assert statistics["dropped"] == 0
    got, _ = gradients(lambda params, x: grouped(structure, params, x)[0], params, x)
    moved = np.abs(got["experts.down"]).sum(axis=(1, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), sorted([3, 1][:top_k]))


def test_padding_goes_through_the_shared_expert_alone(case):
    """Its output is never used; that nothing is routed saves its cost, and keeps it out of the experts' gradients."""
    structure, params, x = case
    moe = structure.merge(params)
    found, _ = grouped(structure, params, x)
    np.testing.assert_allclose(found[~PRESENT], moe.shared(x)[~PRESENT], rtol=0, atol=TOLERANCE)
    assert np.abs(found - moe.shared(x))[PRESENT].max() > 1e-3
    other, _ = grouped(structure, params, x.at[0, 0].add(5.0).at[1, 3].add(-5.0))
    np.testing.assert_allclose(other[PRESENT], found[PRESENT], rtol=0, atol=TOLERANCE)


def test_a_call_of_nothing_but_padding_routes_nothing(case):
    structure, params, x = case
    found, statistics = grouped(structure, params, x, np.zeros_like(PRESENT))
    np.testing.assert_allclose(found, structure.merge(params).shared(x), rtol=0, atol=TOLERANCE)
    assert statistics["dropped"] == 0
    assert statistics["dead"] == EXPERTS


def test_the_order_of_experts_is_of_no_account(case):
    structure, params, x = case
    order = np.array([3, 0, 4, 1, 2])
    permuted = params | {
        "router.kernel": params["router.kernel"][:, order],
        "experts.gate_up": params["experts.gate_up"][order],
        "experts.down": params["experts.down"][order],
    }
    found, statistics = grouped(structure, permuted, x)
    original, original_statistics = grouped(structure, params, x)
    np.testing.assert_allclose(found, original, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(statistics["load"], original_statistics["load"][order])
    assert np.unique(original_statistics["load"]).size > 1


def test_load_counts_assignments_of_tokens_present(case):
    structure, params, x = case
    top_k = structure.merge(params).config.top_k
    counts = np.bincount(choose(params, x, top_k)[PRESENT].ravel(), minlength=EXPERTS)
    _, statistics = grouped(structure, params, x)
    np.testing.assert_allclose(statistics["load"], counts / (PRESENT.sum() * top_k), rtol=1e-6)
