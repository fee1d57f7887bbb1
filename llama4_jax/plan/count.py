"""What a compiled program does on one chip: products, bytes of HBM, and bytes on the wire by axis of the mesh.

`compiled.cost_analysis()` counts the body of a loop once. Here each body counts as often as it runs, which the loop's own
condition says; a loop whose count depends on data (as that over the key blocks that a mask leaves) counts once and is
named in `Counts.dynamic_loops`, or, where it exchanges rows in rounds, as often as their buffer fills at an even load. Of a
conditional the largest branch counts.

Bytes on the wire are those that one chip of n sends, in the usual ring: of an all-gather (n - 1) times its shard, of a
reduce-scatter (n - 1) / n of what goes in, of an all-reduce both. A ragged exchange counts at an even load: (n - 1) / n of
the smaller of its two buffers, a round's; the larger, of all rows, is `Counts.ragged_buffer`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping

from llama4_jax.plan import groups, loops, products, traffic
from llama4_jax.plan.hlo import Computation, Instruction, Program

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ATTENTION = re.compile(r"\battend\b")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over one run of a program, per chip. `totals` holds them by kind; the properties read it."""

    totals: Counter

    def __add__(self, other: Counts) -> Counts:
        return Counts(Counter({key: self.totals[key] + other.totals[key] for key in self.totals | other.totals}))

    def times(self, number: float) -> Counts:
        return Counts(Counter({key: number * value for key, value in self.totals.items()}))

    @property
    def attention_flops(self) -> float:
        """Of products within the scope `attend`, where loops over key blocks count once; see `dynamic_loops`."""
        return self.totals["flops", "attention"]

    @property
    def matrix_flops(self) -> float:
        """Of all other products."""
        return self.totals["flops", "rest"]

    @property
    def hbm_bytes(self) -> float:
        """Bytes that instructions read and write in HBM, each operand and result once."""
        return self.totals["hbm",]

    @property
    def wire(self) -> dict[tuple[str, str], float]:
        """Bytes that a chip sends, by (kind of collective, mesh axes)."""
        return {key[1:]: value for key, value in sorted(self.totals.items()) if key[0] == "wire"}

    @property
    def wire_bytes(self) -> float:
        return sum(self.wire.values())

    @property
    def wire_by_kind(self) -> dict[str, float]:
        return self._wire_by(0)

    @property
    def wire_by_axes(self) -> dict[str, float]:
        return self._wire_by(1)

    def _wire_by(self, part: int) -> dict[str, float]:
        sums = Counter()
        for key, value in self.wire.items():
            sums[key[part]] += value
        return dict(sums)

    @property
    def ragged_buffer(self) -> float:
        """Bytes of the largest buffer of a ragged exchange; 0 where there is none."""
        return max((key[1] for key in self.totals if key[0] == "ragged buffer"), default=0)

    @property
    def dynamic_loops(self) -> dict[str, int]:
        """Loops whose trip count depends on data, by the scope they were made in, and how often each is entered."""
        return {key[1]: int(value) for key, value in sorted(self.totals.items()) if key[0] == "dynamic loop"}


def count(program: Program, mesh: Mapping[str, int]) -> Counts:
    """Counts of one run on one chip of a mesh, given by its axes' sizes in order.

    Raises ValueError for replica groups that do not fit the mesh.
    """
    done: dict[str, Counts] = {}

    def of(name: str) -> Counts:
        if name not in done:
            computation = program.computations[name]
            parts = (_instruction(program, computation, each, mesh, of) for each in computation)
            done[name] = sum(parts, Counts(Counter()))
        return done[name]

    return of(program.entry)


def _instruction(program: Program, computation: Computation, each: Instruction, mesh, of) -> Counts:
    totals = Counter()
    if each.opcode == "while":
        trips = loops.trip_count(program, computation, each)
        body = of(each.called("body")[0]) + of(each.called("condition")[0])
        if trips is None:
            totals["dynamic loop", each.scope or each.name] += 1
            trips = _even_rounds(program.computations[each.called("body")[0]])
        return Counts(totals) + body.times(trips)
    if each.opcode == "conditional":
        branches = each.called("branch_computations", "true_computation", "false_computation")
        return max((of(name) for name in branches), key=lambda counts: (counts.matrix_flops, counts.hbm_bytes))
    if each.opcode in ("call", "async-start"):
        return sum((of(name) for name in each.called("to_apply", "calls")), Counts(totals))
    if each.opcode == "fusion":
        inside = of(each.called("calls")[0]).totals
        totals += Counter({key: value for key, value in inside.items() if key[0] != "hbm"})
    elif products.is_product(each):
        kind = "attention" if _ATTENTION.search(each.scope) else "rest"
        totals["flops", kind] += products.flops(computation, each)
    kind = each.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        totals += _sent(program, computation, each, kind, mesh)
    totals["hbm",] += traffic.hbm_bytes(program, computation, each)
    return Counts(totals)


def _even_rounds(body: Computation) -> int:
    """How often a loop exchanges rows if each device receives as many as it sends; 1 where it exchanges none."""
    first = next((each for each in body if each.opcode == "ragged-all-to-all"), None)  # out; results come back after
    if first is None:
        return 1
    rows, buffer = (operand.nbytes for operand in body.operands(first)[:2])
    return -(-rows // buffer)


def _sent(program: Program, computation: Computation, each: Instruction, kind: str, mesh) -> Counter:
    """What a chip sends for one collective."""
    operands = computation.operands(each)
    if kind == "collective-permute":
        axes, size = groups.of_pairs(each.attribute("source_target_pairs"), mesh)
    else:
        axes, size = groups.of_groups(each, mesh)
    totals = Counter()
    if size == 1:
        return totals
    n = sum(operand.nbytes for operand in operands)
    if kind == "all-reduce" and _is_scattered(program, computation, each):
        kind = "reduce-scatter"
    share = (size - 1) / size
    factor = {"all-gather": size - 1, "all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}
    if kind == "ragged-all-to-all":
        buffers = [operand.nbytes for operand in operands[:2]]
        n = min(buffers)
        totals["ragged buffer", max(buffers)] += 1
    totals["wire", kind, axes] += n * factor.get(kind, share)
    return totals


def _is_scattered(program: Program, computation: Computation, reduce: Instruction) -> bool:
    """Whether this all-reduce is how the TPU compiler writes a reduce-scatter: in a fusion that keeps a slice of it."""
    return computation.name.startswith("all-reduce-scatter") and not reduce.is_root
