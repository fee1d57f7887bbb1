"""Named model sizes. Each is a function; make variants with `dataclasses.replace` or `config.apply`."""

from __future__ import annotations

import dataclasses

from llama4_jax.config.model import (
    AttentionConfig,
    Llama4Config,
    MoeConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)


def scout() -> Llama4Config:
    """Llama 4 Scout: 109B parameters, 17B active; every layer a mixture of 16 experts; 10M tokens of context."""
    return Llama4Config(
        text=TextConfig(
            vocab_size=202_048,
            embed_dim=5120,
            num_layers=48,
            mlp_dim=16_384,
            attention=AttentionConfig(
                num_heads=40,
                num_kv_heads=8,
                head_dim=128,
                chunk_size=8192,
                rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192),
            ),
            moe=MoeConfig(num_experts=16, expert_dim=8192),
            context_length=10_485_760,
        ),
        vision=VisionConfig(
            embed_dim=1408,
            num_layers=34,
            num_heads=16,
            mlp_dim=5632,
            image_size=336,
            patch_size=14,
            output_dim=4096,
        ),
        patch_token=200_092,
        image_start_token=200_080,
        image_end_token=200_081,
        bos_token=200_000,
        stop_tokens=(200_001, 200_007, 200_008),
    )


def maverick() -> Llama4Config:
    """Llama 4 Maverick: 400B parameters, 17B active; every second layer a mixture of 128 experts; 1M tokens."""
    config = scout()
    text = dataclasses.replace(
        config.text,
        attention=dataclasses.replace(config.text.attention, rope_scaling=None, qk_norm=False),
        moe=MoeConfig(num_experts=128, expert_dim=8192, step=2),
        context_length=1_048_576,
    )
    return dataclasses.replace(config, text=text)


def nano() -> Llama4Config:
    """The whole architecture at a size that learns on a laptop's CPU in minutes; vocabulary set by its tokenizer."""
    return Llama4Config(
        text=TextConfig(
            vocab_size=4096,
            embed_dim=128,
            num_layers=4,
            mlp_dim=256,
            attention=AttentionConfig(
                num_heads=4, num_kv_heads=2, head_dim=32, chunk_size=64, rope_theta=10_000.0, floor_scale=64
            ),
            moe=MoeConfig(num_experts=8, expert_dim=128),
            context_length=65_536,
        ),
        vision=VisionConfig(
            embed_dim=128, num_layers=2, num_heads=4, mlp_dim=256, image_size=48, patch_size=8, output_dim=256
        ),
        patch_token=0,
    )


def tiny() -> Llama4Config:
    """For tests: two periods and a leftover layer, chunks of 16 tokens, both feed-forward kinds, vision."""
    return Llama4Config(
        text=TextConfig(
            vocab_size=128,
            embed_dim=32,
            num_layers=9,
            mlp_dim=48,
            attention=AttentionConfig(
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                chunk_size=16,
                floor_scale=8,
                rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64),
            ),
            moe=MoeConfig(num_experts=4, expert_dim=24, top_k=2, step=2),
            context_length=4096,
        ),
        vision=VisionConfig(
            embed_dim=32, num_layers=2, num_heads=2, mlp_dim=48, image_size=16, patch_size=4, output_dim=24
        ),
        patch_token=127,
        image_start_token=120,
        image_end_token=121,
    )


def bench_151m() -> Llama4Config:
    """Text only, 151M parameters, all layers mixtures: the model that `make bench` times against Hugging Face."""
    return Llama4Config(
        text=TextConfig(
            vocab_size=32_000,
            embed_dim=512,
            num_layers=8,
            mlp_dim=2048,
            attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=64, chunk_size=8192),
            moe=MoeConfig(num_experts=8, expert_dim=1024),
        )
    )


PRESETS = {preset.__name__: preset for preset in (scout, maverick, nano, tiny, bench_151m)}
