"""Which tensor of a checkpoint file is which slice of which parameter: one table, read in both directions.

A `Rule` ties a tensor's name to a parameter's path and gives the change of layout as an einops pattern from file to
parameter; swapping the pattern's sides gives the way back. `entries` writes the rules out for a configuration, one
`Entry` a tensor, and `account` checks that a file and a model agree: every tensor and every parameter exactly once.
Another layout is another `Layout` value.

Source: tensor names of Hugging Face `Llama4ForCausalLM` and `Llama4ForConditionalGeneration` (transformers 5.23).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from einops import rearrange

from llama4_jax.config import FeedForward, Llama4Config, layer_kinds

Shape = tuple[int, ...]
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """`key` in the file fills `path[slot]` of the model; `pattern` is einops, file side first."""

    key: str
    path: str
    pattern: str
    slot: tuple = ()  # index into the parameter, stacking left out: gate and up share one parameter


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules of one kind of checkpoint file, in groups that a configuration switches on or repeats by layer."""

    text: tuple[Rule, ...]
    head: tuple[Rule, ...]  # only when the output matrix is not the embedding table
    block: tuple[Rule, ...]  # each decoder layer
    attention_bias: tuple[Rule, ...]
    dense: tuple[Rule, ...]
    moe: tuple[Rule, ...]
    vision: tuple[Rule, ...]
    vision_block: tuple[Rule, ...]
    block_prefix: str  # before the keys of decoder layer {layer}
    vision_block_prefix: str
    text_prefix: str  # before every text key, in a multimodal file


HF_FUSED = Layout(
    text_prefix="language_model.",
    block_prefix="model.layers.{layer}.",
    vision_block_prefix="vision_model.model.layers.{layer}.",
    text=(
        Rule("model.embed_tokens.weight", "embed.table", "v d -> v d"),
        Rule("model.norm.weight", "norm.scale", "d -> d"),
    ),
    head=(Rule("lm_head.weight", "head.kernel", "v d -> d v"),),
    block=(
        Rule("input_layernorm.weight", "attention_norm.scale", "d -> d"),
        Rule("self_attn.q_proj.weight", "attention.query.kernel", "(n h) d -> d n h"),
        Rule("self_attn.k_proj.weight", "attention.key.kernel", "(k h) d -> d k h"),
        Rule("self_attn.v_proj.weight", "attention.value.kernel", "(k h) d -> d k h"),
        Rule("self_attn.o_proj.weight", "attention.output.kernel", "d (n h) -> n h d"),
        Rule("post_attention_layernorm.weight", "feed_forward_norm.scale", "d -> d"),
    ),
    attention_bias=(
        Rule("self_attn.q_proj.bias", "attention.query.bias", "(n h) -> n h"),
        Rule("self_attn.k_proj.bias", "attention.key.bias", "(k h) -> k h"),
        Rule("self_attn.v_proj.bias", "attention.value.bias", "(k h) -> k h"),
        Rule("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
    ),
    dense=(
        Rule("feed_forward.gate_proj.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 0)),
        Rule("feed_forward.up_proj.weight", "feed_forward.gate_up.kernel", "f d -> d f", (ALL, 1)),
        Rule("feed_forward.down_proj.weight", "feed_forward.down.kernel", "d f -> f d"),
    ),
    moe=(
        Rule("feed_forward.router.weight", "feed_forward.router.kernel", "e d -> d e"),
        Rule("feed_forward.experts.gate_up_proj", "feed_forward.experts.gate_up", "e d (two f) -> e d two f"),
        Rule("feed_forward.experts.down_proj", "feed_forward.experts.down", "e f d -> e f d"),
        Rule(
            "feed_forward.shared_expert.gate_proj.weight", "feed_forward.shared.gate_up.kernel", "f d -> d f", (ALL, 0)
        ),
        Rule("feed_forward.shared_expert.up_proj.weight", "feed_forward.shared.gate_up.kernel", "f d -> d f", (ALL, 1)),
        Rule("feed_forward.shared_expert.down_proj.weight", "feed_forward.shared.down.kernel", "d f -> f d"),
    ),
    vision=(
        Rule("vision_model.patch_embedding.linear.weight", "vision.patch.kernel", "d p -> p d"),
        Rule("vision_model.class_embedding", "vision.class_embedding", "d -> d"),
        Rule("vision_model.positional_embedding_vlm", "vision.position_embedding", "p d -> p d"),
        Rule("vision_model.layernorm_pre.weight", "vision.norm_pre.scale", "d -> d"),
        Rule("vision_model.layernorm_pre.bias", "vision.norm_pre.bias", "d -> d"),
        Rule("vision_model.layernorm_post.weight", "vision.norm_post.scale", "d -> d"),
        Rule("vision_model.layernorm_post.bias", "vision.norm_post.bias", "d -> d"),
        Rule("vision_model.vision_adapter.mlp.fc1.weight", "vision.adapter.fc1.kernel", "o i -> i o"),
        Rule("vision_model.vision_adapter.mlp.fc2.weight", "vision.adapter.fc2.kernel", "o i -> i o"),
        Rule("multi_modal_projector.linear_1.weight", "vision.projector.kernel", "o i -> i o"),
    ),
    vision_block=(
        Rule("input_layernorm.weight", "attention_norm.scale", "d -> d"),
        Rule("input_layernorm.bias", "attention_norm.bias", "d -> d"),
        Rule("self_attn.q_proj.weight", "attention.query.kernel", "(n h) d -> d n h"),
        Rule("self_attn.q_proj.bias", "attention.query.bias", "(n h) -> n h"),
        Rule("self_attn.k_proj.weight", "attention.key.kernel", "(n h) d -> d n h"),
        Rule("self_attn.k_proj.bias", "attention.key.bias", "(n h) -> n h"),
        Rule("self_attn.v_proj.weight", "attention.value.kernel", "(n h) d -> d n h"),
        Rule("self_attn.v_proj.bias", "attention.value.bias", "(n h) -> n h"),
        Rule("self_attn.o_proj.weight", "attention.output.kernel", "d (n h) -> n h d"),
        Rule("self_attn.o_proj.bias", "attention.output.bias", "d -> d"),
        Rule("post_attention_layernorm.weight", "mlp_norm.scale", "d -> d"),
        Rule("post_attention_layernorm.bias", "mlp_norm.bias", "d -> d"),
        Rule("mlp.fc1.weight", "fc1.kernel", "o i -> i o"),
        Rule("mlp.fc1.bias", "fc1.bias", "o -> o"),
        Rule("mlp.fc2.weight", "fc2.kernel", "o i -> i o"),
        Rule("mlp.fc2.bias", "fc2.bias", "o -> o"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: the parameter `path` and the `index` into it that it fills, by the einops `pattern`."""

    key: str
    path: str
    index: tuple
    pattern: str

    def to_leaf(self, tensor: np.ndarray, leaf: Shape) -> np.ndarray:
        """`tensor` laid out as the slice of a parameter of shape `leaf` that it fills."""
        return rearrange(tensor, self.pattern, **self._sizes(leaf))

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as the file stores it, out of the whole parameter."""
        file_side, leaf_side = self.pattern.split(" -> ")
        return np.ascontiguousarray(rearrange(leaf[self.index], f"{leaf_side} -> {file_side}"))

    def file_shape(self, leaf: Shape) -> Shape:
        """The shape of the file's tensor, given the shape of the parameter."""
        sizes = self._sizes(leaf)
        groups = re.findall(r"\(.*?\)|\w+", self.pattern.split(" -> ")[0])
        return tuple(math.prod(sizes[name] for name in group.strip("()").split()) for group in groups)

    def _sizes(self, leaf: Shape) -> dict[str, int]:
        index = self.index + (ALL,) * (len(leaf) - len(self.index))
        kept = [size for size, part in zip(leaf, index) if part == ALL]
        return dict(zip(self.pattern.split(" -> ")[1].split(), kept, strict=True))


def entries(
    config: Llama4Config, layout: Layout = HF_FUSED, *, stacked: bool, text_prefix: str | None = None
) -> list[Entry]:
    """Every tensor of a checkpoint of `config`, in the order of the layers.

    `stacked` tells how the model holds its decoder: repeats of a period stacked on a first axis, or layer by layer.
    `text_prefix` overrides what stands before text keys: the layout's prefix in a multimodal file, else nothing.
    """
    if text_prefix is None:
        text_prefix = layout.text_prefix if config.vision else ""
    rules = layout.text + (() if config.text.tie_embeddings else layout.head)
    found = [Entry(text_prefix + rule.key, rule.path, rule.slot, rule.pattern) for rule in rules]
    for layer, kind in enumerate(layer_kinds(config.text)):
        path, index = _place(config, layer, stacked)
        prefix = text_prefix + layout.block_prefix.format(layer=layer)
        rules = layout.block + (layout.attention_bias if config.text.attention.bias else ())
        rules += layout.moe if kind.feed_forward is FeedForward.MOE else layout.dense
        found += [Entry(prefix + rule.key, f"{path}.{rule.path}", index + rule.slot, rule.pattern) for rule in rules]
    if config.vision:
        found += [Entry(rule.key, rule.path, rule.slot, rule.pattern) for rule in layout.vision]
        for layer in range(config.vision.num_layers):
            prefix = layout.vision_block_prefix.format(layer=layer)
            found += [
                Entry(prefix + rule.key, f"vision.blocks.{rule.path}", (layer, *rule.slot), rule.pattern)
                for rule in layout.vision_block
            ]
    return found


def _place(config: Llama4Config, layer: int, stacked: bool) -> tuple[str, tuple]:
    """Path of the module that holds decoder layer `layer`, and the index into its stacked parameters."""
    period = config.text.period
    repeats = config.text.num_layers // period
    if not stacked or repeats < 2:
        return f"decoder.tail.{layer}", ()
    if layer < repeats * period:
        return f"decoder.period.{layer % period}", (layer // period,)
    return f"decoder.tail.{layer - repeats * period}", ()


def account(table: Iterable[Entry], stored: Mapping[str, Shape], leaves: Mapping[str, Shape], source: str) -> None:
    """Checks that `stored` tensors and model `leaves` (name -> shape) match one to one through `table`.

    Raises ValueError listing everything missing, unexpected or misshapen in `source`, and every parameter that the
    table leaves unfilled, fills twice or invents.
    """
    table = list(table)
    known = {entry.key: entry for entry in table}
    filled: Counter[str] = Counter()
    for entry in table:
        filled[entry.path] += math.prod(entry.file_shape(leaves[entry.path])) if entry.path in leaves else 0
    slices = Counter((entry.path, str(entry.index)) for entry in table)
    problems = {
        "missing": sorted(known.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - known.keys()),
        "misshapen": [
            f"{key}: wanted {entry.file_shape(leaves[entry.path])}, got {tuple(stored[key])}"
            for key, entry in known.items()
            if key in stored and entry.path in leaves and entry.file_shape(leaves[entry.path]) != tuple(stored[key])
        ],
        "named twice in the mapping": sorted(key for key, n in Counter(e.key for e in table).items() if n > 1),
        "filled twice in the model": sorted({path for (path, _), n in slices.items() if n > 1}),
        "not filled in the model": sorted(p for p, shape in leaves.items() if filled[p] != math.prod(shape)),
        "not in the model": sorted(filled.keys() - leaves.keys()),
    }
    found = [f"{len(names)} {what}:\n  " + "\n  ".join(names) for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{source} and the model do not match, nothing was read or written:\n"
            + "\n".join(found)
            + "\nCheck that the configuration belongs to these weights."
        )
