"""Which tensor of a checkpoint file is which slice of which parameter: one table, read in both directions.

A `Rule` ties a tensor's name to a parameter's path and gives the change of layout as an einops pattern from file to
parameter; swapping the pattern's sides gives the way back. `entries` writes the rules out for a configuration, and
`account` checks that files and a model agree: every tensor and every parameter exactly once. A kind of checkpoint is a
`Layout` value (`layouts`).

Two things need more than a pattern. Rules that share a key lie one after another along the first axis of its tensor, in
the order of the rules (queries, keys and values in one matrix). And where a checkpoint is split among devices, `split`
names the letter of the pattern along which they divide the tensor; shard i of n fills the i-th of n equal parts of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from einops import rearrange

from llama4_jax.config import FeedForward, Llama4Config, layer_kinds

Shape = tuple[int, ...]
Box = tuple[slice, ...]  # a part of a parameter: start and stop on each of its axes
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """`key` in the file fills `path[slot]` of the model; `pattern` is einops, file side first."""

    key: str
    path: str
    pattern: str
    slot: tuple = ()  # index into the parameter, stacking left out: gate and up share one parameter
    split: str = ""  # the letter that tensor-parallel shards divide; "": each shard has the whole tensor
    also: tuple[str, ...] = ()  # other names under which files have this tensor; `key` is what is written


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules of one kind of checkpoint file, in groups that a configuration switches on or repeats by layer."""

    name: str  # what messages call it
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
    expert: tuple[Rule, ...] = ()  # each routed {expert} of a mixture, where experts are separate tensors
    dropped: tuple[str, ...] = ()  # regular expressions of keys that hold no weights

    def kept(self, names: Iterable[str]) -> list[str]:
        """`names` without those that this layout drops on purpose."""
        return [name for name in names if not any(re.fullmatch(pattern, name) for pattern in self.dropped)]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, or one part of it: the `index` into parameter `path` that it fills, by `pattern`."""

    key: str
    path: str
    index: tuple
    pattern: str
    split: str = ""

    def fill(self, leaf: np.ndarray, tensor: np.ndarray, shard: int = 0, shards: int = 1) -> None:
        """Puts `tensor`, shard `shard` of `shards`, where it belongs in the whole parameter `leaf`."""
        leaf[self.covered(leaf.shape, shard, shards)] = self.to_leaf(tensor, leaf.shape, shards)

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as the file stores it, out of the whole parameter."""
        return self.block_to_file(leaf[self.covered(leaf.shape)])

    def covered(self, leaf: Shape, shard: int = 0, shards: int = 1) -> Box:
        """The box of a parameter of shape `leaf` that the tensor, shard `shard` of `shards`, fills."""
        box = [ALL if part == ALL else slice(part, part + 1) for part in self._index(leaf)]
        for axis, (name, size) in zip(self._axes(leaf), self._sizes(leaf, shards).items()):
            start = shard * size if name == self.split else 0
            box[axis] = slice(start, start + size)
        return tuple(box)

    def lead(self, leaf: Shape, shards: int = 1) -> tuple[int, int]:
        """How the tensor's rows run through the parameter: along which of its axes, and how many rows a step takes."""
        first, *inner = re.search(r"\((.*?)\)|\w+", self.pattern).group().strip("()").split()
        sizes = self._sizes(leaf, shards)
        axis = self._axes(leaf)[list(sizes).index(first)]
        return axis, math.prod(sizes[name] for name in inner)

    def to_leaf(self, rows: np.ndarray, leaf: Shape, shards: int = 1) -> np.ndarray:
        """Some rows of the tensor in one of `shards` files, a whole number of steps, as a box of the parameter.

        `leaf` is the shape of the whole parameter. An axis at which the entry holds one index has size 1.
        """
        axis, step = self.lead(leaf, shards)
        sizes = self._sizes(leaf, shards)
        sizes[list(sizes)[self._axes(leaf).index(axis)]] = len(rows) // step
        block = rearrange(rows, self.pattern, **sizes)
        return np.expand_dims(block, tuple(i for i, part in enumerate(self._index(leaf)) if part != ALL))

    def block_to_file(self, block: np.ndarray) -> np.ndarray:
        """The rows of the tensor that a box of the parameter makes, where the box is whole but along the tensor's lead."""
        file_side, leaf_side = self.pattern.split(" -> ")
        kept = block[tuple(ALL if part == ALL else 0 for part in self._index(block.shape))]
        return np.ascontiguousarray(rearrange(kept, f"{leaf_side} -> {file_side}"))

    def file_shape(self, leaf: Shape, shards: int = 1) -> Shape:
        """The shape of the tensor in one of `shards` files, given the shape of the parameter.

        Raises ValueError where the axis that shards divide has no `shards` equal parts.
        """
        sizes = self._sizes(leaf, shards)
        groups = re.findall(r"\(.*?\)|\w+", self.pattern.split(" -> ")[0])
        return tuple(math.prod(sizes[name] for name in group.strip("()").split()) for group in groups)

    def _index(self, leaf: Shape) -> tuple:
        return self.index + (ALL,) * (len(leaf) - len(self.index))

    def _axes(self, leaf: Shape) -> list[int]:
        """The axes of the parameter that the letters of the pattern's right side name, in that order."""
        return [axis for axis, part in enumerate(self._index(leaf)) if part == ALL]

    def _sizes(self, leaf: Shape, shards: int) -> dict[str, int]:
        """The letters of the parameter's side, in its order, with their sizes in one shard."""
        kept = [leaf[axis] for axis in self._axes(leaf)]
        sizes = dict(zip(self.pattern.split(" -> ")[1].split(), kept, strict=True))
        if self.split:
            if sizes[self.split] % shards:
                raise ValueError(f"{self.key}: axis {self.split!r} of {sizes[self.split]} in {shards} shards")
            sizes[self.split] //= shards
        return sizes


def entries(
    config: Llama4Config,
    layout: Layout,
    *,
    stacked: bool,
    text_prefix: str | None = None,
    names: Collection[str] = (),
) -> list[Entry]:
    """Every tensor of a checkpoint of `config`, in the order of the layers.

    `stacked` tells how the model holds its decoder: repeats of a period stacked on a first axis, or layer by layer.
    `text_prefix` overrides what stands before text keys: the layout's prefix in a multimodal file, else nothing.
    `names`, those in a file, choose between the spellings of a key.
    """
    if text_prefix is None:
        text_prefix = layout.text_prefix if config.vision else ""

    def write_out(rules: Iterable[Rule], prefix: str, path: str = "", index: tuple = (), **fields) -> list[Entry]:
        return [
            Entry(_spelling(rule, prefix, names, fields), path + rule.path, index + rule.slot, rule.pattern, rule.split)
            for rule in rules
        ]

    found = write_out(layout.text + (() if config.text.tie_embeddings else layout.head), text_prefix)
    for layer, kind in enumerate(layer_kinds(config.text)):
        path, index = _place(config, layer, stacked)
        prefix = text_prefix + layout.block_prefix.format(layer=layer)
        mixture = kind.feed_forward is FeedForward.MOE
        rules = layout.block + (layout.attention_bias if config.text.attention.bias else ())
        found += write_out(rules + (layout.moe if mixture else layout.dense), prefix, path, index)
        for expert in range(config.text.moe.num_experts) if mixture and layout.expert else ():
            found += write_out(layout.expert, prefix, path, (*index, expert), expert=expert)
    if config.vision:
        found += write_out(layout.vision, "")
        for layer in range(config.vision.num_layers):
            prefix = layout.vision_block_prefix.format(layer=layer)
            found += write_out(layout.vision_block, prefix, "vision.blocks.", (layer,))
    return found


def in_parts(table: Iterable[Entry], parts: Mapping[str, Collection[str]]) -> list[Entry]:
    """`table` with a row for each of the `parts` (path -> names) of a parameter: KEY.part in the file fills PATH.part.

    A part is laid out as the whole is, whatever its sizes.
    """
    return [
        dataclasses.replace(entry, key=f"{entry.key}.{part}", path=f"{entry.path}.{part}") if part else entry
        for entry in table
        for part in parts.get(entry.path, ("",))
    ]


def unstacked(config: Llama4Config, paths: Collection[str]) -> dict[str, tuple[str, tuple]]:
    """Each parameter of a model layer by layer -> the path in `paths`, of a stacked model or not, and index of it there.

    A model that holds its decoder layer by layer is its own answer.
    """
    stacked = any(path.startswith("decoder.period.") for path in paths)
    found = {path: (path, ()) for path in paths if not path.startswith(("decoder.period.", "decoder.tail."))}
    for layer in range(config.text.num_layers):
        (alone, _), (home, index) = (_place(config, layer, how) for how in (False, stacked))
        for path in paths:
            if path.startswith(home):
                found[alone + path.removeprefix(home)] = (path, index)
    return found


def identity(shapes: Mapping[str, Shape]) -> list[Entry]:
    """The table of a checkpoint that has each parameter under its own name and in its own shape."""
    letters = "abcdefgh"
    patterns = {path: " ".join(letters[: len(shape)]) for path, shape in shapes.items()}
    return [Entry(path, path, (), f"{pattern} -> {pattern}") for path, pattern in patterns.items()]


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share; None if that is nothing."""
    shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return shared if all(part.start < part.stop for part in shared) else None


def with_part(box: Box, axis: int, part: slice) -> Box:
    """`box` with another `part` on one axis."""
    return (*box[:axis], part, *box[axis + 1 :])


def within(box: Box, frame: Box) -> Box:
    """`box` as an index into an array that holds `frame`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, frame, strict=True))


def by_key(table: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Key -> the entries that its tensor holds, in the order in which it holds them."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(entry.key, []).append(entry)
    return found


def stored_shape(parts: list[Entry], leaves: Mapping[str, Shape], shards: int = 1) -> Shape:
    """The shape of the tensor that holds `parts`, in one of `shards` files."""
    shapes = [part.file_shape(leaves[part.path], shards) for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def rows(parts: list[Entry], part: Entry, leaves: Mapping[str, Shape], shards: int = 1) -> slice:
    """Where `part` lies on the first axis of the tensor that holds `parts`."""
    if len(parts) == 1:
        return ALL
    lengths = [other.file_shape(leaves[other.path], shards)[0] for other in parts]
    place = parts.index(part)
    return slice(sum(lengths[:place]), sum(lengths[: place + 1]))


def _spelling(rule: Rule, prefix: str, names: Collection[str], fields: Mapping[str, int]) -> str:
    """The key under which a file has the rule's tensor; its first spelling where no file has it."""
    spellings = [prefix + key.format(**fields) for key in (rule.key, *rule.also)]
    return next((key for key in spellings if key in names), spellings[0])


def _place(config: Llama4Config, layer: int, stacked: bool) -> tuple[str, tuple]:
    """Path of the module that holds decoder layer `layer`, and the index into its stacked parameters."""
    period = config.text.period
    repeats = config.text.num_layers // period
    if not stacked or repeats < 2:
        return f"decoder.tail.{layer}.", ()
    if layer < repeats * period:
        return f"decoder.period.{layer % period}.", (layer // period,)
    return f"decoder.tail.{layer - repeats * period}.", ()


def account(
    table: Iterable[Entry], files: Mapping[str, Mapping[str, Shape]], leaves: Mapping[str, Shape], source: str
) -> None:
    """Checks that the tensors in `files` (label -> key -> shape; several are shards) and model `leaves` match.

    Raises ValueError listing everything missing, unexpected or misshapen in `source`, and every parameter that the
    table leaves unfilled, fills twice or invents.
    """
    table = list(table)
    known = by_key(entry for entry in table if entry.path in leaves)
    keys = {entry.key for entry in table}
    filled: Counter[str] = Counter()
    for entry in table:
        filled[entry.path] += math.prod(entry.file_shape(leaves[entry.path])) if entry.path in leaves else 0
    slices = Counter((entry.path, str(entry.index)) for entry in table)
    label = {name: f" ({name})" if len(files) > 1 else "" for name in files}
    problems = {
        "missing": sorted(key + label[name] for name, stored in files.items() for key in keys - stored.keys()),
        "unexpected": sorted(key + label[name] for name, stored in files.items() for key in stored.keys() - keys),
        "misshapen": [
            f"{key}{label[name]}: {problem}"
            for name, stored in files.items()
            for key, parts in known.items()
            if key in stored and (problem := _misfit(parts, leaves, tuple(stored[key]), len(files)))
        ],
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


def _misfit(parts: list[Entry], leaves: Mapping[str, Shape], got: Shape, shards: int) -> str | None:
    """What is wrong with a tensor of shape `got`; None if nothing is."""
    try:
        wanted = stored_shape(parts, leaves, shards)
    except ValueError as error:
        return f"{error}: not divisible"
    return None if wanted == got else f"wanted {wanted}, got {got}"
