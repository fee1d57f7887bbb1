"""Memory that a run needs, in closed form: weights, optimiser, gradients, key/value cache and activations.

Nothing is compiled and the answer is instant, so it says less than a compiled program does: it is the sum of what has to
be there at once, for one device or cut evenly over several. For one device it is within 10 % of the peak that the TPU
compiler states (`tests/plan/test_memory.py`); what several exchange and hold twice for it is `plan`'s to compile.
Text only: pictures add little beside a long context, and the vision tower's weights are counted.

Low bits are closed form alone so far: no int8 or int4 program exists, and it is assumed that one multiplies with weights
as they are stored, without a copy of them in more bits.

Source: the layers in `llama4_jax/nn` and what their gradients keep; counts of weights in `model/accounting.py`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from llama4_jax.config import Attention, FeedForward, LayerKind, Llama4Config, TextConfig, layer_kinds
from llama4_jax.config.lora import LoraConfig
from llama4_jax.config.train import REMAT, TrainConfig
from llama4_jax.model import accounting

GIB = 2**30
USABLE = 0.92  # of a device's memory: the rest is the driver's, the compiled program's, and room between buffers
MOST_CHIPS = 2**16
_MOMENTS = 8  # bytes a trained weight: Adam's two means, float32
_MASTER = 4  # bytes a trained weight, float32


class Scope(enum.Enum):
    """Which weights low bits apply to. Norms, biases, routers, the embedding table and the vision tower never are."""

    ALL = "all"  # attention, feed-forward of all kinds, the output matrix
    EXPERTS = "experts"  # routed experts alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How frozen weights are stored: those in `scope` in `bits` bits and with scales, all others in bfloat16.

    Raises ValueError for a number of bits that no weights are stored in.
    """

    bits: int = 16  # 16 (bfloat16, no scales), 8 or 4
    scope: Scope = Scope.ALL
    group: int = 128  # numbers, along a matrix's inputs, that share a scale
    scale_bits: int = 16  # bfloat16

    def __post_init__(self):
        if self.bits not in (4, 8, 16):
            raise ValueError(f"Storage.bits={self.bits}; use 4 (int4), 8 (int8) or 16 (bfloat16)")
        if self.group < 1:
            raise ValueError(f"Storage.group={self.group}; wanted 1 or more numbers a scale, 32 to 256 are usual")

    @property
    def bits_per_weight(self) -> float:
        """Of a weight in `scope`, its share of a scale included: 4.125 for int4 in groups of 128."""
        return self.bits + (self.scale_bits / self.group if self.bits < 16 else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes by kind, of the whole run. All but `workspace` is cut over devices, `workspace` is on each of several."""

    weights: float  # as the run holds them: stored ones, or float32 master weights
    optimizer: float = 0.0
    gradients: float = 0.0  # and the copy of trained weights in the compute dtype
    cache: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0  # weights of one layer, gathered where it is computed

    def per_chip(self, chips: int) -> float:
        """Bytes on each of `chips` devices that share everything evenly."""
        whole = self.weights + self.optimizer + self.gradients + self.cache + self.activations
        return whole / chips + (self.workspace if chips > 1 else 0.0)


def weight_bytes(config: Llama4Config, storage: Storage) -> float:
    """Bytes of all weights as `storage` keeps them."""
    low = _in_scope(config, storage.scope)
    return (low * storage.bits_per_weight + (accounting.parameters(config).total - low) * 16) / 8


def serve(
    config: Llama4Config, storage: Storage, *, batch: int, context: int, prompt: int = 2048, cache: str = "bfloat16"
) -> Need:
    """Generation for `batch` rows of up to `context` tokens, of which at most `prompt` are read at once.

    Layers stand alone, as `infer.prepare` lays them out: a scanned cache would be there twice or three times.
    cache: its dtype; int8 comes with scales.
    Raises ValueError for a context that no cache of this model is made for.
    """
    if context > config.text.context_length:
        raise ValueError(
            f"context={context}, but context_length={config.text.context_length}; ask for at most that many tokens, or "
            "raise it with text.context_length"
        )
    return Need(
        weights=weight_bytes(config, storage),
        cache=accounting.cache_bytes(config, context, batch=batch, dtype=cache),
        activations=max(_forward(config.text, batch, 1, context), _forward(config.text, batch, prompt, context)),
    )


def train(config: Llama4Config, settings: TrainConfig, *, batch: int, length: int) -> Need:
    """An optimiser step of all weights on `batch` rows of `length` tokens, with AdamW: 12 bytes a weight, and more."""
    number = 2 if settings.compute_dtype == "bfloat16" else 4
    weights = accounting.parameters(config).total
    copy = number if number < _MASTER else 0
    return Need(
        weights=_MASTER * weights,
        optimizer=_MOMENTS * weights,
        gradients=(number + copy) * weights,
        activations=_training(config.text, settings, batch * length, number),
        workspace=number * _one_layer(config),
    )


def qat(config: Llama4Config, settings: TrainConfig, storage: Storage, *, batch: int, length: int) -> Need:
    """The same with weights rounded to `storage` in each forward pass: the rounded ones are the compute copy.

    Rounding has no gradient of its own (straight-through), so that scales are all that it adds.
    """
    plain = train(config, settings, batch=batch, length=length)
    scales = _in_scope(config, storage.scope) * (storage.bits_per_weight - storage.bits) / 8
    return dataclasses.replace(plain, gradients=plain.gradients + scales)


def lora(
    config: Llama4Config,
    settings: TrainConfig,
    storage: Storage,
    adapters: LoraConfig,
    *,
    batch: int,
    length: int,
) -> Need:
    """A step of low-rank adapters alone: the base is frozen as `storage` keeps it, with no gradient and no moments."""
    number = 2 if settings.compute_dtype == "bfloat16" else 4
    weights = accounting.adapter_parameters(config, adapters)
    gathered = storage.bits_per_weight if storage.scope is Scope.ALL else 16
    return Need(
        weights=weight_bytes(config, storage) + _MASTER * weights,
        optimizer=_MOMENTS * weights,
        gradients=_MASTER * weights,
        activations=_training(config.text, settings, batch * length, number),
        workspace=_one_layer(config) * gathered / 8,
    )


def chips_needed(need: Need, memory: float, usable: float = USABLE) -> int | None:
    """Devices of `memory` bytes, a power of two, among which a run fits; None if no number up to 65,536 does."""
    chips = 1
    while need.per_chip(chips) > usable * memory:
        chips *= 2
        if chips > MOST_CHIPS:
            return None
    return chips


def longest(need: Callable[[int], Need], memory: float, limit: int, usable: float = USABLE) -> int:
    """The most tokens, up to `limit`, with which `need(tokens)` fits one device of `memory` bytes; 0 if none do."""
    fits, fails = 0, limit + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if need(middle).per_chip(1) <= usable * memory:
            fits = middle
        else:
            fails = middle
    return fits


def kept_bytes(text: TextConfig, number: int) -> float:
    """Mean bytes a token that the gradient of a layer keeps, in numbers of `number` bytes."""
    kinds = layer_kinds(text)
    return number * sum(_saved(text, kind) for kind in kinds) / len(kinds)


def kept_between(text: TextConfig, settings: TrainConfig, tokens: int, number: int) -> float:
    """Bytes that `tokens` tokens keep from forward to backward: each layer's input, and what the policy names."""
    names, entries = REMAT[settings.remat], number * tokens * text.embed_dim * text.num_layers
    if names is None:
        return entries + sum(_layers(text, tokens, number))
    return entries + number * tokens * sum(_named(text, kind, names) for kind in layer_kinds(text))


def _in_scope(config: Llama4Config, scope: Scope) -> int:
    count = accounting.parameters(config)
    if scope is Scope.EXPERTS:
        return count.routed_experts
    return count.attention + count.dense + count.shared_experts + count.routed_experts + count.unembedding


def _one_layer(config: Llama4Config) -> float:
    """Weights of the largest layer without its routed experts, which stay where they are."""
    count, text = accounting.parameters(config), config.text
    mixtures = sum(kind.feed_forward is FeedForward.MOE for kind in layer_kinds(text))
    dense = count.dense / max(text.num_layers - mixtures, 1)
    return count.attention / text.num_layers + max(dense, count.shared_experts / max(mixtures, 1))


def _forward(text: TextConfig, batch: int, new: int, context: int) -> float:
    """Bytes alive at the widest point of a forward pass of `new` tokens a row with a cache of `context` slots."""
    attention, number = text.attention, 2
    rows = batch * min(new, context)
    heads = 2 * attention.num_heads * attention.head_dim + 2 * _kv_width(text)
    wide = max(heads, *(_hidden(text, kind)[0] * 3 for kind in layer_kinds(text)))
    logits = 4 * batch * text.vocab_size
    # One new token: scores, their mask and their softmax in float32, over the longest cache; more are read in blocks.
    scores = 3 * 4 * batch * attention.num_heads * context if new == 1 else 0
    chunked = any(kind.attention is Attention.CHUNKED for kind in layer_kinds(text))
    joined = 2 * number * batch * _kv_width(text) * (min(attention.chunk_size, context) + new) if chunked else 0
    return number * rows * (3 * text.embed_dim + wide) + logits + scores + (joined if new > 1 else 0)


def _training(text: TextConfig, settings: TrainConfig, tokens: int, number: int) -> float:
    """Bytes of activations at the widest point of a step over `tokens` tokens, in numbers of `number` bytes."""
    kinds = layer_kinds(text)
    backward = tokens * max(_backward(text, kind, number) for kind in kinds)
    logits = min(tokens * text.vocab_size, settings.logits_limit) * (4 + number)
    between = kept_between(text, settings, tokens, number)
    if REMAT[settings.remat] is None:
        return between + max(backward, logits)
    if settings.kept_in == "host":  # but for what the layer at work reads
        between /= len(kinds)
    return between + max(max(_layers(text, tokens, number)) + backward, logits)


def _layers(text: TextConfig, tokens: int, number: int) -> list[float]:
    """Bytes that the gradient of each layer keeps, besides the layer's input, of `tokens` tokens."""
    sums = 4 * tokens * text.attention.num_heads  # of the softmax, their logarithms in float32
    return [number * tokens * _saved(text, kind) + sums for kind in layer_kinds(text)]


def _named(text: TextConfig, kind: LayerKind, names: tuple[str, ...]) -> int:
    """Numbers a token that a policy keeps of a layer by name; raises ValueError for a name whose width is not known."""
    queries = text.attention.num_heads * text.attention.head_dim
    widths = {
        "query_key_value": queries + 2 * _kv_width(text),
        "attended": queries,
        "after_attention": text.embed_dim,
        "shared": 2 * _hidden(text, kind)[0],
    }
    unknown = set(names) - set(widths)
    if unknown:
        raise ValueError(
            f"a policy keeps {sorted(unknown)}, of unknown width; give it in plan/memory.py beside {list(widths)}"
        )
    return sum(widths[name] for name in names)


def _saved(text: TextConfig, kind: LayerKind) -> int:
    """Numbers a token that the gradient of a layer keeps, besides the layer's input: what products are made of."""
    d, queries = text.embed_dim, text.attention.num_heads * text.attention.head_dim
    attention = d + 2 * queries + 2 * _kv_width(text)  # normed input; queries, keys, values; what was attended
    between = 2 * d  # the residual stream between the halves, and normed
    shared, routed = _hidden(text, kind)
    # gate and up, twice the width; the hidden layer is computed again from them. A routed token is a row of its own.
    rows = text.moe.top_k * d if routed else 0
    return attention + between + 2 * shared + rows + 2 * routed


def _backward(text: TextConfig, kind: LayerKind, number: int) -> int:
    """Bytes a token of the widest gradient in a layer, that of gate and up."""
    shared, routed = _hidden(text, kind)
    # A grouped product's result is float32, and is copied once to be multiplied from the other side.
    return max(2 * shared * number, 2 * 2 * routed * 4)


def _hidden(text: TextConfig, kind: LayerKind) -> tuple[int, int]:
    """Numbers a token in a layer's hidden feed-forward layers: of the one that all tokens pass, of routed experts."""
    if kind.feed_forward is FeedForward.DENSE:
        return text.mlp_dim, 0
    return text.moe.expert_dim, text.moe.top_k * text.moe.expert_dim


def _kv_width(text: TextConfig) -> int:
    return text.attention.num_kv_heads * text.attention.head_dim
