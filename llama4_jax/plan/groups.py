"""Which axes of a mesh a collective runs over, from the chips that it names.

Chips are numbered along the mesh, last axis fastest, as XLA's partitions are. Groups are written in four ways: as lists
`{{0,1},{2,3}}`; as `[2,4]<=[4,2]T(1,0)`, numbers in order, reshaped and transposed; as `mesh['a'=2,'b'=4] {'b'}`, by axes of
a mesh of XLA's own; and empty, for all chips.
Source: `ReplicaGroup`, `IotaReplicaGroupList` and `MeshAxesReplicaGroupList` of openxla/xla.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from llama4_jax.plan.hlo import Instruction


def of_groups(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, int]:
    """The mesh axes, joined by "+", and the number of chips in a group."""
    total = math.prod(mesh.values())
    found = read(_text(instruction), total)
    if found.max(initial=0) >= total:
        raise ValueError(
            f"{instruction.name} names chip {found.max()} of a mesh of {total}; give the program's own mesh"
        )
    return axes(found, mesh), found.shape[1]


def of_pairs(text: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    """The axes along which pairs `{0,1},{1,2}` of source and target differ; a size of 1 where none does."""
    pairs = np.array([int(number) for number in re.findall(r"\d+", text)]).reshape(-1, 2)
    moved = pairs[pairs[:, 0] != pairs[:, 1]]
    return (axes(moved, mesh), 2) if len(moved) else ("", 1)


def axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """Names of the axes whose index differs within any of the groups [g n] of chips."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes g n]
    varies = (places != places[:, :, :1]).any((1, 2))
    return "+".join(name for name, one in zip(mesh, varies) if one)


def read(text: str, total: int) -> np.ndarray:
    """Groups of chips [g n] from any of the four spellings. Raises ValueError for a fifth, and for unequal groups."""
    if text in ("", "{}"):
        return np.arange(total)[None]
    if text.startswith("mesh["):
        return _by_axes(text)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        chips = np.arange(math.prod(sizes)).reshape(sizes)
        return (chips.transpose(order) if order else chips).reshape(shape)
    listed = [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]
    if not listed or len({len(group) for group in listed}) > 1:
        raise ValueError(f"replica groups {text[:80]!r} are none of the four spellings, or of unequal sizes")
    return np.array(listed)


def _by_axes(text: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`, perhaps with `device_ids=([4,2]T(1,0))`, and with parts of axes such as `'b':(2)2`."""
    inside, after = re.match(r"mesh\[([^\]]*)\](.*)", text).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", inside)}
    ids = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", after)
    chips = np.arange(math.prod(sizes.values()))
    if ids:
        dims, order = ([int(n) for n in part.split(",")] if part else None for part in ids.groups())
        chips = chips.reshape(dims).transpose(order) if order else chips
    shape, chosen = [], []
    wanted = {
        name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", _last_braces(after))
    }
    for name, size in sizes.items():
        if name not in wanted:
            shape.append(size)
            continue
        before, part = wanted[name]
        parts = [int(before), int(part), size // int(before) // int(part)] if before else [1, size, 1]
        chosen.append(len(shape) + 1)
        shape += parts
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    grouped = chips.reshape(shape).transpose(*others, *chosen)
    return grouped.reshape(-1, math.prod(shape[axis] for axis in chosen))


def _last_braces(text: str) -> str:
    return re.findall(r"\{([^}]*)\}", text)[-1]


def _text(instruction: Instruction) -> str:
    """The value of `replica_groups=`, whichever way it is spelt."""
    found = re.search(
        r"replica_groups=(mesh\[.*?\].*?\{[^}]*\}|\{(?:\{[\d,]*\},?)*\}|\[[^\s]*)", instruction.attributes
    )
    return found.group(1).rstrip(",") if found else ""
