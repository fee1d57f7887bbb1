"""From repetitions to the table and the JSON of `hf_side_by_side`: medians, bests, ratios, targets."""

from __future__ import annotations

import statistics

from benchmarks import workload

# Ours over the better of transformers' variants, in fp32. Memory is ours over theirs: at most.
TARGETS = {"prefill": 1.1, "decode1": 3.0, "decode8": 3.0, "train": 1.2, "memory": 0.8}
NAMES = {
    "prefill": "prefill, 1024 tokens",
    "decode1": "decode, batch 1",
    "decode8": "decode, batch 8",
    "train": "AdamW step, 4 x 512",
    "memory": "peak memory of the step",
}


def numbers(results: dict, *, ratios: bool) -> dict:
    """{dtype: {case: {sides: {side: {median, best, ...}}, ratio_median, ratio_best, target, met}}}.

    Figures are tokens/s, and bytes for memory; without `ratios` (a loaded machine) there is no comparison in it.
    """
    return {
        dtype: {
            case: samples if case == "agreement" else _case(case, samples, dtype, ratios)
            for case, samples in cases.items()
        }
        for dtype, cases in results.items()
    }


def table(results: dict, *, ratios: bool) -> str:
    """The figures for a person, a block for each dtype."""
    lines = []
    for dtype, cases in numbers(results, ratios=ratios).items():
        lines.append(f"\n{dtype}  (tokens/s, median of the repetitions and best; memory in MB)")
        sides = list(dict.fromkeys(side for case in cases.values() for side in case.get("sides", ())))
        header = "".join(f"{side:>20}" for side in sides)
        lines.append(f"{'':<26}{header}" + ("   ratio (median, best)   target" if ratios else ""))
        for case, found in cases.items():
            if case == "agreement":
                continue
            row = "".join(f"{_cell(case, found['sides'].get(side)):>20}" for side in sides)
            lines.append(f"{NAMES[case]:<26}{row}" + (_verdict(found) if ratios else ""))
    if not ratios:
        lines.append("\nNo ratios: --anyway was given, and on a loaded machine they would flatter one side.")
    return "\n".join(lines)


def _case(case: str, samples: dict[str, list[dict]], dtype: str, ratios: bool) -> dict:
    memory = case == "memory"
    sides = {
        side: _memory(repetitions) if memory else _speed(case, repetitions) for side, repetitions in samples.items()
    }
    if not ratios:
        return {"sides": sides}
    found = {"sides": sides, "target": TARGETS[case] if dtype == "float32" else None}
    rivals = {side: figures for side, figures in sides.items() if side.startswith("hf")}
    if "ours" in sides and rivals:
        choose = min if memory else max  # the rival that is hardest to beat
        found["best_rival"] = choose(rivals, key=lambda side: rivals[side]["median"])
        for figure in ("median", "best"):
            found[f"ratio_{figure}"] = sides["ours"][figure] / choose(rival[figure] for rival in rivals.values())
        if found["target"] is not None:
            ratio = found["ratio_median"]
            found["met"] = ratio <= found["target"] if memory else ratio >= found["target"]
    return found


def _speed(case: str, repetitions: list[dict]) -> dict:
    seconds = [repetition["seconds"] for repetition in repetitions]
    figures = {
        "median": workload.TOKENS[case] / statistics.median(seconds),
        "best": workload.TOKENS[case] / min(seconds),
        "seconds": seconds,
    }
    if "whole" in repetitions[0]:  # decoding with its prefill, first new token included
        new = workload.TOKENS[case] * (1 + 1 / workload.DECODE_STEPS)
        figures["median_with_prefill"] = new / statistics.median(repetition["whole"] for repetition in repetitions)
    return figures


def _memory(repetitions: list[dict]) -> dict:
    peaks = [repetition["peak"] for repetition in repetitions]
    return {"median": statistics.median(peaks), "best": min(peaks), **repetitions[0]}


def _cell(case: str, figures: dict | None) -> str:
    if figures is None:
        return "does not run"
    scale = 1e6 if case == "memory" else 1.0
    return f"{figures['median'] / scale:.1f} / {figures['best'] / scale:.1f}"


def _verdict(found: dict) -> str:
    if "ratio_median" not in found:
        return ""
    ratio = f"   {found['ratio_median']:>6.2f}, {found['ratio_best']:.2f}"
    if found["target"] is None:
        return ratio
    sign = "<=" if found["target"] < 1 else ">="
    return f"{ratio:<26}{sign} {found['target']} {'met' if found['met'] else 'MISSED'}"
