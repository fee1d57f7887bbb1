"""Llama 4 once more, in the slowest and plainest way: numpy, float64, a loop wherever a loop is clearest.

Written from the published description of the model and sharing no code with it, so that a mistake would have to be made
twice to go unseen. Weights come as a dict under Hugging Face's tensor names. Only for tiny models.

Source: the papers of each part (RoPE: Su et al. 2021; SwiGLU: Shazeer 2020; iRoPE and early fusion: Meta's Llama 4
release, 2025) and the published configurations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from llama4_jax.config import (
    Attention,
    AttentionConfig,
    FeedForward,
    LayerKind,
    Llama4Config,
    VisionConfig,
    layer_kinds,
)

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass
class Trace:
    """Everything that `forward` computed on the way; float64.

    logits [b t v]; layers: the residual stream [b t d] after each decoder layer; final_norm [b t d];
    router_logits: layer number -> [b t e]; vision: [n p+1 d] after each encoder layer; features [n tokens d_text].
    """

    logits: np.ndarray | None = None
    final_norm: np.ndarray | None = None
    layers: list[np.ndarray] = dataclasses.field(default_factory=list)
    router_logits: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    vision: list[np.ndarray] = dataclasses.field(default_factory=list)
    features: np.ndarray | None = None


def forward(weights: Weights, config: Llama4Config, tokens, images=None, positions=None, segments=None) -> Trace:
    """The whole model. tokens [b t]; images [n h w c] in [-1, 1]; positions, segments [b t], 0 marking padding."""
    weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    text = {name.removeprefix("language_model."): weight for name, weight in weights.items()}
    tokens = np.asarray(tokens)
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments)
    positions = count_positions(segments) if positions is None else np.asarray(positions)

    trace = Trace()
    x = text["model.embed_tokens.weight"][tokens]  # [b t d]
    if images is not None:
        trace.features = vision_tower(weights, config.vision, np.asarray(images, np.float64), trace)
        queue = iter(trace.features.reshape(-1, x.shape[-1]))
        for row, column in np.argwhere(tokens == config.patch_token):
            x[row, column] = next(queue)

    eps = config.text.norm_eps
    for layer, kind in enumerate(layer_kinds(config.text)):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): weight for name, weight in text.items() if name.startswith(prefix)}
        normed = rms_norm(x, eps) * part["input_layernorm.weight"]
        x = x + attention(part, config.text.attention, kind, eps, normed, positions, segments)
        normed = rms_norm(x, eps) * part["post_attention_layernorm.weight"]
        if kind.feed_forward is FeedForward.MOE:
            trace.router_logits[layer] = normed @ part["feed_forward.router.weight"].T
            x = x + mixture(part, config.text.moe.top_k, normed, trace.router_logits[layer])
        else:
            x = x + swiglu(part, "feed_forward.", normed)
        trace.layers.append(x)

    trace.final_norm = rms_norm(x, eps) * text["model.norm.weight"]
    trace.logits = trace.final_norm @ text.get("lm_head.weight", text["model.embed_tokens.weight"]).T
    return trace


def count_positions(segments: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... from the first token of each document, [b t]."""
    positions = np.zeros_like(segments)
    for row in range(segments.shape[0]):
        for column in range(1, segments.shape[1]):
            if segments[row, column] == segments[row, column - 1]:
                positions[row, column] = positions[row, column - 1] + 1
    return positions


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    grown = np.exp(x - x.max())
    return grown / grown.sum()


def rope_frequencies(config: AttentionConfig) -> list[float]:
    """Radians a token for each pair of a head's dimensions, after the `llama3` stretching."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * pair / config.head_dim)
        scaling = config.rope_scaling
        if scaling:
            turns = scaling.original_length * frequency / (2 * math.pi)  # full turns within the original context
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns <= scaling.high_freq_factor and scaling.high_freq_factor > scaling.low_freq_factor:
                kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
        frequencies.append(frequency)
    return frequencies


def rotate(head: np.ndarray, angles) -> np.ndarray:
    """Turns neighbours (2j, 2j+1) of head [h] by angles[j]."""
    turned = np.empty_like(head)
    for j, angle in enumerate(angles):
        even, odd = head[2 * j], head[2 * j + 1]
        turned[2 * j] = even * math.cos(angle) - odd * math.sin(angle)
        turned[2 * j + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return turned


def temperature(config: AttentionConfig, position: int) -> float:
    return 1 + config.attn_scale * math.log(1 + math.floor((position + 1) / config.floor_scale))


def sees(query: int, key: int, positions, segments, chunk_size: int | None) -> bool:
    """May the token in column `query` of a row attend to the one in column `key`?"""
    if segments[query] == 0 or segments[query] != segments[key] or positions[key] > positions[query]:
        return False
    return chunk_size is None or positions[key] // chunk_size == positions[query] // chunk_size


def attention(
    part: Weights, config: AttentionConfig, kind: LayerKind, eps: float, x, positions, segments
) -> np.ndarray:
    """Self-attention of one decoder layer; x [b t d] is normed already."""

    def project(name: str, heads: int) -> np.ndarray:
        flat = x @ part[f"self_attn.{name}.weight"].T + part.get(f"self_attn.{name}.bias", 0)
        return flat.reshape(*x.shape[:2], heads, config.head_dim)

    queries, keys = project("q_proj", config.num_heads), project("k_proj", config.num_kv_heads)
    values = project("v_proj", config.num_kv_heads)
    frequencies = rope_frequencies(config)
    for heads in (queries, keys):
        for row, column, head in np.ndindex(heads.shape[:3]):
            if kind.rope:
                angles = [positions[row, column] * frequency for frequency in frequencies]
                heads[row, column, head] = rotate(heads[row, column, head], angles)
            if kind.qk_norm:
                heads[row, column, head] = rms_norm(heads[row, column, head], eps)
    chunk_size = config.chunk_size if kind.attention is Attention.CHUNKED else None
    shared = config.num_heads // config.num_kv_heads  # query heads to a key/value head
    mixed = np.zeros_like(queries)
    for row, column in np.ndindex(x.shape[:2]):
        where = positions[row], segments[row]
        seen = [other for other in range(x.shape[1]) if sees(column, other, *where, chunk_size)]
        for head in range(config.num_heads if seen else 0):
            query = queries[row, column, head]
            if kind.temperature:
                query = query * temperature(config, positions[row, column])
            weights = softmax(keys[row, seen, head // shared] @ query / math.sqrt(config.head_dim))
            mixed[row, column, head] = weights @ values[row, seen, head // shared]
    flat = mixed.reshape(*x.shape[:2], -1)
    return flat @ part["self_attn.o_proj.weight"].T + part.get("self_attn.o_proj.bias", 0)


def swiglu(part: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    gate, up = x @ part[prefix + "gate_proj.weight"].T, x @ part[prefix + "up_proj.weight"].T
    return (gate * sigmoid(gate) * up) @ part[prefix + "down_proj.weight"].T


def mixture(part: Weights, top_k: int, x: np.ndarray, router_logits: np.ndarray) -> np.ndarray:
    """The shared expert plus each token's best experts, each fed the token TIMES the sigmoid of its logit."""
    gate_up, down = part["feed_forward.experts.gate_up_proj"], part["feed_forward.experts.down_proj"]
    width = gate_up.shape[-1] // 2
    out = swiglu(part, "feed_forward.shared_expert.", x)
    for row, column in np.ndindex(x.shape[:2]):
        logits = router_logits[row, column]
        for expert in np.argsort(-logits, kind="stable")[:top_k]:
            hidden = (sigmoid(logits[expert]) * x[row, column]) @ gate_up[expert]
            gate, up = hidden[:width], hidden[width:]
            out[row, column] += (gate * sigmoid(gate) * up) @ down[expert]
    return out


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def vision_tower(weights: Weights, config: VisionConfig, images: np.ndarray, trace: Trace) -> np.ndarray:
    """images [n h w c] to features [n tokens d_text]."""
    size, grid = config.patch_size, config.grid
    tiles = []
    for image in images:
        patches = [  # row by row; inside a patch channel, then y, then x
            image[y * size : (y + 1) * size, x * size : (x + 1) * size].transpose(2, 0, 1).ravel()
            for y in range(grid)
            for x in range(grid)
        ]
        embedded = np.stack(patches) @ weights["vision_model.patch_embedding.linear.weight"].T
        tiles.append(np.vstack([embedded, weights["vision_model.class_embedding"]]))  # the class token comes last
    x = np.stack(tiles) + weights["vision_model.positional_embedding_vlm"]
    x = layer_norm(x, weights, "vision_model.layernorm_pre")
    for layer in range(config.num_layers):
        prefix = f"vision_model.model.layers.{layer}."
        part = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        x = x + vision_attention(part, config, layer_norm(x, part, "input_layernorm"))
        hidden = layer_norm(x, part, "post_attention_layernorm") @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
        x = x + gelu(hidden) @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
        trace.vision.append(x)
    x = layer_norm(x, weights, "vision_model.layernorm_post")[:, :-1]
    x = shuffle_pixels(x, grid, config.shuffle)
    for name in ("fc1", "fc2"):
        x = gelu(x @ weights[f"vision_model.vision_adapter.mlp.{name}.weight"].T)
    return x @ weights["multi_modal_projector.linear_1.weight"].T


def vision_attention(part: Weights, config: VisionConfig, x: np.ndarray) -> np.ndarray:
    """Every position sees every other. x [n p+1 d]."""

    def project(name: str) -> np.ndarray:
        flat = x @ part[f"self_attn.{name}.weight"].T + part[f"self_attn.{name}.bias"]
        return flat.reshape(*x.shape[:2], config.num_heads, config.head_dim)

    queries, keys, values = project("q_proj"), project("k_proj"), project("v_proj")
    for heads in (queries, keys):
        for tile, place, head in np.ndindex(heads.shape[:3]):
            heads[tile, place, head] = rotate(heads[tile, place, head], vision_angles(config, place))
    mixed = np.empty_like(queries)
    for tile, place, head in np.ndindex(queries.shape[:3]):
        weights = softmax(keys[tile, :, head] @ queries[tile, place, head] / math.sqrt(config.head_dim))
        mixed[tile, place, head] = weights @ values[tile, :, head]
    flat = mixed.reshape(x.shape)
    return flat @ part["self_attn.o_proj.weight"].T + part["self_attn.o_proj.bias"]


def vision_angles(config: VisionConfig, place: int) -> list[float]:
    """2-D rotary angles: the first half of the pairs turns with the column, the second with the row, both from 1."""
    half = config.head_dim // 2
    frequencies = [config.rope_theta ** (-2 * k / half) for k in range(half // 2)]
    if place == config.grid**2:  # the class token stands nowhere
        return [0.0] * half
    row, column = divmod(place, config.grid)
    return [(column + 1) * f for f in frequencies] + [(row + 1) * f for f in frequencies]


def shuffle_pixels(x: np.ndarray, grid: int, side: int) -> np.ndarray:
    """Each side x side square of patches becomes one token with their features one after another."""
    squares = range(0, grid, side)
    return np.stack(
        [
            np.concatenate([x[:, (y + dy) * grid + (c + dx)] for dy in range(side) for dx in range(side)], axis=-1)
            for y in squares
            for c in squares
        ],
        axis=1,
    )
