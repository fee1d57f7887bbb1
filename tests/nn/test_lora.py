"""Modules with adapters against plain products, one expert and one half after another; forward, gradient, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.config import MoeConfig
from llama4_jax.config.lora import LoraConfig
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.lora import FORMS, LoraExperts, LoraLinear, LowRank, form_of
from llama4_jax.nn.mlp import swiglu
from llama4_jax.nn.moe import Experts
from llama4_jax.testing import budget

CONFIG = LoraConfig(rank=2, alpha=3.0)
DIM, HEADS, WIDTH, HIDDEN, EXPERTS = 6, 3, 4, 5, 3
# Sums of at most HEADS * WIDTH + rank terms, three one after another, none of which add up to more than 30.
MAGNITUDE = 30.0
TOLERANCE = budget.matmul_tolerance(jnp.float32, 3 * (HEADS * WIDTH + 2), magnitude=MAGNITUDE)
LINEARS = {
    "attention.query.kernel": ((DIM,), (HEADS, WIDTH), ("embed", "heads", "head_dim")),
    "attention.output.kernel": ((HEADS, WIDTH), (DIM,), ("heads", "head_dim", "embed")),
    "gate_up.kernel": ((DIM,), (2, HIDDEN), ("embed", "gate_up", "mlp")),
    "down.kernel": ((HIDDEN,), (DIM,), ("mlp", "embed")),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape), jnp.float32)


def low_rank(kernel: nnx.Param, name: str, seed: int | None) -> LowRank:
    """An adapter with random factors, or as it starts where `seed` is None."""
    delta = LowRank(kernel, FORMS[name], CONFIG, rngs=nnx.Rngs(0))
    return delta if seed is None else jax.tree.map(lambda leaf: normal(seed, *leaf.shape), delta)


def linear(name: str, seed: int | None = 1, dtype=jnp.float32) -> tuple[Linear, LoraLinear]:
    inputs, outputs, axes = LINEARS[name]
    base = Linear(inputs, outputs, axes, rngs=nnx.Rngs(0), bias=True, dtype=dtype)
    base = jax.tree.map(lambda leaf: normal(2, *leaf.shape).astype(dtype), base)  # a bias of zero would hide itself
    return base, LoraLinear(base, low_rank(base.kernel, name, seed))


def experts(seed: int | None = 1, dtype=jnp.float32) -> tuple[Experts, LoraExperts]:
    config = MoeConfig(num_experts=EXPERTS, expert_dim=HIDDEN)
    base = Experts(config, DIM, rngs=nnx.Rngs(0), output_gain=1.0, dtype=dtype)
    deltas = low_rank(base.gate_up, "experts.gate_up", seed), low_rank(base.down, "experts.down", seed)
    return base, LoraExperts(base, *deltas)


@pytest.mark.parametrize("name", ["attention.query.kernel", "attention.output.kernel", "down.kernel"])
def test_a_linear_map_adds_the_product_of_two_matrices(name):
    base, adapted = linear(name)
    inputs, outputs, _ = LINEARS[name]
    x = normal(3, 2, 7, *inputs)
    a = np.asarray(adapted.kernel_delta.lora_a[...]).reshape(-1, CONFIG.rank)
    b = np.asarray(adapted.kernel_delta.lora_b[...]).reshape(CONFIG.rank, -1)
    added = 1.5 * np.asarray(x).reshape(14, -1) @ a @ b
    np.testing.assert_allclose(adapted(x), base(x) + added.reshape(2, 7, *outputs), rtol=0, atol=TOLERANCE)


def test_gate_and_up_have_factors_of_their_own():
    base, adapted = linear("gate_up.kernel")
    x = normal(3, 7, DIM)
    a, b = (np.asarray(leaf[...]) for leaf in (adapted.kernel_delta.lora_a, adapted.kernel_delta.lora_b))
    assert a.shape == (DIM, 2, CONFIG.rank) and b.shape == (2, CONFIG.rank, HIDDEN)
    for half in range(2):
        wanted = base(x)[:, half] + 1.5 * np.asarray(x) @ a[:, half] @ b[half]
        np.testing.assert_allclose(adapted(x)[:, half], wanted, rtol=0, atol=TOLERANCE)


def plain_experts(adapted: LoraExperts, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """One row after another, with the adapters of its expert in the weights."""
    gate_up, down = adapted.gate_up_delta, adapted.down_delta
    ends = jnp.cumsum(sizes)

    def row(index, vector):
        e = jnp.minimum(jnp.sum(index >= ends), EXPERTS - 1)
        first = adapted.gate_up[...][e] + 1.5 * jnp.einsum(
            "dr,rgf->dgf", gate_up.lora_a[...][e], gate_up.lora_b[...][e]
        )
        second = adapted.down[...][e] + 1.5 * down.lora_a[...][e] @ down.lora_b[...][e]
        return jnp.where(index < ends[-1], swiglu(jnp.einsum("d,dgf->gf", vector, first)) @ second, 0.0)

    return jax.vmap(row)(jnp.arange(rows.shape[0]), rows)


@pytest.fixture(scope="module")
def run_and_gradient():
    """Of the adapted experts and of the plain ones: (adapted, rows, sizes, weights) -> output, gradients."""

    def both(function):
        def total(adapted, rows, sizes, weights):
            out = function(adapted, rows, sizes)
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    return both(lambda adapted, rows, sizes: adapted(rows, sizes)), both(plain_experts)


@pytest.mark.parametrize("sizes", [[4, 0, 5], [0, 9, 0], [2, 3, 1]], ids=["one_empty", "one_full", "rows_left_over"])
def test_experts_equal_a_loop_over_rows_forward_and_gradient(sizes, run_and_gradient):
    given = experts()[1], normal(4, 9, DIM), jnp.asarray(sizes, jnp.int32), normal(5, 9, DIM)
    (gradients, out), (wanted_gradients, wanted) = (run(*given) for run in run_and_gradient)
    larger = max(1.0, np.abs(wanted).max() / MAGNITUDE)  # what is gated and multiplied again grows beyond it
    np.testing.assert_allclose(out, wanted, rtol=0, atol=larger * TOLERANCE)
    for (path, got), leaf in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        # A gradient of a weight adds up as many such terms as its expert has rows.
        np.testing.assert_allclose(got, leaf, rtol=0, atol=9 * TOLERANCE, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("only", ["gate_up_delta", "down_delta"])
def test_one_of_the_experts_two_weights_may_be_left_alone(only):
    base, both = experts()
    kept = [getattr(both, name) if name == only else None for name in ("gate_up_delta", "down_delta")]
    zeroed = jax.tree.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "_delta" in str(path) and only not in str(path) else leaf, both
    )
    rows, sizes = normal(4, 9, DIM), jnp.asarray([4, 3, 2], jnp.int32)
    np.testing.assert_array_equal(LoraExperts(base, *kept)(rows, sizes), zeroed(rows, sizes))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_adapter_changes_no_bit(dtype):
    for name in LINEARS:
        base, adapted = linear(name, None, dtype)
        x = normal(3, 7, *LINEARS[name][0]).astype(dtype)
        np.testing.assert_array_equal(adapted(x), base(x))
        assert adapted(x).dtype == dtype and adapted(x, jnp.float32).dtype == jnp.float32
        assert np.abs(adapted.kernel_delta.lora_a[...]).min() > 0
    base, adapted = experts(None, dtype)
    rows, sizes = normal(4, 9, DIM).astype(dtype), jnp.asarray([4, 0, 5], jnp.int32)
    np.testing.assert_array_equal(adapted(rows, sizes), base(rows, sizes))


@pytest.mark.parametrize("name", LINEARS)
def test_the_matrix_of_a_stack_is_that_of_each_layer(name):
    inputs, outputs, axes = LINEARS[name]
    shape = (*inputs, *outputs)
    stack = low_rank(nnx.Param(jnp.zeros((2, *shape)), axes=("layers", *axes)), name, seed=1)
    assert stack.lora_a.axes[0] == stack.lora_b.axes[0] == "layers" and stack.matrix().shape == (2, *shape)
    for layer in range(2):
        single = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
        np.testing.assert_allclose(stack.matrix()[layer], single.matrix(), rtol=0, atol=TOLERANCE)
        base = Linear(inputs, outputs, axes, rngs=nnx.Rngs(0))
        x = normal(3, 7, *inputs)
        wanted = base(x) + jnp.tensordot(x, single.matrix(), len(inputs))
        np.testing.assert_allclose(LoraLinear(base, single)(x), wanted, rtol=0, atol=TOLERANCE)


def test_only_the_decoders_weights_have_a_form():
    assert form_of("decoder.tail.2.attention.query.kernel") == FORMS["attention.query.kernel"]
    assert form_of("decoder.period.0.feed_forward.experts.down") == FORMS["experts.down"]
    assert form_of("decoder.period.0.feed_forward.shared.down.kernel") == FORMS["down.kernel"]
    for other in ("vision.blocks.attention.query.kernel", "head.kernel", "decoder.tail.0.feed_forward.router.kernel"):
        assert form_of(other) is None


def test_the_change_of_an_experts_weight_is_never_made_in_full():
    """Of 16 experts 512 wide two rows are asked for: what is needed beside the weights is no part of their size."""
    config = MoeConfig(num_experts=16, expert_dim=512)
    base = jax.eval_shape(lambda: Experts(config, 512, rngs=nnx.Rngs(0), output_gain=1.0))

    def compiled(adapted: bool):
        def run(base, rows, sizes):
            if not adapted:
                return base(rows, sizes)
            forms = {"gate_up": FORMS["experts.gate_up"], "down": FORMS["experts.down"]}
            deltas = [LowRank(getattr(base, name), form, CONFIG, rngs=nnx.Rngs(0)) for name, form in forms.items()]
            return LoraExperts(base, *deltas)(rows, sizes)

        shapes = jax.ShapeDtypeStruct((2, 512), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
        return jax.jit(run).lower(base, *shapes).compile().memory_analysis().temp_size_in_bytes

    whole = 16 * 512 * 1024 * 4
    assert compiled(True) - compiled(False) < whole / 16
