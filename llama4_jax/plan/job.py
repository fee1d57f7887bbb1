"""One question to the planner: a step of a model on a topology (`Job`), laid out in one way (`Choice`), and its answer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from llama4_jax.config import Llama4Config
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import MESH_AXES, Placement, TimeOrder
from llama4_jax.model import accounting
from llama4_jax.plan import conversion, memory, programs, report, topology
from llama4_jax.plan.compiler import Answers
from llama4_jax.plan.weights import PLAIN, Kept

MODES = ("train", "prefill", "decode", "conversion")
PLACEMENTS = {each.name: each for each in (partitioning.TRAIN, partitioning.LONG, partitioning.SERVE)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search varies. `mesh` holds the axes above 1, in the mesh's order; the last three fields are of training."""

    mesh: tuple[tuple[str, int], ...]
    placement: Placement
    remat: str = "block"
    accumulation: int = 1
    kept_in: str = "device"

    @classmethod
    def of(cls, mesh: Mesh, placement: Placement, training: TrainConfig) -> Choice:
        varied = {name: getattr(training, name) for name in ("remat", "accumulation", "kept_in")}
        axes = tuple((axis, size) for axis, size in mesh.shape.items() if size > 1)
        return cls(mesh=axes, placement=placement, **varied)

    @property
    def sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(MESH_AXES, 1) | dict(self.mesh)

    def ways(self, logical: str) -> int:
        """Into how many parts the placement splits a logical axis."""
        return math.prod(self.sizes[axis] for axis in self.placement.table.get(logical, ()))

    @property
    def imbalance(self) -> float:
        """Causal work of the busiest device over the mean, where rows of one document are shared in their own order."""
        return 1.0 if self.placement.order is TimeOrder.ZIGZAG else 2 - 1 / self.ways("time")

    def flags(self) -> tuple[str, ...]:
        """As `experiments.plan` takes them: mesh, placement, remat, accumulation, kept_in."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh) or "fsdp=1"
        found = (f"--mesh={mesh}", f"--placement={self.placement.name}", f"--remat={self.remat}")
        return (*found, f"--train accumulation={self.accumulation}", f"--train kept_in={self.kept_in}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked, however it is laid out.

    batch: rows, over all devices and microbatches; length: tokens of a row, in decoding slots of the cache.
    training: of a training step; remat, accumulation and kept_in are the choice's. kept: of a model that serves.
    """

    config: Llama4Config
    mode: str  # one of MODES
    topology: str
    batch: int
    length: int
    training: TrainConfig
    kept: Kept = PLAIN

    @functools.cached_property
    def devices(self) -> Sequence[jax.Device]:
        return topology.devices(self.topology)

    @property
    def size(self) -> int:
        """How many devices the topology has."""
        return topology.size(self.topology)

    @property
    def tokens(self) -> int:
        """Of a step, over all devices; a conversion reads none."""
        return {"decode": self.batch, "conversion": 0}.get(self.mode, self.batch * self.length)

    def settings(self, choice: Choice) -> TrainConfig:
        varied = {"remat": choice.remat, "accumulation": choice.accumulation, "kept_in": choice.kept_in}
        return dataclasses.replace(self.training, **varied)

    def lower(self, choice: Choice, mesh: Mesh) -> programs.Step:
        """The program; raises ValueError where sizes do not divide the mesh."""
        if self.mode == "conversion":
            return conversion.lower(self.config, mesh, placement=choice.placement)
        rows = {"batch": self.batch, "length": self.length, "placement": choice.placement}
        if self.mode == "train":
            return programs.train(self.config, self.settings(choice), mesh, **rows)
        return getattr(programs, self.mode)(self.config, mesh, **rows, kept=self.kept)

    def outcome(self, choice: Choice, answers: Answers) -> dict[str, Any]:
        """Memory, work and estimates of a device, and whether the program fits; `over_gib` says by how much it does not."""
        device, mesh = topology.device(self.topology), partitioning.make_mesh(dict(choice.mesh), self.devices)
        step = self.lower(choice, mesh)
        answer = answers.ask(step.lowered, self.topology, step.options)
        found = {name: getattr(answer, name) for name in ("compile_seconds", "host_gib", "recalled")}
        if answer.over:
            return found | {"fits": False, "over_gib": answer.over}
        sizes, counts = report.memory(answer, step.arguments), report.counts(answer.text, mesh)
        attention, model = self.attention_flops(choice), self.model_flops()
        to_host = 2 * answer.on_host * choice.accumulation  # there and back, in each microbatch
        estimates = report.estimates(device, counts, attention, model, self.tokens, to_host)
        # The compiler's own estimate counts loop bodies once, and is negative where it knows none.
        stated = {"compiler_seconds_loop_bodies_once": answer.schedule_seconds} if answer.schedule_seconds > 0 else {}
        over = answer.excess(device.memory * report.GIB) / report.GIB
        if self.mode == "conversion":
            found |= {"read_by_a_host_gib": conversion.read_by_host(step.arguments["checkpoint"]) / report.GIB}
        else:
            sizes |= {"activations_by_formula": self.activations(choice) / report.GIB}
        return found | {
            "memory_gib": sizes,
            "work_of_a_device": report.work(counts),
            "attention_pflop_by_formula": attention / 1e15,
            "estimate_not_measured": estimates | stated,
            "fits": over == 0,
            "over_gib": over,
        }

    def attention_flops(self, choice: Choice) -> float:
        """Of the busiest device."""
        rows = "shared rows" if choice.ways("time") > 1 else "whole rows"
        passes = report.attention_passes(choice.remat, rows) if self.mode == "train" else 1
        tokens = self.tokens / self.size
        return report.attention_flops(self.config, self.length, tokens, passes, choice.imbalance)

    def model_flops(self) -> float:
        """A device's share of what the model takes when nothing is computed twice."""
        passes = 3 if self.mode == "train" else 1
        return self.tokens * passes * accounting.forward_flops(self.config, self.length) / self.size

    def activations(self, choice: Choice) -> float:
        """Bytes of a device in closed form; they are part of the temporaries."""
        if self.mode == "train":
            return memory.train(self.config, self.settings(choice), batch=1, length=self.own_tokens(choice)).activations
        rows = math.ceil(self.batch / choice.ways("batch"))
        return memory.serve(
            self.config, memory.Storage(), batch=rows, context=self.length, prompt=self.tokens // self.batch
        ).activations

    def own_tokens(self, choice: Choice) -> int:
        """Tokens of a device and microbatch."""
        return math.ceil(self.tokens / choice.accumulation / choice.ways("batch") / choice.ways("time"))
