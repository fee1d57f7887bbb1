"""Models whose weights are held in few bits: wherever the plain model works they do, as the model of what the bits stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax import infer
from llama4_jax.config import MoeConfig, quant
from llama4_jax.config.lora import LoraConfig
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import lora, vocabulary
from llama4_jax.nn.moe import Experts, Moe, TransposedExperts
from llama4_jax.testing import adapters, budget, flips, tiny
from llama4_jax.testing.few_bits import floats, quantised

GROUP = 8  # divides all widths of tiny models, and a head
W4A8 = quant.w4a8(GROUP)
TIME = 9  # more than two chunks of 4


def mixed_config(num_layers: int, **fields):
    """Chunked layers dense, global ones mixtures of top-1."""
    config = tiny.text_config(num_layers)
    moe = dataclasses.replace(config.text.moe, step=2, top_k=1)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe, **fields))


@jax.jit
def logits(model, tokens, images=None):
    return model(tokens, images).logits


@pytest.fixture(scope="module")
def tokens():
    return np.random.RandomState(0).randint(1, 128, (2, TIME)).astype(np.int32)


@pytest.fixture(scope="module")
def plain():
    return tiny.model(mixed_config(4))  # two periods in a stack


@pytest.fixture(scope="module")
def held(plain):
    return quantised(plain, W4A8)


@pytest.fixture(scope="module")
def one_layer():
    """A mixture, with a shared expert."""
    return tiny.model(tiny.text_config(1), scan=False)


def kinds(model) -> set[str]:
    return {leaf.values.dtype.name for leaf in names.held(model).values() if isinstance(leaf, QuantizedArray)}


# Everything at once: rows rounded to int8 and to float8, weights of three dtypes, groups within and across heads.
MIXED = QuantRecipe(
    name="mixed",
    rules=(
        ("decoder.*.attention.output.kernel", QuantSpec(group=16, activations="int8")),
        ("decoder.*.attention.*.kernel", QuantSpec(group=GROUP, symmetric=False)),
        ("decoder.*.kernel", QuantSpec(values="int8", group=None)),
        ("head.kernel", QuantSpec(values="int8", group=GROUP, activations="int8")),
        *quant.fp8_mixed(GROUP).rules,
    ),
)
RECIPES = [MIXED, W4A8, *(pytest.param(make(GROUP), marks=pytest.mark.thorough) for make in quant.PRESETS.values())]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_logits_have_every_bit_of_those_of_the_dequantised_model(recipe, one_layer, tokens):
    model = quantised(one_layer, recipe)
    assert kinds(model) == {spec.values for _, spec in recipe.rules}
    np.testing.assert_array_equal(logits(model, tokens), logits(floats(model), tokens))


def test_stacked_layers_have_every_bit_too_and_unrolled_they_stay_in_few_bits(held, tokens):
    found = logits(held, tokens)
    np.testing.assert_array_equal(found, logits(floats(held), tokens))
    unrolled = held.unrolled()
    assert not unrolled.decoder.periods and kinds(unrolled) == {"int4"}
    np.testing.assert_allclose(logits(unrolled, tokens), found, rtol=0, atol=2e-5 * float(jnp.abs(found).max()))


@pytest.mark.parametrize(("tied", "preset"), [(False, "int4_all"), (True, "w4a8")])
def test_the_layout_for_decoding_packs_few_bits_and_changes_no_logits(tied, preset, tokens):
    rules = quant.PRESETS[preset](GROUP).rules
    if tied:
        spec = rules[0][1]
        rules = (("embed.table", spec), *(rule for rule in rules if rule[0] != "head.kernel"))
    config = tiny.text_config(1)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tie_embeddings=tied))
    model = quantised(tiny.model(config, scan=False), QuantRecipe(name="all", rules=rules))
    prepared = infer.prepare(model)
    assert jax.tree.structure(infer.prepare(prepared)) == jax.tree.structure(prepared)
    assert not kinds(prepared)
    wide = {name for name, leaf in names.split(prepared)[1].items() if leaf.ndim > 1 and leaf.dtype == jnp.float32}
    assert {name.rpartition(".")[2] for name in wide} <= {"scales", "kernel", "table"}
    wanted = logits(model, tokens)
    if preset == "w4a8":
        unrounded = logits(flips.unrounded(model), tokens)
        assert 1e-3 < np.abs(wanted - unrounded).max() < 0.2 * np.abs(wanted).max()
    for some in (tokens[:1, :1], tokens):  # few rows, and more than are multiplied apart
        found, here = logits(prepared, some), np.s_[: some.shape[0], : some.shape[1]]
        if preset == "w4a8":
            flips.flipped(found, wanted[here], unrounded[here])
        else:
            np.testing.assert_allclose(found, wanted[here], rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.thorough
def test_generation_is_that_of_the_dequantised_model(held):
    prompts = [[5, 17, 90], [3, 1, 4, 1, 5, 9, 2]]
    assert infer.generate(held, prompts, max_new_tokens=6) == infer.generate(floats(held), prompts, max_new_tokens=6)


def test_attention_whose_products_differ_in_form_is_not_fused(tokens):
    spec = QuantSpec(group=GROUP)
    rules = (("decoder.*.attention.query.kernel", spec), ("decoder.*.attention.key.kernel", QuantSpec(group=16)))
    model = quantised(tiny.model(mixed_config(1), scan=False), QuantRecipe(name="some", rules=rules))
    wanted = logits(model, tokens[:, :4])
    found = logits(infer.prepare(model), tokens[:, :4])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("layout", [lambda experts: experts, TransposedExperts], ids=["as trained", "for decoding"])
def test_the_score_multiplies_an_experts_input_before_it_is_rounded(layout):
    """Top-1 with scores far from 1: as a factor of the output, or without rounding, other numbers would come."""
    config, spec = MoeConfig(num_experts=3, expert_dim=16, top_k=1), QuantSpec(group=8, activations="int8")
    rules = (("experts.gate_up", spec), ("experts.down", spec))
    moe = quantised(Moe(config, 32, rngs=nnx.Rngs(0)), QuantRecipe(name="experts", rules=rules))
    weights = [np.asarray(kernel[...].dequantize(), np.float64) for kernel in (moe.experts.gate_up, moe.experts.down)]
    is_experts = lambda node: isinstance(node, Experts)  # noqa: E731
    moe = jax.tree.map(lambda node: layout(node) if is_experts(node) else node, moe, is_leaf=is_experts)

    @jax.jit
    def run(moe, x):
        present = jnp.ones(x.shape[:2], bool)
        return moe(x, present)[0][0] - moe.shared(x[0]), moe.router(x[0], present[0])[0]

    x = np.random.default_rng(2).standard_normal((1, 5, 32)).astype(np.float32)
    found, routing = run(moe, x)
    score, chosen, rows = np.asarray(routing.scores)[:, 0], np.asarray(routing.experts)[:, 0], x[0].astype(np.float64)
    assert np.all((score > 0.05) & (score < 0.95))

    def rounded(row):
        scale = np.abs(row).max() / 127
        return np.round(row / scale) * scale

    def expert(row, e, rounded=rounded):
        gate, up = np.tensordot(rounded(row), weights[0][e], 1)
        return rounded(gate / (1 + np.exp(-gate)) * up) @ weights[1][e]

    wanted = np.stack([expert(score[i] * rows[i], chosen[i]) for i in range(5)])
    scaled_after = np.stack([score[i] * expert(rows[i], chosen[i]) for i in range(5)])
    unrounded = np.stack([expert(score[i] * rows[i], chosen[i], lambda row: row) for i in range(5)])
    tolerance = budget.matmul_tolerance(jnp.float32, 32, 8.0)
    assert min(np.abs(wanted - scaled_after).max(), np.abs(wanted - unrounded).max()) > 10 * tolerance
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_adapters_train_on_weights_of_few_bits_and_leave_them(one_layer, tokens):
    held = quantised(one_layer, W4A8)
    adapted = adapters.trained(held, LoraConfig(rank=2, targets=("*",)))
    structure, factors, base = lora.split(adapted)
    assert any(leaf.dtype == jnp.int4 for leaf in base.values())

    @jax.jit
    def step(factors):
        loss = lambda factors: jnp.sum(jax.nn.logsumexp(structure.merge(factors | base)(tokens).logits, -1))  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(factors)
        return value, gradients

    value, gradients = step(factors)
    assert set(gradients) == set(factors)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    lower = step(jax.tree.map(lambda factor, gradient: factor - 1e-4 * gradient, factors, gradients))[0]
    assert lower < value
    back = lora.detach(adapted)
    assert jax.tree.structure(back) == jax.tree.structure(held)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(held)))


@pytest.mark.thorough
def test_merged_adapters_make_floats_of_few_bits_whose_rows_are_rounded_still(held, tokens, caplog):
    adapted = adapters.trained(held, LoraConfig(rank=2, targets=("decoder.*.attention.*.kernel",)))
    found, merged = logits(adapted, tokens), lora.merge(adapted)
    kernel = names.held(merged)["decoder.period.0.attention.query.kernel"]
    assert kernel.values.dtype == jnp.float32 and kernel.activations == "int8"
    # An adapter sees rows as they are, and merged it sees them rounded: a difference of the size of that rounding.
    scale = float(jnp.abs(found).max())
    np.testing.assert_allclose(logits(merged, tokens), found, rtol=0, atol=0.1 * scale)
    infer.prepare(adapted)
    assert "decoding reads 8 weights as floats" in caplog.text


def test_a_vocabulary_in_few_bits_is_not_grown(plain):
    model = quantised(plain, quant.int8())
    with pytest.raises(ValueError, match="held in int8; grow it first, then quantise"):
        vocabulary.grow(model, vocabulary.mean_of_parts([[1, 2]]))
    spared = quantised(plain, W4A8)  # table and head are floats
    assert vocabulary.grow(spared, vocabulary.mean_of_parts([[1, 2]])).config.text.vocab_size == 129


@pytest.mark.thorough
def test_the_vision_tower_and_the_router_may_be_in_few_bits_too():
    spec = QuantSpec(values="int8", group=None, activations="int8")
    recipe = QuantRecipe(name="seeing", rules=(("vision.*.kernel", spec), ("decoder.*.router.kernel", spec)))
    model = quantised(tiny.model(tiny.vision_config(2), scan=False), recipe)
    assert isinstance(model.vision.patch.kernel[...], QuantizedArray)
    tokens = np.array([[5, 0, 0, 0, 0, 6]], np.int32)
    tiles = jax.random.uniform(jax.random.key(0), (1, 16, 16, 3), minval=-1, maxval=1)
    found = logits(model, tokens, tiles)
    np.testing.assert_array_equal(found, logits(floats(model), tokens, tiles))
