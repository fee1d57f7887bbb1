"""Makes the table of block sizes in `llama4_jax/kernels/int4_matmul/blocks.py`, by the compiler's schedules.

    python -m benchmarks.int4_blocks [--chips v5e,v6e]

For each chip, kind of product and number of rows it compiles blocks of several widths and prints the best, in the form that
the table has. Seconds are of a product with inputs 5120; estimates, not measured. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse

from benchmarks import schedule
from benchmarks.schedule import Case

KINDS = {
    "w4a16": {},
    "w4a8": {"activations": "int8"},
    "w8a16": {"values": "int8", "group": None},
    "w8a8": {"values": "int8", "group": None, "activations": "int8"},
}
WIDTHS = (512, 1024)  # of 256 and 2048 none was best
SIZES = ((32, 4096), (256, 2048))  # rows, outputs: one of each bucket


def best(chip: str, kind: str, rows: int, outputs: int) -> tuple[int, list[str]]:
    """The width whose schedule is shortest, and what each takes, in words."""
    cases = [
        Case(rows=rows, inputs=5120, outputs=outputs, columns=width, **KINDS[kind])
        for width in WIDTHS
        if width <= outputs
    ]
    found = {case.columns: result for case, result in zip(cases, schedule.estimate(chip, cases))}
    words = [f"{width}: " + _words(result) for width, result in found.items()]
    return min((width for width in found if "seconds" in found[width]), key=lambda w: found[w]["seconds"]), words


def _words(result: dict) -> str:
    return result["error"][:60] if "error" in result else f"{result['seconds'] * 1e6:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(schedule.CLOCK))
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    for chip in arguments.chips.split(","):
        for kind in arguments.kinds.split(","):
            widths = []
            for rows, outputs in SIZES:
                width, words = best(chip, kind, rows, outputs)
                widths.append(width)
                print(f"# {chip} {kind}, {rows} x 5120 x {outputs}: {', '.join(words)}", flush=True)
            print(f'("{chip}", "{kind}"): {tuple(widths)},', flush=True)
    print("# estimates by the compiler's schedule, not measured")


if __name__ == "__main__":
    main()
