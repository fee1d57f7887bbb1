"""What the TPU kernels of few-bit products should take, by the compiler: `make bench-kernels`. Estimates, not measured.

    python -m benchmarks.kernels [--chips v5e,v6e] [--json PATH]

For each chip: 32 rows with one matrix of Scout, 5120 x 8192, and its bytes, the time that reading them takes at the stated
bandwidth ("floor"), and the compiler's schedule. The greater of the two is compared with its target. Then rows enough to fill
the matrix units, beside XLA's bfloat16 product, with outputs cut to 1024: a schedule of the whole would take minutes. The grouped
kernel is not here: its steps follow the rows, and libtpu aborts where it should foresee them. No device runs anything: a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from benchmarks import schedule
from benchmarks.schedule import Case
from llama4_jax.kernels.int4_matmul.workloads import EMBED, MLP
from llama4_jax.plan.topology import DEVICES

KINDS = {
    "bf16": {"values": None},
    "w4a16": {},
    "w4a8": {"activations": "int8"},
    "w8a16": {"values": "int8", "group": None},
}
# Greatest of schedule and floor, in microseconds, at 32 rows: multiples of 28.2, 14.1 and 8.4, what reading int4 takes.
TARGETS = {
    ("v5e", "w4a8"): 1.10 * 28.2,
    ("v5e", "w4a16"): 1.20 * 28.2,
    ("v6e", "w4a8"): 1.30 * 14.1,
    ("v6e", "w4a16"): 1.30 * 14.1,
    ("v5p", "w4a8"): 1.5 * 8.4,
    ("v5p", "w4a16"): 1.5 * 8.4,
}
MOST_MOVED = 1.05  # times the packed weight, its scales, rows and results
LEAST_RATE = {"v5e": 0.9}  # of 2048 rows: times that of bfloat16


def smallest(case: Case) -> int:
    """Bytes of the packed weight, its bfloat16 scales, and rows and results in bfloat16."""
    bits = {None: 16, "int4": 4, "int8": 8}[case.values]
    groups = 0 if case.values is None else 1 if case.group is None else case.inputs // case.group
    matrices = 1 if case.group_sizes is None else sum(size > 0 for size in case.group_sizes)
    weight = matrices * case.outputs * (case.inputs * bits // 8 + 2 * groups)
    return weight + 2 * case.rows * (case.inputs + case.outputs)


def cases() -> dict[tuple[str, str], Case]:
    """By part of the table and kind of product."""
    few = {("32 rows", kind): Case(rows=32, inputs=EMBED, outputs=MLP, **how) for kind, how in KINDS.items()}
    many = {
        ("2048 rows", kind): Case(rows=2048, inputs=EMBED, outputs=1024, **KINDS[kind])
        for kind in ("bf16", "w4a16", "w4a8")
    }
    return few | many


def row(chip: str, part: str, kind: str, case: Case, result: dict, bf16: dict) -> dict:
    """One line of the table."""
    figures = {"chip": chip, "part": part, "kind": kind, "moved_mb": result["bytes"] / 1e6}
    floor = result["bytes"] / DEVICES[chip].hbm
    figures |= {"moved_ratio": result["bytes"] / smallest(case), "floor_us": 1e6 * floor}
    figures |= {"schedule_us": 1e6 * result["seconds"], "time_us": 1e6 * max(floor, result["seconds"])}
    if part == "32 rows" and (chip, kind) in TARGETS:
        figures["target_us"] = TARGETS[chip, kind]
        figures["reached"] = figures["time_us"] <= figures["target_us"] and figures["moved_ratio"] <= MOST_MOVED
    if part == "2048 rows":
        figures["rate_to_bf16"] = bf16["seconds"] / result["seconds"]
        if kind == "w4a16" and chip in LEAST_RATE:
            figures["reached"] = figures["rate_to_bf16"] >= LEAST_RATE[chip]
    return figures


def show(figures: dict) -> str:
    text = "".join(f"{figures[name]:<11}" for name in ("chip", "part", "kind"))
    names = ("moved_mb", "moved_ratio", "floor_us", "schedule_us", "time_us", "target_us", "rate_to_bf16")
    text += "".join(f"{figures[name]:>13.2f}" if name in figures else " " * 13 for name in names)
    return text + {True: "  reached", False: "  MISSED", None: ""}[figures.get("reached")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(schedule.CLOCK))
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    print("every figure is an estimate by the compiler's schedule, not measured; for tpu7x it writes none")
    heads = ("moved MB", "x smallest", "floor us", "schedule us", "greater us", "target us", "rate / bf16")
    print(f"{'chip':<11}{'part':<11}{'kind':<11}" + "".join(f"{head:>13}" for head in heads))
    rows = []
    for chip in arguments.chips.split(","):
        named = cases()
        results = {}
        for (part, kind), result in zip(named, schedule.estimate(chip, list(named.values()))):
            results[part, kind] = result
            if "error" in result:
                print(f"{chip:<11}{part:<11}{kind:<11}{result['error']}", flush=True)
                continue
            rows.append(row(chip, part, kind, named[part, kind], result, results.get((part, "bf16"))))
            print(show(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
