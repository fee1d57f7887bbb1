"""Formulas against the published sizes, and against the parameter trees that the model really makes."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from llama4_jax import config
from llama4_jax.config import Attention, presets
from llama4_jax.model import Llama4, accounting


def test_scout_has_109_billion_parameters_and_17_active():
    count = accounting.parameters(presets.scout())
    assert round(count.total / 1e9, 3) == 108.642
    assert round(count.vision / 1e9, 3) == 0.872
    assert round(count.active / 1e9, 2) == 17.17


def test_maverick_has_402_billion_parameters_and_17_active():
    count = accounting.parameters(presets.maverick())
    assert round(count.total / 1e9, 3) == 401.584
    assert count.active / 1e9 == pytest.approx(17.19, abs=0.01)


VARIANTS = {
    "nano": (presets.nano, []),
    "tiny": (presets.tiny, []),
    "biases": (presets.tiny, ["text.attention.bias=true"]),
    "tied": (presets.tiny, ["text.tie_embeddings=true"]),
    "selection bias": (presets.tiny, ["text.moe.selection_bias=true"]),
    "no mixture": (presets.tiny, ["text.moe.step=0"]),
    "text only": (presets.tiny, ["text.num_layers=3"]),
    "scout": (presets.scout, []),
    "maverick": (presets.maverick, []),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_formula_equals_the_parameter_tree(name):
    preset, overrides = VARIANTS[name]
    described = config.apply(preset(), overrides)
    if name == "text only":
        described = dataclasses.replace(described, vision=None, patch_token=None)
    model = jax.eval_shape(lambda: Llama4(described, rngs=nnx.Rngs(0)))
    leaves = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert accounting.parameters(described).total == leaves


def test_visible_keys_is_the_mean_over_the_mask():
    text = config.apply(presets.tiny(), ["text.attention.chunk_size=4"]).text
    rows = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]  # keys each of ten queries sees in chunks of four
    assert accounting.visible_keys(text, Attention.CHUNKED, 10) == sum(rows) / 10
    assert accounting.visible_keys(text, Attention.GLOBAL, 10) == 5.5


def test_flops_are_those_that_the_compiler_counts():
    """One dense layer, so that XLA's own count has no loop, sort or padding in it."""
    described = config.apply(
        dataclasses.replace(presets.tiny(), vision=None, patch_token=None),
        ["text.num_layers=1", "text.moe.step=0", "text.embed_dim=256", "text.mlp_dim=512", "text.vocab_size=1024"],
    )
    length = 16
    model = jax.eval_shape(lambda: Llama4(described, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, length), "int32")
    counted = jax.jit(lambda m, t: m(t).logits).lower(model, tokens).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(length * accounting.forward_flops(described, length), rel=0.05)


def test_training_is_three_forward_passes():
    scout = presets.scout()
    assert accounting.training_flops(scout, 8192) == 3 * accounting.forward_flops(scout, 8192)
    # 2 FLOPs for each active weight but the embedding table, and a little for attention within one chunk.
    assert accounting.forward_flops(scout, 8192) == pytest.approx(2 * 16.14e9, rel=0.15)


def test_chunked_layers_stop_growing_at_their_chunk():
    scout = presets.scout()
    one_token = 2 * 8 * 128 * 2  # key and value, 8 heads of 128, two bytes
    assert accounting.cache_bytes(scout, 8192) == 48 * 8192 * one_token
    assert accounting.cache_bytes(scout, 1_000_000) == (36 * 8192 + 12 * 1_000_000) * one_token
    assert accounting.cache_bytes(scout, 100, batch=3) == 3 * 48 * 100 * one_token


def test_cache_formula_equals_the_cache_that_is_made():
    tiny = presets.tiny()
    model = jax.eval_shape(lambda: Llama4(tiny, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.init_cache(2, 100, "float32"))
    stored = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((cache.period, cache.tail))) * 4
    assert accounting.cache_bytes(tiny, 100, batch=2, dtype="float32") == stored
