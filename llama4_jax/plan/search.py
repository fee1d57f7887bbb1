"""Which layout fits and is fastest: every sensible one in closed form, and the best few by the compiler.

A choice is a mesh, a placement, what the backward pass computes again and where it finds the rest, and microbatches. Where
the one that was asked does not fit, or takes more than was allowed, the nearest that is expected to be better comes first,
so that the advice to change it is a compiled one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.config.train import REMAT
from llama4_jax.core import partitioning
from llama4_jax.kernels.attention import Layout
from llama4_jax.model import Llama4
from llama4_jax.plan import estimate, topology
from llama4_jax.plan.compiler import Answers
from llama4_jax.plan.job import Choice, Job
from llama4_jax.plan.programs import CACHE_AXES

_AXES = {"train": ("fsdp", "expert", "context", "tensor"), "serve": ("data", "expert", "tensor")}
ACCUMULATIONS = (1, 2, 4, 8)
# What is kept in the host's memory must have a name, and "none" names nothing.
_POLICIES = [
    (name, where) for name in REMAT for where in ("device", "host") if where == "device" or REMAT[name] is not None
]


class Limits(NamedTuple):
    """What a step may take of a device, besides its memory; infinite where nothing is asked."""

    peak: float = math.inf  # GiB held at most
    wire: float = math.inf  # GiB sent
    products: float = math.inf  # PFLOP of products besides attention


UNLIMITED = Limits()


class Tried(NamedTuple):
    """A choice that was compiled; `outcome` as `Job.outcome` gives it, or `refused` with the reason."""

    choice: Choice
    expected: estimate.Estimate
    outcome: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.outcome.get("fits", False)

    @property
    def taken(self) -> Limits | None:
        """What it takes by the compiled program; None of one that the compiler refused."""
        if "memory_gib" not in self.outcome:
            return None
        work = self.outcome["work_of_a_device"]
        return Limits(self.outcome["memory_gib"]["peak"], work["wire_gib"], work["matrix_pflop"])

    def within(self, limits: Limits) -> bool:
        """Whether it fits the device and keeps to the limits too."""
        return self.fits and all(taken <= most for taken, most in zip(self.taken, limits))


def search(job: Job, asked: Choice, limit: int, answers: Answers, limits: Limits = UNLIMITED) -> Iterator[Tried]:
    """What was asked, then at most `limit` others: the nearest that may be within `limits` until one is, then the fastest.

    Raises ValueError where what was asked cannot be laid out; others that cannot are results.
    """
    found = [Tried(asked, estimate.of(job, asked), job.outcome(asked, answers))]
    yield found[0]
    expected = estimates(job, asked) if limit else {}
    for number in range(limit):
        need_one = number < max(1, limit // 2) and not any(tried.within(limits) for tried in found)
        order = promising(job, found, expected, limits)
        if need_one:
            order.sort(key=lambda choice: distance(asked, choice))
        done = {tried.choice for tried in found}
        following = next((choice for choice in order if choice not in done), None)
        if following is None:
            return
        found.append(_try(job, following, answers))
        yield found[-1]


def estimates(job: Job, asked: Choice) -> dict[Choice, estimate.Estimate]:
    """The closed form of every candidate."""
    return {choice: estimate.of(job, choice) for choice in candidates(job, asked)}


def promising(
    job: Job, found: list[Tried], expected: dict[Choice, estimate.Estimate], limits: Limits = UNLIMITED
) -> list[Choice]:
    """What should be within the limits, the fastest first: by the closed form, as far as it was wrong at most so far."""
    memory = topology.device(job.topology).memory
    most = limits._replace(peak=min(memory, limits.peak))
    factors = [max(ratios) for ratios in zip(*_ratios(found, memory))]

    def should_do(each: estimate.Estimate) -> bool:
        return all(taken * factor <= bound for taken, factor, bound in zip(_taken(each), factors, most))

    kept = (choice for choice, each in expected.items() if should_do(each))
    return sorted(kept, key=lambda choice: expected[choice].seconds)


def _ratios(found: list[Tried], memory: float) -> Iterator[Limits]:
    """What each that was compiled takes over what it was expected to; of one that does not fit, its memory alone."""
    for tried in found:
        if "refused" not in tried.outcome:
            taken = tried.taken or _taken(tried.expected)._replace(peak=memory + tried.outcome["over_gib"])
            yield Limits(*(one / max(other, 1e-9) for one, other in zip(taken, _taken(tried.expected))))


def _taken(expected: estimate.Estimate) -> Limits:
    return Limits(expected.memory, expected.wire_gib, expected.matrix_pflop)


def likely(job: Job, tried: Tried, limits: Limits = UNLIMITED) -> Choice | None:
    """The nearest change that should be within the limits, none of it compiled."""
    choices = promising(job, [tried], estimates(job, tried.choice), limits)
    return min(choices, key=lambda choice: distance(tried.choice, choice), default=None)


def ranked(found: list[Tried], limits: Limits = UNLIMITED) -> list[Tried]:
    """Those within the limits by the estimated time of a step, then those that fit, then the others by how much they do not."""
    return sorted(found, key=lambda tried: (not tried.within(limits), not tried.fits, *_order(tried)))


def nearest_fit(found: list[Tried], limits: Limits = UNLIMITED) -> Tried | None:
    """Of what is within the limits, that which changes the least of the first, which was asked."""
    fitting = [tried for tried in ranked(found, limits) if tried.within(limits)]
    return min(fitting, key=lambda tried: distance(found[0].choice, tried.choice), default=None)


def distance(asked: Choice, choice: Choice) -> int:
    """How many flags differ."""
    return sum(one != other for one, other in zip(asked.flags(), choice.flags(), strict=True))


def candidates(job: Job, asked: Choice) -> list[Choice]:
    """Every choice whose sizes divide, for the mode; what was asked among them where they do."""
    training = job.mode == "train"
    placements = (partitioning.TRAIN, partitioning.LONG) if training else (partitioning.SERVE,)
    policies = _POLICIES if training else [(asked.remat, asked.kept_in)]
    parts = [n for n in ACCUMULATIONS if job.batch % n == 0] if training else [asked.accumulation]
    arrays, found = _arrays(job), []
    meshes = _factors(job.size, _AXES["train" if training else "serve"])
    for mesh, placement, n in itertools.product(meshes, placements, parts):
        choice = dataclasses.replace(asked, mesh=mesh, placement=placement, accumulation=n)
        if choice.ways("time") == 1 and placement is partitioning.LONG:
            continue  # the same as in training
        if _divides(job, choice, arrays):
            found += [dataclasses.replace(choice, remat=remat, kept_in=kept_in) for remat, kept_in in policies]
    return found


def _order(tried: Tried) -> tuple[float, ...]:
    if tried.fits:
        return (tried.outcome["estimate_not_measured"]["seconds_step"], tried.outcome["memory_gib"]["peak"])
    return (tried.outcome.get("over_gib", float("inf")),)


def _try(job: Job, choice: Choice, answers: Answers) -> Tried:
    try:
        outcome = job.outcome(choice, answers)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        outcome = {"refused": str(error).splitlines()[0]}
    return Tried(choice, estimate.of(job, choice), outcome)


def _factors(total: int, axes: tuple[str, ...]) -> list[tuple[tuple[str, int], ...]]:
    """Meshes of `total` devices over `axes`, without axes of 1."""
    if len(axes) == 1:
        return [((axes[0], total),) if total > 1 else ()]
    return [
        (((axes[0], size),) if size > 1 else ()) + rest
        for size in range(1, total + 1)
        if total % size == 0
        for rest in _factors(total // size, axes[1:])
    ]


def _arrays(job: Job) -> set[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Axes and shapes of all parameters, each once, and of a cache."""
    model = jax.eval_shape(lambda: Llama4(job.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param))
    found = {(tuple(leaf.axes), tuple(leaf.shape)) for leaf in leaves}
    attention = job.config.text.attention
    cache = (job.batch, attention.num_kv_heads, job.length, attention.head_dim)
    return found | ({(CACHE_AXES, cache)} if job.mode != "train" else set())


def _divides(job: Job, choice: Choice, arrays) -> bool:
    sizes = tuple(choice.sizes.values())
    mesh = AbstractMesh(sizes, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    rows = (job.batch // choice.accumulation, job.length if job.mode != "decode" else 1)
    try:
        for axes, shape in ((partitioning.BATCH_AXES, rows), *arrays):
            partitioning.spec(axes, shape, choice.placement, mesh)
        Layout.of(choice.placement, mesh).check(rows[1])
    except ValueError:
        return False
    return True
