"""Time of one token in decoding, by how weights and cache are kept: the planner's closed form, an estimate and not measured.

Every format runs on the same devices, the fewest (a power of two) on which bfloat16 fits, and each in the layout that is the
fastest for it: heads, experts and rows over `tensor`, `expert` and `data`. Where a row is too large for the eight devices
that key-value heads are cut over, `tensor` goes on and keys and values are there more than once, which no placement does yet.

What is assumed: each bit that is stored is read once, in time with the products; no time for starting programs, or for
waiting on small messages. So gains are upper bounds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from llama4_jax.config import Llama4Config
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.plan import estimate, memory, topology
from llama4_jax.plan.job import Choice, Job
from llama4_jax.plan.weights import PLAIN, Kept

MOST_DEVICES = 2**14
_TRAINING = TrainConfig(steps=1)  # a job names one; decoding has no use for it
BASELINE = PLAIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One question: `batch` rows of `context` cached tokens, on chips of a kind that `topology.DEVICES` has."""

    config: Llama4Config
    chip: str
    batch: int
    context: int

    def job(self, chips: int, form: Kept) -> Job:
        shape = {"topology": f"{self.chip}:{chips}x1", "batch": self.batch, "length": self.context}
        return Job(config=self.config, mode="decode", training=_TRAINING, kept=form, **shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """chips; seconds of a token of each row by format, `mesh` the layout that takes them, and GiB that a device then holds."""

    chips: int
    seconds: Mapping[str, float]
    mesh: Mapping[str, str]
    memory: Mapping[str, float]

    def gain(self, name: str) -> float:
        """How many times faster than bfloat16."""
        return self.seconds[BASELINE.name] / self.seconds[name]


def answer(asked: Asked, formats: tuple[Kept, ...]) -> Answer:
    """Raises ValueError where bfloat16 fits no number of chips."""
    chips = chips_needed(asked, BASELINE)
    found = {form.name: fastest(asked.job(chips, form)) for form in (BASELINE, *formats)}
    return Answer(
        chips=chips,
        seconds={name: each.seconds[0] for name, (_, each) in found.items()},
        mesh={name: choice.flags()[0].removeprefix("--mesh=") for name, (choice, _) in found.items()},
        memory={name: each.memory for name, (_, each) in found.items()},
    )


def chips_needed(asked: Asked, form: Kept) -> int:
    """The fewest, a power of two, on which some layout fits."""
    chips = 1
    while fastest(asked.job(chips, form)) is None:
        chips *= 2
        if chips > MOST_DEVICES:
            raise ValueError(f"{form.name} fits no {MOST_DEVICES} chips of {asked.chip}; ask for fewer rows or tokens")
    return chips


@functools.lru_cache(maxsize=4096)
def fastest(job: Job) -> tuple[Choice, estimate.Estimate] | None:
    """The layout that fits and takes the least time; None if none fits."""
    limit = memory.USABLE * topology.device(job.topology).memory
    expected = ((choice, estimate.of(job, choice)) for choice in layouts(job))
    fitting = (pair for pair in expected if pair[1].memory <= limit)
    return min(fitting, key=lambda pair: pair[1].seconds, default=None)


def layouts(job: Job) -> Iterator[Choice]:
    """Meshes of all devices over which rows and experts divide; what is beyond the heads goes to `tensor`."""
    size, experts = job.size, job.config.text.moe.num_experts
    for tensor in (2**n for n in range(size.bit_length())):
        apart = size // tensor
        for expert in (2**n for n in range(apart.bit_length())):
            if job.batch % apart == 0 and experts % expert == 0:
                sizes = {"data": apart // expert, "expert": expert, "tensor": tensor}
                mesh = tuple((axis, n) for axis, n in sizes.items() if n > 1)
                yield Choice(mesh=mesh, placement=partitioning.SERVE)


def dies(gains: Mapping[int, float], line: float) -> int | None:
    """The smallest batch from which on every gain is below `line`; None if that of the largest batch is not."""
    last = max((batch for batch, gain in gains.items() if gain >= line), default=0)
    return min((batch for batch in gains if batch > last), default=None)
