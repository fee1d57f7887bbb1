"""The goldens have teeth: every mistake that implementations of Llama 4 have made moves the logits well past the tolerance.

Each mistake is made on purpose in the numpy oracle, which without it equals the golden (tests/properties/test_oracle.py).
"""

import math
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama4_jax.checkpoint import hf
from llama4_jax.testing import goldens, oracle

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 2e-4  # as in test_goldens.py


def unscaled(config):
    return [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]


def half_split(head, angles):
    first, second = np.split(head, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos])


def score_on_output(part, top_k, x, router_logits):
    gate_up, down = part["feed_forward.experts.gate_up_proj"], part["feed_forward.experts.down_proj"]
    out = oracle.swiglu(part, "feed_forward.shared_expert.", x)
    for row, column in np.ndindex(x.shape[:2]):
        logits = router_logits[row, column]
        for expert in np.argsort(-logits)[:top_k]:
            gate, up = np.split(x[row, column] @ gate_up[expert], 2)
            out[row, column] += oracle.sigmoid(logits[expert]) * ((gate * oracle.sigmoid(gate) * up) @ down[expert])
    return out


def softmax_scores(right):
    def mixture(part, top_k, x, router_logits):
        shifted = np.exp(router_logits - router_logits.max(axis=-1, keepdims=True))
        share = shifted / shifted.sum(axis=-1, keepdims=True)
        return right(part, top_k, x, np.log(share) - np.log1p(-share))  # whose sigmoids are the softmax

    return mixture


def swapped_halves(right):
    def mixture(part, top_k, x, router_logits):
        name = "feed_forward.experts.gate_up_proj"
        return right({**part, name: np.roll(part[name], part[name].shape[-1] // 2, axis=-1)}, top_k, x, router_logits)

    return mixture


def sliding_window(query, key, positions, segments, chunk_size):
    return 0 <= positions[query] - positions[key] < (chunk_size or math.inf)


def rows_for_columns(right):
    return lambda config, place: [*np.roll(right(config, place), config.head_dim // 4)]


def counted_from_zero(config, place):
    half = config.head_dim // 2
    row, column = divmod(place, config.grid)
    frequencies = [config.rope_theta ** (-2 * k / half) for k in range(half // 2)]
    return [0.0] * half if place == config.grid**2 else [n * f for n in (column, row) for f in frequencies]


def tanh_gelu(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def columns_first(right):
    def shuffle(x, grid, side):
        return right(x.reshape(-1, grid, grid, x.shape[-1]).swapaxes(1, 2).reshape(x.shape), grid, side)

    return shuffle


MISTAKES = {
    "no_temperature": ("scout", "temperature", lambda right: lambda config, position: 1.0),
    "temperature_a_position_late": ("scout", "temperature", lambda right: lambda config, p: right(config, p - 1)),
    "no_chunks": ("maverick", "sees", lambda right: lambda *where: right(*where[:-1], None)),
    "sliding_window_for_chunks": ("maverick", "sees", lambda right: sliding_window),
    "tiny_norm_epsilon": ("scout", "rms_norm", lambda right: lambda x, eps: right(x, 1e-6)),
    "unscaled_rope_smooth": ("top2", "rope_frequencies", lambda right: unscaled),
    "unscaled_rope_scout": ("scout", "rope_frequencies", lambda right: unscaled),
    "half_split_rope": ("maverick", "rotate", lambda right: half_split),
    "score_on_expert_output": ("scout", "mixture", lambda right: score_on_output),
    "softmax_scores": ("top2", "mixture", softmax_scores),
    "gate_and_up_swapped": ("scout", "mixture", swapped_halves),
    "top_1_for_top_2": ("top2", "mixture", lambda right: lambda part, k, x, logits: right(part, 1, x, logits)),
    "image_rows_for_columns": ("vision", "vision_angles", rows_for_columns),
    "image_positions_from_zero": ("vision", "vision_angles", lambda right: counted_from_zero),
    "tanh_gelu": ("vision", "gelu", lambda right: tanh_gelu),
    "pixel_shuffle_columns_first": ("vision", "shuffle_pixels", columns_first),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_moves_the_logits(mistake, monkeypatch, tmp_path):
    name, function, wrong = MISTAKES[mistake]
    golden = goldens.load(GOLDENS / name, tmp_path)
    weights, config = load_file(golden.checkpoint / "model.safetensors"), hf.read_config(golden.checkpoint)
    monkeypatch.setattr(oracle, function, wrong(getattr(oracle, function)))
    logits = oracle.forward(weights, config, golden.arrays["input_ids"], golden.images).logits
    assert np.abs(logits - golden.arrays["logits"]).max() > 10 * TOLERANCE
