"""The numpy oracle equals Hugging Face, and the model equals the oracle on configurations that nobody chose."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import hf
from llama4_jax.config import AttentionConfig, Llama4Config, MoeConfig, RopeScaling, TextConfig, VisionConfig
from llama4_jax.model import Llama4
from llama4_jax.testing import goldens, oracle

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
NAMES = sorted(folder.name for folder in GOLDENS.iterdir() if folder.is_dir())
TOLERANCE = 2e-4  # as against Hugging Face, see tests/parity/test_goldens.py
MARGIN = 1e-4  # two experts whose logits are closer may change places by rounding
TIME, VOCAB, PATCH = 19, 23, 22


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_the_reference(name, tmp_path):
    golden = goldens.load(GOLDENS / name, tmp_path)
    weights = load_file(golden.checkpoint / "model.safetensors")
    trace = oracle.forward(weights, hf.read_config(golden.checkpoint), golden.arrays["input_ids"], golden.images)
    pairs = {"logits": trace.logits, "hs.final_norm": trace.final_norm}
    pairs |= {f"hs.layer{i}.out": x for i, x in enumerate(trace.layers)}
    pairs |= {f"hs.vision.layer{i}.out": x for i, x in enumerate(trace.vision)}
    for key, value in pairs.items():
        np.testing.assert_allclose(value, golden.arrays[key], rtol=0, atol=TOLERANCE, err_msg=key)


@st.composite
def text_configs(draw) -> TextConfig:
    kv_heads, experts = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    scaling = RopeScaling(
        factor=draw(st.sampled_from([2.0, 16.0])),
        low_freq_factor=1.0,
        high_freq_factor=draw(st.sampled_from([1.0, 4.0])),
        original_length=draw(st.integers(8, 64)),
    )
    return TextConfig(
        vocab_size=VOCAB,
        embed_dim=draw(st.sampled_from([8, 12, 20])),
        num_layers=draw(st.integers(1, 7)),
        mlp_dim=draw(st.integers(5, 16)),
        attention=AttentionConfig(
            num_heads=kv_heads * draw(st.integers(1, 3)),
            num_kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([2, 6, 8])),
            chunk_size=draw(st.integers(1, 9)),
            nope_interval=draw(st.integers(0, 4)),
            rope_theta=draw(st.sampled_from([10.0, 10_000.0])),
            rope_scaling=draw(st.sampled_from([None, scaling])),
            qk_norm=draw(st.booleans()),
            temperature_tuning=draw(st.booleans()),
            floor_scale=draw(st.integers(1, 8)),
            attn_scale=0.3,
            bias=draw(st.booleans()),
        ),
        moe=MoeConfig(
            num_experts=experts,
            expert_dim=draw(st.integers(3, 9)),
            top_k=draw(st.integers(1, experts)),
            step=draw(st.integers(0, 3)),
        ),
        norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def vision_configs(draw) -> VisionConfig:
    shuffle, patch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return VisionConfig(
        embed_dim=heads * draw(st.sampled_from([4, 8])),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_dim=draw(st.integers(5, 12)),
        image_size=patch * shuffle * draw(st.integers(1, 2)),
        patch_size=patch,
        output_dim=draw(st.integers(3, 8)),
        shuffle=shuffle,
    )


@st.composite
def rows_of_documents(draw) -> np.ndarray:
    """Segments [2 t]: documents of any length one after another, 0 for padding before, between or after them."""
    rows = []
    for _ in range(2):
        lengths = draw(st.lists(st.integers(1, TIME), min_size=1, max_size=3))
        numbers = draw(st.permutations(range(4)))
        row = [number for number, length in zip(numbers, lengths) for _ in range(length)]
        rows.append((row + [numbers[3]] * TIME)[:TIME])
    return np.array(rows, np.int32)


def agree(config: Llama4Config, tokens, images=None, segments=None) -> None:
    weights = goldens.draw_all(hf.tensor_shapes(config), seed=3)
    trace = oracle.forward(weights, config, tokens, images, segments=segments)
    top_k = config.text.moe.top_k
    for logits in trace.router_logits.values():
        ordered = np.sort(logits, axis=-1)
        assume(top_k == logits.shape[-1] or np.min(ordered[..., -top_k] - ordered[..., -top_k - 1]) > MARGIN)
    model = checkpoint.from_tensors(config, weights)
    quickly = {"xla_backend_optimization_level": 0}  # it runs once
    logits = jax.jit(Llama4.__call__, compiler_options=quickly)(model, tokens, images, segments=segments).logits
    present = np.ones(tokens.shape, bool) if segments is None else segments != 0
    np.testing.assert_allclose(np.asarray(logits)[present], trace.logits[present], rtol=0, atol=TOLERANCE)


@settings(max_examples=7, derandomize=True, deadline=None)
@given(text_configs(), rows_of_documents(), st.integers(0, 1000))
def test_model_equals_the_oracle_on_packed_rows(text, segments, seed):
    tokens = np.random.RandomState(seed).randint(0, VOCAB, segments.shape).astype(np.int32)
    agree(Llama4Config(text=text), tokens, segments=segments)


@settings(max_examples=3, derandomize=True, deadline=None)
@given(text_configs(), vision_configs(), st.integers(0, 1000))
def test_model_equals_the_oracle_with_images(text, vision, seed):
    random = np.random.RandomState(seed)
    tokens = random.randint(0, PATCH, (2, TIME)).astype(np.int32)
    tiles = max(1, 8 // vision.tokens_per_tile)
    tokens.reshape(-1)[random.permutation(2 * TIME)[: tiles * vision.tokens_per_tile]] = PATCH
    shape = (tiles, vision.image_size, vision.image_size, vision.channels)
    images = random.uniform(-1, 1, shape).astype(np.float32)
    agree(Llama4Config(text=text, vision=vision, patch_token=PATCH), tokens, images)
