"""Parameters, FLOPs and cache bytes of a configuration, as formulas: what a model costs before any of it exists.

Source: the layer shapes in `llama4_jax/model`, checked against the real parameter tree by the tests; FLOPs as in
Kaplan et al. 2020 (2 a multiply-add, 3 x forward for training), with the attention of each layer kind counted exactly.
"""

from __future__ import annotations

import dataclasses

from llama4_jax.config import (
    Attention,
    FeedForward,
    LayerKind,
    Llama4Config,
    MoeConfig,
    TextConfig,
    VisionConfig,
    layer_kinds,
)
from llama4_jax.config.lora import LoraConfig, matches

_PROJECTIONS = ("query", "key", "value", "output")
# By a cache's dtype: bytes of a number, and of the scale that a token's key or value has in each head.
_CACHED = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of weights. `total` is all of them; `active` those that one text token uses."""

    embedding: int
    unembedding: int  # 0 when tied
    attention: int  # projections of all layers, biases included
    dense: int  # feed-forward of the dense layers
    router: int  # selection biases included
    shared_experts: int
    routed_experts: int
    active_experts: int  # of the routed ones, the top_k that a token visits
    norms: int
    vision: int  # encoder, adapter and projector

    @property
    def total(self) -> int:
        return self._always + self.routed_experts + self.vision

    @property
    def active(self) -> int:
        """Text only: no vision tower, top_k routed experts a layer; both embeddings count, as in the model cards."""
        return self._always + self.active_experts

    @property
    def _always(self) -> int:
        return (
            self.embedding
            + self.unembedding
            + self.attention
            + self.dense
            + self.router
            + self.shared_experts
            + self.norms
        )


def parameters(config: Llama4Config) -> Parameters:
    """Counts the weights of the model that `config` describes."""
    text, moe = config.text, config.text.moe
    mixtures = sum(kind.feed_forward is FeedForward.MOE for kind in layer_kinds(text))
    expert = _swiglu(text.embed_dim, moe.expert_dim)
    return Parameters(
        embedding=text.vocab_size * text.embed_dim,
        unembedding=0 if text.tie_embeddings else text.vocab_size * text.embed_dim,
        attention=text.num_layers * _attention(text),
        dense=(text.num_layers - mixtures) * _swiglu(text.embed_dim, text.mlp_dim),
        router=mixtures * _router(text.embed_dim, moe),
        shared_experts=mixtures * expert,
        routed_experts=mixtures * moe.num_experts * expert,
        active_experts=mixtures * moe.top_k * expert,
        norms=(2 * text.num_layers + 1) * text.embed_dim,
        vision=_vision(config.vision, text.embed_dim) if config.vision else 0,
    )


def forward_flops(config: Llama4Config, length: int) -> float:
    """Mean floating-point operations a token of a text-only forward pass over one document of `length` tokens.

    A multiply-add is 2. Every weight that a token meets is used once, except that looking up an embedding costs
    nothing; attention is counted over the keys that the mask lets through, so a chunked layer stops growing at its
    chunk. Norms, softmax and activations, under a hundredth of the rest at real sizes, are left out.
    """
    text, count = config.text, parameters(config)
    lookup = 0 if text.tie_embeddings else count.embedding
    weights = count.active - lookup - count.norms
    width = text.attention.num_heads * text.attention.head_dim
    seen = sum(visible_keys(text, kind.attention, length) for kind in layer_kinds(text))
    return 2.0 * weights + 4.0 * width * seen  # scores and weighted values: 2 FLOPs each a key and head channel


def training_flops(config: Llama4Config, length: int) -> float:
    """The same for forward and backward without rematerialisation: the backward pass does each product twice."""
    return 3.0 * forward_flops(config, length)


def visible_keys(text: TextConfig, attention: Attention, length: int) -> float:
    """Keys that a query sees on average over a document of `length` tokens, itself included."""
    if attention is Attention.GLOBAL:
        return (length + 1) / 2
    chunk = text.attention.chunk_size
    full, rest = divmod(length, chunk)
    return (full * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * length)


def cache_bytes(config: Llama4Config, length: int, *, batch: int = 1, dtype: str = "bfloat16") -> int:
    """Bytes of the hybrid key/value cache: one chunk for each chunked layer, `length` slots for each global one.

    dtype: as for `init_cache`; int8 comes with scales. Raises ValueError for one whose bytes are not known here.
    """
    if dtype not in _CACHED:
        raise ValueError(f"a cache of {dtype} is not counted here; use one of {', '.join(_CACHED)}")
    attention, (number, scale) = config.text.attention, _CACHED[dtype]
    slot = 2 * attention.num_kv_heads * (attention.head_dim * number + scale)  # a key and a value
    slots = sum(
        min(attention.chunk_size, length) if kind.attention is Attention.CHUNKED else length
        for kind in layer_kinds(config.text)
    )
    return batch * slots * slot


def adapter_parameters(config: Llama4Config, adapters: LoraConfig) -> int:
    """Weights of the adapters that `adapters` puts on the model; targets name parameters, not single layers.

    Raises ValueError for a target that describes no parameter of the model, as `model.lora.attach` does.
    """
    layers = [_adapter_sides(config.text, kind) for kind in layer_kinds(config.text)]
    chosen = {
        pattern: {name for name in set().union(*layers) if matches(name, pattern)} for pattern in adapters.targets
    }
    for pattern, names in chosen.items():
        if not names:
            raise ValueError(
                f"target {pattern!r} describes no parameter that can have an adapter; this model has "
                f"{', '.join(sorted(set().union(*layers)))}"
            )
    named = set().union(*chosen.values())
    return adapters.rank * sum(sides for layer in layers for name, sides in layer.items() if name in named)


def _adapter_sides(text: TextConfig, kind: LayerKind) -> dict[str, int]:
    """Parameter of a layer -> the inputs and outputs, added up, between which adapters on it lie (see `nn.lora`)."""
    d, attention, moe = text.embed_dim, text.attention, text.moe
    queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    sides = {f"attention.{name}.kernel": d + width for name, width in zip(_PROJECTIONS, (queries, keys, keys, queries))}

    def swiglu(path: str, width: int) -> dict[str, int]:  # gate and up have adapters of their own
        return {f"feed_forward.{path}gate_up.kernel": 2 * (d + width), f"feed_forward.{path}down.kernel": width + d}

    if kind.feed_forward is FeedForward.DENSE:
        return sides | swiglu("", text.mlp_dim)
    sides |= swiglu("shared.", moe.expert_dim)
    sides["feed_forward.experts.gate_up"] = moe.num_experts * (d + 2 * moe.expert_dim)
    return sides | {"feed_forward.experts.down": moe.num_experts * (moe.expert_dim + d)}


def _swiglu(embed_dim: int, mlp_dim: int) -> int:
    return 3 * embed_dim * mlp_dim  # gate, up, down


def _attention(text: TextConfig) -> int:
    attention = text.attention
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_kv_heads * attention.head_dim
    weights = text.embed_dim * (2 * queries + 2 * keys)  # q and o, k and v
    return weights + (queries + 2 * keys + text.embed_dim if attention.bias else 0)


def _router(embed_dim: int, moe: MoeConfig) -> int:
    return embed_dim * moe.num_experts + (moe.num_experts if moe.selection_bias else 0)


def _vision(vision: VisionConfig, text_dim: int) -> int:
    d, f = vision.embed_dim, vision.mlp_dim
    patches = vision.grid**2
    embedding = vision.patch_dim * d + d + (patches + 1) * d  # patch kernel, class token, positions
    norm = 2 * d  # scale and bias
    block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * norm
    adapter = d * vision.shuffle**2 * vision.output_dim + vision.output_dim**2
    return embedding + 2 * norm + vision.num_layers * block + adapter + vision.output_dim * text_dim
