"""Layer kinds against the published table, presets, and validation."""

import dataclasses

import pytest

from llama4_jax import config
from llama4_jax.config import Attention, FeedForward, layer_kinds, presets


def letters(text: config.TextConfig) -> str:
    """A word for each layer: c chunked or G global, d dense or M mixture."""
    symbols = {Attention.CHUNKED: "c", Attention.GLOBAL: "G", FeedForward.DENSE: "d", FeedForward.MOE: "M"}
    return " ".join(symbols[kind.attention] + symbols[kind.feed_forward] for kind in layer_kinds(text))


def shape(*, layers: int, nope: int, step: int) -> config.TextConfig:
    text = presets.tiny().text
    return dataclasses.replace(
        text,
        num_layers=layers,
        attention=dataclasses.replace(text.attention, nope_interval=nope),
        moe=dataclasses.replace(text.moe, step=step),
    )


def test_scout_is_all_mixtures_and_every_fourth_layer_is_global():
    kinds = layer_kinds(presets.scout().text)
    assert len(kinds) == 48
    assert all(kind.feed_forward is FeedForward.MOE for kind in kinds)
    assert [i for i, kind in enumerate(kinds) if kind.attention is Attention.GLOBAL] == list(range(3, 48, 4))
    assert all(kind.qk_norm == kind.rope for kind in kinds)


def test_maverick_alternates_dense_first_and_has_no_qk_norm():
    kinds = layer_kinds(presets.maverick().text)
    assert [i for i, kind in enumerate(kinds) if kind.feed_forward is FeedForward.MOE] == list(range(1, 48, 2))
    assert [i for i, kind in enumerate(kinds) if kind.attention is Attention.GLOBAL] == list(range(3, 48, 4))
    assert not any(kind.qk_norm for kind in kinds)


def test_only_global_layers_have_temperature_and_only_chunked_ones_rope():
    for kind in layer_kinds(presets.maverick().text):
        assert kind.temperature == (kind.attention is Attention.GLOBAL)
        assert kind.rope == (kind.attention is Attention.CHUNKED)


@pytest.mark.parametrize(
    ("layers", "nope", "step", "expected", "period"),
    [
        (4, 4, 1, "cM cM cM GM", 4),
        (5, 4, 1, "cM cM cM GM cM", 4),
        (9, 4, 2, "cd cM cd GM cd cM cd GM cd", 4),
        (8, 3, 2, "cd cM Gd cM cd GM cd cM", 6),
        (3, 1, 1, "GM GM GM", 1),
        (3, 0, 2, "cd cM cd", 2),
        (3, 2, 0, "cd Gd cd", 2),
        (2, 0, 0, "cd cd", 1),
        (1, 4, 2, "cd", 4),
    ],
)
def test_interval_step_and_depth_combine_freely(layers, nope, step, expected, period):
    text = shape(layers=layers, nope=nope, step=step)
    assert letters(text) == expected
    assert text.period == period


def test_published_widths_of_scout_and_maverick():
    for preset, experts, step, scaled in ((presets.scout, 16, 1, True), (presets.maverick, 128, 2, False)):
        text = preset().text
        assert (text.embed_dim, text.num_layers, text.vocab_size, text.mlp_dim) == (5120, 48, 202_048, 16_384)
        attention = text.attention
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (40, 8, 128)
        assert (attention.chunk_size, attention.floor_scale, attention.attn_scale) == (8192, 8192, 0.1)
        assert (text.moe.num_experts, text.moe.expert_dim, text.moe.top_k, text.moe.step) == (experts, 8192, 1, step)
        scaling = attention.rope_scaling
        assert (scaling is not None) == scaled
        if scaling:
            factors = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length)
            assert factors == (16, 1, 1, 8192)


def test_a_336_pixel_tile_fills_144_positions():
    vision = presets.scout().vision
    assert (vision.grid, vision.patch_dim, vision.head_dim, vision.tokens_per_tile) == (24, 588, 88, 144)


def test_every_preset_has_fewer_than_twenty_fields_a_group():
    groups = (
        config.Llama4Config,
        config.TextConfig,
        config.AttentionConfig,
        config.MoeConfig,
        config.VisionConfig,
        config.RopeScaling,
    )
    assert all(len(dataclasses.fields(group)) < 20 for group in groups)


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.tiny().text.num_layers = 3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("text.num_layers=0", "TextConfig.num_layers=0 must be positive"),
        ("text.norm_eps=nan", "TextConfig.norm_eps=nan must be positive"),
        ("text.attention.num_kv_heads=3", r"use one of \[1, 2, 4\] key/value heads"),
        ("text.attention.head_dim=7", "head_dim=7 must be even: RoPE rotates pairs"),
        ("text.attention.nope_interval=-1", r"nope_interval=-1 must be 0 \(no NoPE layer\) or positive"),
        ("text.attention.rope_scaling.high_freq_factor=0.5", "high_freq_factor=0.5 is below low_freq_factor=1.0"),
        ("text.moe.top_k=5", "top_k=5 exceeds num_experts=4"),
        ("text.moe.step=-2", r"moe.step=-2 must be 0 \(no mixture layer\) or positive"),
        ("vision.image_size=18", r"image_size=18 is not a multiple of patch_size \* shuffle = 8"),
        ("vision.num_heads=16", "head width that is a multiple of 4"),
        ("vision=None", "vision=None with patch_token=127"),
        ("patch_token=None", "vision=set with patch_token=None"),
        ("patch_token=128", "patch_token=128 is outside the vocabulary of 128"),
        ("bos_token=-1", "bos_token=-1 is outside the vocabulary"),
    ],
)
def test_impossible_values_say_why(assignment, message):
    with pytest.raises(ValueError, match=message):
        config.apply(presets.tiny(), [assignment])
