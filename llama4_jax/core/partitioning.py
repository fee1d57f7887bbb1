"""Where arrays live: logical axis names to the axes of a mesh of devices.

A parameter carries names of its axes (`core.parameter`); a placement says which mesh axes split each name. This is the
only file that names the axes of meshes.

Mesh axes, outermost first: `slice` (copies of the model on slices joined by a slow network), `data` (copies within one),
`fsdp` (parameters split, gathered where used), `expert` (experts), `context` (time), `tensor` (heads and widths).

`with use(mesh, placement):` sets both for what is traced inside; a jitted function is traced anew for another of either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llama4_jax.core.quantized import QuantizedArray

MESH_AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
LOGICAL_AXES = (
    "vocab",
    "embed",
    "expert_embed",
    "vision_embed",
    "heads",
    "kv_heads",
    "head_dim",
    "gate_up",
    "mlp",
    "experts",
    "choices",
    "patch",
    "rank",
    "layers",
)
UNSPLIT = "unsplit"  # an axis that no placement splits
BATCH_AXES = ("batch", "time")  # of tokens, targets, positions and segments


def _check_known(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise ValueError(f"{what} {name!r} is unknown; {hint}")


class TimeOrder(enum.Enum):
    """How the tokens of a row lie over the devices that share it; `kernels.attention.lay_out` puts a batch so."""

    ROW = "row"  # first tokens on the first device
    ZIGZAG = "zigzag"  # an early and a late piece on each: causal work is even, see `kernels.attention.ring.order`


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which mesh axes split each logical axis, and how rows lie; an axis that is not named is whole on every device.

    aligned: a promise about the data: no chunk of a document crosses a multiple of the chunk size, counted from the start
    of its row. Chunked layers then exchange nothing where each piece of a row is whole chunks. `lay_out` checks it.
    ring: how keys of global layers travel, a name in `kernels.attention.ring.IMPLEMENTATIONS`.

    Invariant: logical names are in LOGICAL_AXES or BATCH_AXES, mesh axes in MESH_AXES. Raises ValueError otherwise.
    """

    name: str
    table: Mapping[str, tuple[str, ...]]
    order: TimeOrder = TimeOrder.ROW
    aligned: bool = False
    ring: str = "portable"

    def __post_init__(self):
        for logical, axes in self.table.items():
            _check_known(logical, (*LOGICAL_AXES, *BATCH_AXES), f"placement {self.name!r}: logical axis")
            for axis in axes:
                _check_known(axis, MESH_AXES, f"placement {self.name!r}: mesh axis")

    def __hash__(self):  # of what is compared; the table itself cannot be hashed
        return hash((self.name, tuple(sorted(self.table.items())), self.order, self.aligned, self.ring))


_WIDTHS = {"vocab": ("tensor",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",)}
TRAIN = Placement(
    "train",
    _WIDTHS
    | {"embed": ("fsdp", "expert", "context"), "vision_embed": ("fsdp", "context")}
    | {"experts": ("expert",), "expert_embed": ("fsdp", "context")}
    | {"batch": ("slice", "data", "fsdp", "expert"), "time": ("context",)},
)
# Few rows, too long for one device: what splits rows of experts in training splits time, and causal work is made even.
LONG = Placement(
    "long",
    TRAIN.table | {"batch": ("slice", "data", "fsdp"), "time": ("expert", "context")},
    order=TimeOrder.ZIGZAG,
)
SERVE = Placement("serve", _WIDTHS | {"experts": ("expert",), "batch": ("slice", "data", "fsdp", "expert")})

_PLACEMENT = jax.make_user_context(TRAIN)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of MESH_AXES, of size 1 where `sizes` names none; -1, at most once, takes what is left.

    Raises ValueError for an unknown axis and for sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    for axis in sizes:
        _check_known(axis, MESH_AXES, "mesh axis")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1 or known < 1 or len(devices) % known or (not open_axes and known != len(devices)):
        raise ValueError(
            f"mesh {_product(sizes)} does not use {len(devices)} devices; sizes must multiply to {len(devices)}, "
            "and one of them may be -1 for whatever is left"
        )
    shape = [len(devices) // known if axis in open_axes else sizes.get(axis, 1) for axis in MESH_AXES]
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def use(mesh: Mesh, placement: Placement = TRAIN) -> Iterator[None]:
    """Sets the mesh (`jax.set_mesh`) and the placement in use for the length of a `with` block, outside of `jax.jit`."""
    with jax.set_mesh(mesh), _PLACEMENT(placement):
        yield


def placement_in_use() -> Placement:
    """What `use` has set; TRAIN without it."""
    return _PLACEMENT.value


def batch_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split rows and those that split time, in the placement in use."""
    table = placement_in_use().table
    return tuple(table.get("batch", ())), tuple(table.get("time", ()))


@contextlib.contextmanager
def promised(*, aligned: bool) -> Iterator[None]:
    """The placement in use with `aligned` documents where they are known to be, for the length of a `with` block."""
    if not aligned or mesh_in_use() is None:
        yield
        return
    with _PLACEMENT(dataclasses.replace(placement_in_use(), aligned=True)):
        yield


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, if it is one of `make_mesh` and has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == MESH_AXES and mesh.size > 1 else None


def platform() -> str:
    """What the program being made will run on: "cpu", "gpu" or "tpu"; of the mesh in use if there is one.

    A program may be compiled for devices that this machine does not have, so the default backend does not say it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def spec(axes: Sequence[str], shape: Sequence[int], placement: Placement, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array with these logical axes and this shape is split.

    Raises ValueError where one mesh axis would split two axes of the array, and where a size is not divisible by the
    devices that split it; the message has the sizes that would be.
    """
    parts: list[tuple[str, ...]] = []
    owners: dict[str, str] = {}
    for logical, size in zip(axes, shape, strict=True):
        # A mesh axis of size 1 splits nothing, so it collides with nothing either.
        split = tuple(axis for axis in placement.table.get(logical, ()) if mesh.shape[axis] > 1)
        for axis in split:
            if axis in owners:
                raise ValueError(
                    f"placement {placement.name!r} splits both {owners[axis]!r} and {logical!r} of an array "
                    f"{_sizes(axes, shape)} over mesh axis {axis}={mesh.shape[axis]}; give one of them another axis"
                )
            owners[axis] = logical
        ways = math.prod(mesh.shape[axis] for axis in split)
        if size % ways:
            raise ValueError(
                f"{logical}={size} is not divisible by {_product({axis: mesh.shape[axis] for axis in split})}; "
                f"split it {_alternatives(size)} ways"
            )
        parts.append(split)
    return PartitionSpec(*(part if len(part) > 1 else part[0] if part else None for part in parts))


def sharding(axes: Sequence[str], shape: Sequence[int], placement: Placement, mesh: Mesh) -> NamedSharding:
    """`spec` on its mesh."""
    return NamedSharding(mesh, spec(axes, shape, placement, mesh))


def shardings(model: nnx.Module, placement: Placement, mesh: Mesh) -> nnx.Module:
    """`model`, which may be abstract, with the sharding of each parameter in the place of its array.

    It serves `jax.jit(..., out_shardings=)` and `jax.device_put`. Raises ValueError as `spec`, naming the parameter. Values
    and scales of a `QuantizedArray` lie together: an axis of scales is split as that of values, unless it has one for all.
    """

    def place(axes: Sequence[str], leaf) -> NamedSharding | QuantizedArray:
        if not isinstance(leaf, QuantizedArray):
            return sharding(axes, leaf.shape, placement, mesh)
        scales = tuple(UNSPLIT if size == 1 else axis for axis, size in zip(axes, leaf.scales.shape))
        return dataclasses.replace(
            leaf,
            values=sharding(axes, leaf.shape, placement, mesh),
            scales=sharding(scales, leaf.scales.shape, placement, mesh),
            offsets=None if leaf.offsets is None else sharding(scales, leaf.offsets.shape, placement, mesh),
        )

    def of(path, parameter: nnx.Param) -> nnx.Param:
        try:
            return parameter.replace(place(parameter.axes, parameter.get_value()))
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from None

    return jax.tree.map_with_path(of, model, is_leaf=lambda node: isinstance(node, nnx.Param))


def batch_sharding(shape: Sequence[int], placement: Placement, mesh: Mesh) -> NamedSharding:
    """Where tokens and all that comes with them, [b t], live."""
    return sharding(BATCH_AXES, shape, placement, mesh)


def ways(logical: str, placement: Placement, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a logical axis is split."""
    return math.prod(mesh.shape[axis] for axis in placement.table.get(logical, ()))


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items()) or "of no axes"


def _sizes(axes: Sequence[str], shape: Sequence[int]) -> str:
    return "[" + " ".join(f"{axis}={size}" for axis, size in zip(axes, shape)) + "]"


def _alternatives(size: int) -> str:
    divisors = [n for n in range(1, min(size, 512) + 1) if size % n == 0]
    return ", ".join(map(str, divisors[:-1])) + f" or {divisors[-1]}" if len(divisors) > 1 else str(divisors[0])
