"""The routed experts of a mesh: every token's row goes to the device that holds its expert, and its result comes back.

No row is ever dropped, and no buffer is made for the worst case, in which one device receives everything. A device
receives its rows in rounds of a fixed number of rows, a part of what it gets under an even load; all devices know from
the counts of rows how many rounds there will be, so that any skew takes what it needs, and costs no more than that and
the last round's empty places.

The received rows lie sorted by expert already, because the parts that travel are those of single experts.

The gradient is the same rounds again: rows and the gradients of their results go out, and gradients of rows come back.
Weights are read wherever their shards are; their gradients return in the shards of `partitioning.TRAIN`, added up over
the devices by reduce-scatter and not in full.

Source: dropless mixtures of MegaBlocks (Gale et al. 2022) and the ragged exchange of MaxText; the rounds are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.kernels.exchange import Parts, Schedule, owned, ragged_all_to_all
from llama4_jax.nn import dispatch, products, spread
from llama4_jax.nn.dispatch import Sorting
from llama4_jax.nn.router import Routing

# Rounds that an even load takes, and the fewest rows worth one. More rounds leave fewer places empty in the last, but each
# reads the experts' weights again, and in the backward pass adds to their gradients.
ROUNDS, FEWEST = 4, 1024

_logger = logging.getLogger(__name__)

(EXPERT,) = partitioning.TRAIN.table["experts"]
(TENSOR,) = partitioning.TRAIN.table["mlp"]
TOKENS = (*partitioning.TRAIN.table["batch"], *partitioning.TRAIN.table["time"])
# Weights as products read them: gathered over what only training splits.
_READ = Placement("read", {axis: partitioning.TRAIN.table[axis] for axis in ("experts", "mlp")})


def _send(rows: jax.Array, capacity: int, parts: Parts) -> jax.Array:
    """This device's rows [m d] to the owners of their experts; what this one receives, [capacity d], and else zeros."""
    devices, me = lax.axis_size(EXPERT), lax.axis_index(EXPERT)
    arriving = lax.dynamic_index_in_dim(parts.size.reshape(devices, devices, -1), me, axis=1, keepdims=False)
    buffer = jnp.zeros((capacity, *rows.shape[1:]), rows.dtype)
    return ragged_all_to_all(
        rows, buffer, parts.source[me], parts.size[me], parts.target[me], arriving.reshape(-1), axis_name=EXPERT
    )


def _send_back(received: jax.Array, rows: jax.Array, parts: Parts) -> jax.Array:
    """`rows` [m d] with the results of those that went out, from what each owner made of what it received."""
    devices, me = lax.axis_size(EXPERT), lax.axis_index(EXPERT)

    def mine(numbers):
        return lax.dynamic_index_in_dim(numbers.reshape(devices, devices, -1), me, axis=1, keepdims=False).reshape(-1)

    return ragged_all_to_all(
        received, rows, mine(parts.target), mine(parts.size), mine(parts.source), parts.size[me], axis_name=EXPERT
    )


def _group_sizes(parts: Parts) -> jax.Array:
    """Rows that this device receives for each of its experts, [e/p]."""
    devices, me = lax.axis_size(EXPERT), lax.axis_index(EXPERT)
    return lax.dynamic_index_in_dim(owned(jnp.sum(parts.size, axis=0), devices), me, keepdims=False)


def apply_experts(experts: nnx.Module, rows: jax.Array, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """Each row [m d] through its expert, [m d], and how many rows this device's experts saw, [] int32.

    experts: this device's, called with rows sorted by expert and the rows of each. Inside `jax.shard_map`.
    """

    def step(number, carry):
        out, seen = carry
        with jax.named_scope("exchange"):
            parts = schedule.parts(number)
            received = _send(rows, schedule.capacity, parts)
        sizes = _group_sizes(parts)
        with jax.named_scope("experts"):
            made = experts(received, sizes)
        with jax.named_scope("exchange"):
            return _send_back(made, out, parts), seen + jnp.sum(sizes)

    return lax.fori_loop(0, schedule.rounds, step, (jnp.zeros_like(rows), jnp.zeros((), jnp.int32)))


def pull_back_experts(
    experts: nnx.Module, rows: jax.Array, cotangent: jax.Array, schedule: Schedule
) -> tuple[nnx.Module, jax.Array]:
    """Gradients of `apply_experts`'s first result: of this device's experts, and of its rows [m d]."""

    # As matrices, which products read and make: sums of any other shape a TPU would lay out anew in every round.
    matrices = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:2], -1), experts)

    def apply(matrices, rows, sizes):
        return jax.tree.map(lambda matrix, leaf: matrix.reshape(leaf.shape), matrices, experts)(rows, sizes)

    def step(number, carry):
        to_experts, to_rows = carry
        with jax.named_scope("exchange"):
            parts = schedule.parts(number)
            received, gradient = (_send(x, schedule.capacity, parts) for x in (rows, cotangent))
        with jax.named_scope("experts"):
            _, pull = jax.vjp(partial(apply, sizes=_group_sizes(parts)), matrices, received)
            to_experts_now, to_received = pull(gradient)
        with jax.named_scope("exchange"):
            to_rows = _send_back(to_received, to_rows, parts)
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), to_experts, to_experts_now), to_rows

    # Rounds add up in float32 whatever the weights are.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), matrices)
    to_experts, to_rows = lax.fori_loop(0, schedule.rounds, step, (zeros, jnp.zeros_like(rows)))
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype).reshape(leaf.shape), to_experts, experts), to_rows


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when a mixture is traced. tokens: how [b t] is spread; rows_per_round: None for `rows_in_a_round`."""

    mesh: AbstractMesh
    tokens: PartitionSpec
    num_experts: int
    rows_per_round: int | None

    def schedule(self, sorting: Sorting) -> Schedule:
        devices, rows = self.mesh.shape[EXPERT], sorting.order.size
        counts = lax.all_gather(sorting.group_sizes, EXPERT)  # [p e]
        return Schedule(counts, self.rows_per_round or rows_in_a_round(rows, devices))

    def spread(self, function, in_specs, out_specs):
        # Loops inside start from plain zeros, which the check of what varies over the mesh does not allow.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rows_in_a_round(rows: int, devices: int) -> int:
    """Rows of the buffer of one round, for `devices` that send `rows` each."""
    return min(rows * devices, max(FEWEST, 8 * math.ceil(rows / ROUNDS / 8)))


def mixture(
    mesh: AbstractMesh,
    experts: nnx.Module,
    x: jax.Array,
    routing: Routing,
    present: jax.Array,
    num_experts: int,
    *,
    rows_per_round: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `dispatch.mixture` for tokens x [b t d], present [b t], and routing [b t k], spread over `mesh`.

    experts: such as `moe.Experts`; each device applies its share, for which parameters name their axes.
    rows_per_round: of a device's buffer, instead of `rows_in_a_round`.
    Where rows and time do not divide the mesh, as in decoding, tokens are filled up and spread as one axis.
    Raises ValueError where experts or widths do not divide by the devices that share them.
    """
    batch, time = partitioning.batch_axes()
    ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in (batch, time)]
    arguments = (x, routing.scores, routing.experts, present)
    if any(size % n for size, n in zip(present.shape, ways)):
        plan = _Plan(mesh, PartitionSpec((*batch, *time), None), num_experts, rows_per_round)
        filling = -present.size % math.prod(ways)
        arguments = (
            jnp.pad(a.reshape(-1, 1, *a.shape[2:]), [(0, filling)] + [(0, 0)] * (a.ndim - 1)) for a in arguments
        )
    else:
        plan = _Plan(mesh, PartitionSpec(batch, time), num_experts, rows_per_round)
    experts = experts if _read_as_they_lie(experts, mesh) else products.in_floats(experts, x.dtype)
    routed, seen = _mixture(plan, experts, *arguments)
    return routed.reshape(-1, x.shape[-1])[: present.size].reshape(x.shape) if routed.shape != x.shape else routed, seen


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(plan: _Plan, experts, x, scores, choices, present):
    return _forward(plan, experts, x, scores, choices, present)[0]


def _forward(plan: _Plan, experts, x, scores, choices, present):
    def local(experts, x, scores, choices, present):
        shape, (x, scores, choices, present) = x.shape, _flat(x, scores, choices, present)
        sorting = dispatch.sort(choices, present, plan.num_experts)
        rows = dispatch.rows_of(x, scores, sorting)
        if plan.mesh.shape[EXPERT] == 1:
            rows, seen = experts(rows, sorting.group_sizes), jnp.sum(sorting.group_sizes)
        else:
            rows, seen = apply_experts(experts, rows, plan.schedule(sorting))
        out = lax.psum(dispatch.tokens_of(rows, sorting, choices.shape[1]), TENSOR)
        return out.reshape(shape), seen[None]

    inputs = (_specs(experts, _READ, plan.mesh), *(plan.tokens,) * 4)
    call = plan.spread(local, inputs, (plan.tokens, PartitionSpec(TOKENS)))
    out, seen = call(experts, x, scores, choices, present)
    return (out, jnp.sum(seen)), (experts, x, scores, choices, present)


def _backward(plan: _Plan, saved, cotangent):
    def local(experts, x, scores, choices, present, cotangent):
        shapes = x.shape, scores.shape
        x, scores, choices, present, cotangent = _flat(x, scores, choices, present, cotangent)
        sorting = dispatch.sort(choices, present, plan.num_experts)
        rows, to_tokens = jax.vjp(lambda x, scores: dispatch.rows_of(x, scores, sorting), x, scores)
        _, to_results = jax.vjp(lambda rows: dispatch.tokens_of(rows, sorting, choices.shape[1]), rows)
        (cotangent,) = to_results(cotangent)
        if plan.mesh.shape[EXPERT] == 1:
            _, pull = jax.vjp(lambda experts, rows: experts(rows, sorting.group_sizes), experts, rows)
            to_experts, to_rows = pull(cotangent)
        else:
            to_experts, to_rows = pull_back_experts(experts, rows, cotangent, plan.schedule(sorting))
        to_x, to_scores = (a.reshape(s) for a, s in zip(lax.psum(to_tokens(to_rows), TENSOR), shapes))
        return _reduced(to_experts, plan.mesh), to_x, to_scores

    experts, *tokens = saved
    inputs = (_specs(experts, _READ, plan.mesh), *(plan.tokens,) * 5)
    outputs = (_specs(experts, partitioning.TRAIN, plan.mesh), plan.tokens, plan.tokens)
    return *plan.spread(local, inputs, outputs)(experts, *tokens, cotangent[0]), None, None


_mixture.defvjp(_forward, _backward)


def _flat(*arrays):
    """[b t ..] as [(b t) ..]."""
    return tuple(a.reshape(-1, *a.shape[2:]) for a in arrays)


def _is_param(node) -> bool:
    return isinstance(node, nnx.Param)


def _specs(experts: nnx.Module, placement: Placement, mesh: AbstractMesh) -> nnx.Module:
    """How each parameter is spread; in place of its array. Of few bits, scales lie with their values."""

    def of(param):
        axes = param.axes[-param.ndim :]

        def place(part):
            names = [partitioning.UNSPLIT if size == 1 else axis for axis, size in zip(axes, part.shape)]
            return partitioning.spec(names, part.shape, placement, mesh)

        return param.replace(jax.tree.map(place, param[...]))

    return jax.tree.map(of, experts, is_leaf=_is_param)


def _read_as_they_lie(experts: nnx.Module, mesh: AbstractMesh) -> bool:
    """Whether each device multiplies with its part of weights in few bits: where nothing is trained.

    Groups of inputs must divide as the inputs do.
    """
    if partitioning.placement_in_use().table != partitioning.SERVE.table:
        return False
    try:
        _specs(experts, _READ, mesh)
    except ValueError as error:
        _report_floats(str(error))
        return False
    return True


@functools.cache
def _report_floats(reason: str) -> None:
    _logger.info("experts of a mesh that serves become floats before they multiply: %s", reason)


def _reduced(gradients: nnx.Module, mesh: AbstractMesh) -> nnx.Module:
    """One device's gradients [as read], added up over all devices, in the shards of training."""

    def of(param):
        gradient, left = param[...], set(mesh.axis_names)
        for dimension, name in enumerate(param.axes[-param.ndim :]):
            left -= set(_READ.table.get(name, ()))
            scattered = tuple(
                a for a in partitioning.TRAIN.table.get(name, ()) if a in left and name not in _READ.table
            )
            if scattered:
                gradient = spread.parted(gradient, scattered, dimension)
                left -= set(scattered)
        return param.replace(lax.psum(gradient, tuple(axis for axis in mesh.axis_names if axis in left)))

    return jax.tree.map(of, gradients, is_leaf=_is_param)
