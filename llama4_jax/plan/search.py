"""Which layout fits and is fastest: every sensible one in closed form, and the best few by the compiler.

A choice is a mesh, a placement, what the backward pass computes again, and microbatches. Where the one that was asked
does not fit, the nearest that is expected to comes first, so that the advice to change it is a compiled one.
"""

from __future__ import annotations

import itertools
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


class Tried(NamedTuple):
    """A choice that was compiled; `outcome` as `Job.outcome` gives it, or `refused` with the reason."""

    choice: Choice
    expected: estimate.Estimate
    outcome: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.outcome.get("fits", False)


def search(job: Job, asked: Choice, limit: int, answers: Answers) -> Iterator[Tried]:
    """What was asked, then at most `limit` others: the nearest that may fit until one does, then the fastest.

    Raises ValueError where what was asked cannot be laid out; others that cannot are results.
    """
    found = [Tried(asked, estimate.of(job, asked), job.outcome(asked, answers))]
    yield found[0]
    expected = estimates(job, asked) if limit else {}
    for number in range(limit):
        need_one = number < max(1, limit // 2) and not any(tried.fits for tried in found)
        order = promising(job, found, expected)
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


def promising(job: Job, found: list[Tried], expected: dict[Choice, estimate.Estimate]) -> list[Choice]:
    """What should fit, the fastest first: by the closed form, as far as it was wrong at most for what is compiled."""
    memory = topology.device(job.topology).memory
    ratios = [_held(tried, memory) / tried.expected.memory for tried in found if "refused" not in tried.outcome]
    return sorted(
        (choice for choice, each in expected.items() if each.memory * max(ratios) <= memory),
        key=lambda choice: expected[choice].seconds,
    )


def _held(tried: Tried, memory: float) -> float:
    """GiB that a compiled choice needs."""
    return tried.outcome["memory_gib"]["peak"] if tried.fits else memory + tried.outcome["over_gib"]


def likely(job: Job, tried: Tried) -> Choice | None:
    """The nearest change that should fit, none of it compiled."""
    choices = promising(job, [tried], estimates(job, tried.choice))
    return min(choices, key=lambda choice: distance(tried.choice, choice), default=None)


def ranked(found: list[Tried]) -> list[Tried]:
    """Those that fit by the estimated time of a step, then the others by how much they do not."""
    return sorted(found, key=lambda tried: (not tried.fits, *_order(tried)))


def nearest_fit(found: list[Tried]) -> Tried | None:
    """Of what fits, that which changes the least of the first, which was asked."""
    fitting = [tried for tried in ranked(found) if tried.fits]
    return min(fitting, key=lambda tried: distance(found[0].choice, tried.choice), default=None)


def distance(asked: Choice, choice: Choice) -> int:
    """How many flags differ."""
    return sum(one != other for one, other in zip(asked.flags(), choice.flags(), strict=True))


def candidates(job: Job, asked: Choice) -> list[Choice]:
    """Every choice whose sizes divide, for the mode; what was asked among them where they do."""
    training = job.mode == "train"
    placements = (partitioning.TRAIN, partitioning.LONG) if training else (partitioning.SERVE,)
    # What is kept in the host's memory must have a name, and "none" names nothing.
    policies = [name for name in REMAT if REMAT[name] is not None or job.training.kept_in == "device"]
    policies = policies if training else [asked.remat]
    parts = [n for n in ACCUMULATIONS if job.batch % n == 0] if training else [asked.accumulation]
    arrays, found = _arrays(job), []
    meshes = _factors(job.size, _AXES["train" if training else "serve"])
    for mesh, placement, n in itertools.product(meshes, placements, parts):
        choice = Choice(mesh=mesh, placement=placement, remat=asked.remat, accumulation=n)
        if choice.ways("time") == 1 and placement is partitioning.LONG:
            continue  # the same as in training
        if _divides(job, choice, arrays):
            found += [Choice(mesh=mesh, placement=placement, remat=policy, accumulation=n) for policy in policies]
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
