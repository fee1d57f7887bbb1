"""The shape of a Llama-4-class model, as frozen dataclasses.

Source: the published Llama 4 Scout and Maverick configurations (Hugging Face `config.json`, Meta `params.json`).
Everything that training or serving may vary without changing the function lives elsewhere.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math


class Attention(enum.Enum):
    """Which keys a layer's queries may see, besides causality."""

    CHUNKED = "chunked"  # only keys of the query's own chunk; rotary positions
    GLOBAL = "global"  # every earlier key; no rotary positions (NoPE)


class FeedForward(enum.Enum):
    DENSE = "dense"
    MOE = "moe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """All that distinguishes one decoder layer from another."""

    attention: Attention
    rope: bool  # rotate queries and keys by position
    qk_norm: bool  # weightless RMS norm of queries and keys, after RoPE
    temperature: bool  # scale queries by a slowly growing function of position
    feed_forward: FeedForward


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The `llama3` rule that stretches low rotary frequencies to a longer context."""

    factor: float  # slow frequencies are divided by this
    low_freq_factor: float  # wavelengths above original_length / low_freq_factor are stretched in full
    high_freq_factor: float  # wavelengths below original_length / high_freq_factor are left alone
    original_length: int  # context length, in tokens, that the unscaled frequencies were trained for

    def __post_init__(self):
        _positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_length")
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"RopeScaling: high_freq_factor={self.high_freq_factor} is below low_freq_factor="
                f"{self.low_freq_factor}; the blended band would be inside out. Swap them or make them equal."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention of the decoder, shared by chunked and global layers."""

    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; each serves num_heads / num_kv_heads query heads
    head_dim: int  # width of one head; need not be embed_dim / num_heads
    chunk_size: int  # tokens in a chunk of the chunked layers
    nope_interval: int = 4  # layers interval-1, 2*interval-1, ... are global without RoPE; 0: no such layer
    rope_theta: float = 500_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # None: plain rotary frequencies
    qk_norm: bool = True  # on layers with RoPE
    temperature_tuning: bool = True  # on global layers
    floor_scale: int = 8192  # tokens between steps of the temperature
    attn_scale: float = 0.1  # size of those steps
    bias: bool = False  # biases on the q, k, v and o projections

    def __post_init__(self):
        _positive(self, "num_heads", "num_kv_heads", "head_dim", "chunk_size", "rope_theta", "floor_scale")
        if self.nope_interval < 0:
            raise ValueError(f"nope_interval={self.nope_interval} must be 0 (no NoPE layer) or positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"use one of {_divisors(self.num_heads)} key/value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts feed-forward: top-k routed experts plus one shared expert."""

    num_experts: int  # routed experts
    expert_dim: int  # hidden width of each routed expert and of the shared one
    top_k: int = 1  # routed experts each token visits
    step: int = 1  # layers step-1, 2*step-1, ... are mixtures, the others dense; 0: all dense
    selection_bias: bool = False  # per-expert bias that steers selection only (never the score); see train.step

    def __post_init__(self):
        _positive(self, "num_experts", "expert_dim", "top_k")
        if self.step < 0:
            raise ValueError(f"moe.step={self.step} must be 0 (no mixture layer) or positive")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}; use at most that many")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    embed_dim: int  # width of the residual stream
    num_layers: int
    mlp_dim: int  # hidden width of dense feed-forward layers
    attention: AttentionConfig
    moe: MoeConfig
    norm_eps: float = 1e-5  # of RMS norms, QK norm included
    tie_embeddings: bool = False  # unembed with the embedding table
    context_length: int = 1_048_576  # longest cache that init_cache agrees to make, in tokens

    def __post_init__(self):
        _positive(self, "vocab_size", "embed_dim", "num_layers", "mlp_dim", "norm_eps", "context_length")

    @property
    def period(self) -> int:
        """Layers after which the pattern of layer kinds repeats."""
        return math.lcm(max(self.attention.nope_interval, 1), max(self.moe.step, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder and the adapter to the decoder's width."""

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    image_size: int  # side of one square tile, pixels
    patch_size: int  # side of one square patch, pixels
    output_dim: int  # width of the adapter's output, before the projection to the decoder
    shuffle: int = 2  # pixel shuffle: shuffle x shuffle patches become one token
    channels: int = 3
    rope_theta: float = 10_000.0  # base of the 2-D rotary frequencies

    def __post_init__(self):
        _positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.image_size % (self.patch_size * self.shuffle):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size * shuffle = "
                f"{self.patch_size * self.shuffle}; pixel shuffle needs a whole number of patch groups"
            )
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"vision embed_dim={self.embed_dim} over num_heads={self.num_heads} must give a head width that is "
                "a multiple of 4: 2-D RoPE splits each head into two axes of pairs"
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.patch_size**2 * self.channels

    @property
    def tokens_per_tile(self) -> int:
        """Decoder positions that one tile fills."""
        return (self.grid // self.shuffle) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config:
    """A whole model: decoder, optional vision tower, and the token ids that the model itself has to know."""

    text: TextConfig
    vision: VisionConfig | None = None
    patch_token: int | None = None  # placeholder whose embedding an image feature replaces
    image_start_token: int | None = None
    image_end_token: int | None = None
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()  # ids at which generation of a turn ends

    def __post_init__(self):
        if (self.vision is None) != (self.patch_token is None):
            raise ValueError(
                f"vision={'set' if self.vision else None} with patch_token={self.patch_token}: "
                "a model has both or neither; images need a placeholder id"
            )
        for name in ("patch_token", "image_start_token", "image_end_token", "bos_token"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.text.vocab_size:
                raise ValueError(f"{name}={value} is outside the vocabulary of {self.text.vocab_size}")


@functools.lru_cache(maxsize=64)
def layer_kinds(config: TextConfig) -> tuple[LayerKind, ...]:
    """The kind of each decoder layer, first to last. NoPE interval, MoE step and depth combine freely."""
    attention, moe = config.attention, config.moe

    def kind(layer: int) -> LayerKind:
        nope = _every(layer, attention.nope_interval)
        return LayerKind(
            attention=Attention.GLOBAL if nope else Attention.CHUNKED,
            rope=not nope,
            qk_norm=attention.qk_norm and not nope,
            temperature=attention.temperature_tuning and nope,
            feed_forward=FeedForward.MOE if _every(layer, moe.step) else FeedForward.DENSE,
        )

    return tuple(kind(layer) for layer in range(config.num_layers))


def _every(layer: int, interval: int) -> bool:
    return interval > 0 and (layer + 1) % interval == 0


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{type(config).__name__}.{name}={value} must be positive")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
