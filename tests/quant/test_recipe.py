"""Recipes on models of several configurations: what they name, what they refuse, and that a slip of the pen is seen."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from flax import nnx

from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.quant import PRESETS, QuantRecipe, QuantSpec, int4_all, int4_experts
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.quant import recipe


def parameters(**changes) -> dict:
    """Abstract parameters of a tiny text model, by name."""
    text = dataclasses.replace(presets.tiny().text, num_layers=2, **changes)
    config = Llama4Config(text=text)
    return names.held(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))


def dense() -> dict:
    return parameters(moe=dataclasses.replace(presets.tiny().text.moe, step=0))


def rules(*pairs) -> QuantRecipe:
    return QuantRecipe(name="mine", rules=pairs)


MATRICES = ("attention.query", "attention.key", "attention.value", "attention.output")


def test_int4_all_takes_every_matrix_and_leaves_router_norms_and_embeddings():
    params = parameters()
    found = recipe.specs(params, int4_all(group=8))
    left = {name.removeprefix("decoder.tail.") for name in params if name not in found}
    norms = {f"{layer}.{part}_norm.scale" for layer in (0, 1) for part in ("attention", "feed_forward")}
    assert left == norms | {"embed.table", "norm.scale", "1.feed_forward.router.kernel"}
    assert all(f"decoder.tail.{layer}.{name}.kernel" in found for layer in (0, 1) for name in MATRICES)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_tied_embeddings(name):
    params = parameters(tie_embeddings=True)
    found = recipe.specs(params, PRESETS[name](8))
    assert "head.kernel" not in params and "embed.table" not in found
    assert {"decoder.tail.1.feed_forward.experts.gate_up", "decoder.tail.1.feed_forward.experts.down"} <= found.keys()


@pytest.mark.parametrize("name", ["int4_all", "w4a8", "int8"])
def test_presets_know_models_without_experts(name):
    found = recipe.specs(dense(), PRESETS[name](8))
    assert "decoder.tail.1.feed_forward.gate_up.kernel" in found
    assert len(found) == 2 * 6 + (name != "w4a8")  # and the unembedding


@pytest.mark.parametrize("name", ["int4_experts", "fp8_mixed"])
def test_a_recipe_that_comes_to_nothing_is_refused(name):
    with pytest.raises(ValueError, match="names nothing that this model has"):
        recipe.specs(dense(), PRESETS[name](8))


@pytest.mark.parametrize(
    "pattern", ["decodr.*.experts.gate_up", "decoder.*.experts.gateup", "heads.kernel", "decoder.*.shared.up.kernel"]
)
def test_a_misspelt_pattern_is_an_error_even_where_embeddings_are_tied(pattern):
    params = parameters(tie_embeddings=True)
    with pytest.raises(ValueError, match="no parameter has such a name") as raised:
        recipe.specs(params, rules((pattern, QuantSpec(group=8)), *int4_all(8).rules))
    assert pattern in str(raised.value)


def test_a_pattern_for_some_layers_is_an_error_where_others_have_that_matrix():
    with pytest.raises(ValueError, match=r"decoder.tail.7.\*: no parameter"):
        recipe.specs(parameters(), rules(("decoder.tail.7.*", QuantSpec(group=8)), *int4_all(8).rules))
    with pytest.raises(ValueError, match=r"decoder.tail.0.\*.experts.down: no parameter"):
        recipe.specs(parameters(), rules(("decoder.tail.0.*.experts.down", QuantSpec(group=8)), *int4_all(8).rules))


def test_all_that_cannot_be_quantised_is_listed_at_once():
    with pytest.raises(ValueError) as raised:
        recipe.specs(parameters(), rules(("decoder.*", QuantSpec(group=16))))
    message = str(raised.value)
    for name in ("0.attention_norm.scale", "1.feed_forward_norm.scale"):
        assert f"decoder.tail.{name} (32,): it is in no product" in message
    # Experts are 24 wide, which 16 does not divide.
    assert "decoder.tail.1.feed_forward.experts.down (4, 24, 32): group=16 does not divide inputs (24,)" in message
    assert "query" not in message


def test_the_first_rule_that_fits_decides_and_none_keeps():
    spec, wide = QuantSpec(group=8), QuantSpec(values="int8", group=None)
    found = recipe.specs(
        parameters(),
        rules(
            ("decoder.*.attention.query.kernel", None), ("decoder.*.attention.*.kernel", wide), ("head.kernel", spec)
        ),
    )
    assert "decoder.tail.0.attention.query.kernel" not in found
    assert found["decoder.tail.0.attention.key.kernel"] == wide and found["head.kernel"] == spec


def test_what_is_quantised_already_is_refused():
    params = parameters()
    name = "decoder.tail.1.feed_forward.experts.down"
    held = jax.eval_shape(
        lambda: recipe.quantized.quantize(jax.numpy.zeros(params[name].shape), QuantSpec(group=8), (1,))
    )
    with pytest.raises(ValueError, match=f"{name} .*: it is quantised already"):
        recipe.specs(params | {name: held}, int4_experts(8))
