"""Our model and Hugging Face transformers' on the same weights, tokens and machine, in one run: ratios, not boasts.

Claim: on the same random 151M-parameter Llama 4 (8 mixture layers, 8 experts, top-1) on a CPU, this project beats the
    better of torch's sdpa and torch.compile: prefill of 1024 tokens, decoding at batch 1 and 8 (prompt 128, 32 steps),
    one AdamW step of 4 x 512 tokens, and the peak memory of that step.
Command: make bench, or in the environment with the extra [parity]: python -m benchmarks.hf_side_by_side --json out.json
Hardware: any quiet Linux machine; about 4 GB of memory. Wall time: 10 to 15 minutes on 2 cores, both dtypes.
Method: each side is a process of its own, only one works at a time, repetitions alternate, logits are compared before
    anything is timed. A repetition during which other programs used the machine is thrown away, and a machine that
    stays busy ends the run without a ratio.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from benchmarks import machine, report
from benchmarks.worker import ROOT, Worker

CASES = ("prefill", "decode1", "decode8", "train")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Weights and arithmetic of both sides.")
RUN_CASES = flags.DEFINE_list("cases", [*CASES, "memory"], "What to compare.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Repetitions of each case and side.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random weights.")
ANYWAY = flags.DEFINE_bool("anyway", False, "Measure on a loaded machine too: seconds are printed, ratios are not.")
JSON = flags.DEFINE_string("json", None, "Write the numbers here as one JSON object.")

SIDES = (("ours", ""), ("hf", "sdpa"), ("hf", "compile"))
MODULES = {"ours": "benchmarks.jax_side", "hf": "benchmarks.hf_side"}
MAX_LOGIT_DIFFERENCE = 2e-4  # fp32: rounding of two different orders of summation
MAX_BF16_DIFFERENCE = 0.05  # of the logits' standard deviation, on average: bf16 keeps 8 bits a layer
MAX_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a loss of about 10
MAX_DISCARDED = 12  # disturbed repetitions a case, after which the machine counts as loaded
SETTLE_SECONDS = 0.3  # thread pools spin for a while after their work; the next side should not feel it


def main(argv):
    del argv
    try:
        if not ANYWAY.value:
            machine.require_quiet(check_average=True)
        folder = _checkpoint(SEED.value)
        results = {dtype: compare(folder, dtype) for dtype in DTYPES.value}
    except machine.Loaded as loaded:
        sys.exit(f"No ratios: {loaded}")
    print(report.table(results, ratios=not ANYWAY.value))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(report.numbers(results, ratios=not ANYWAY.value), indent=1))


def compare(folder: pathlib.Path, dtype: str) -> dict:
    """All cases at one dtype: {case: {side: [seconds or bytes of each repetition]}}, and the agreement of logits."""
    results = {}
    with Worker(MODULES["ours"]) as ours, Worker(MODULES["hf"]) as hf:
        workers = {"ours": ours, "hf": hf}
        for worker in workers.values():
            worker.call("load", folder=str(folder), dtype=dtype)
        results["agreement"] = _agreement(workers, dtype)
        for case in RUN_CASES.value:
            if case in CASES:
                results[case] = _alternate(workers, case, dtype)
    if "memory" in RUN_CASES.value:
        results["memory"] = _memory(folder, dtype)
    return results


def _alternate(workers: dict[str, Worker], case: str, dtype: str) -> dict[str, list[dict]]:
    """Repetitions of one case, the sides taking turns."""
    samples: dict[str, list[dict]] = {}
    for side, variant in SIDES:
        try:
            seconds = workers[side].call("prepare", case=case, variant=variant)
        except RuntimeError as error:
            print(f"{dtype} {case}: {side} {variant} does not run and is left out: {error}", flush=True)
            continue
        samples[_label(side, variant)] = []
        print(f"{dtype} {case}: {side} {variant} ready after {seconds:.1f} s", flush=True)
    discarded = 0
    for _ in range(REPEATS.value):
        for side, variant in SIDES:
            if _label(side, variant) not in samples:
                continue
            for sample, share in _attempts(workers, side, case, variant):
                if ANYWAY.value or share <= machine.FOREIGN_SHARE:
                    samples[_label(side, variant)].append(sample)
                    break
                discarded += 1
                if discarded > MAX_DISCARDED:
                    raise machine.Loaded(
                        f"{discarded} repetitions of {dtype} {case} were disturbed by other programs, the last one "
                        f"by {share:.0%} of the cores. Stop them and run this again."
                    )
    for side, variant in SIDES:
        if _label(side, variant) in samples:
            workers[side].call("release", case=case, variant=variant)
    return samples


def _attempts(workers: dict[str, Worker], side: str, case: str, variant: str) -> Iterator[tuple[dict, float]]:
    """Repetitions of one case on one side, each with the share of the cores that other programs took meanwhile."""
    pids = [worker.pid for worker in workers.values()]
    while True:
        time.sleep(SETTLE_SECONDS)
        before = machine.snapshot(pids)
        sample = workers[side].call("run", case=case, variant=variant)
        yield sample, machine.foreign_share(before, machine.snapshot(pids))


def _memory(folder: pathlib.Path, dtype: str) -> dict[str, list[dict]]:
    """Peak resident memory of a training step, each side in a fresh process."""
    samples = {}
    for side, variant in SIDES:
        with Worker(MODULES[side]) as worker:
            worker.call("load", folder=str(folder), dtype=dtype)
            try:
                samples[_label(side, variant)] = [worker.call("train_memory", variant=variant)]
            except RuntimeError as error:
                print(f"{dtype} memory: {side} {variant} does not run and is left out: {error}", flush=True)
    losses = {side: sample[0]["loss"] for side, sample in samples.items()}
    print(f"{dtype}: losses of the first training step are {losses}", flush=True)
    if max(losses.values()) - min(losses.values()) > MAX_LOSS_DIFFERENCE[dtype]:
        sys.exit(f"The sides do not train on the same {dtype} loss, so comparing the steps says nothing: {losses}")
    return samples


def _agreement(workers: dict[str, Worker], dtype: str) -> dict[str, float]:
    """Compares the logits of both sides; ends the run if they are not those of the same model."""
    logits = {}
    for side, worker in workers.items():
        path = ROOT / ".cache" / "bench" / f"logits_{side}_{os.getpid()}.npy"
        worker.call("logits", path=str(path))
        logits[side] = np.load(path)
        path.unlink()
    difference = np.abs(logits["ours"] - logits["hf"])
    found = {
        "max_difference": float(difference.max()),
        "mean_difference_in_deviations": float(difference.mean() / logits["hf"].std()),
        "same_argmax": float(np.mean(logits["ours"].argmax(-1) == logits["hf"].argmax(-1))),
    }
    print(f"{dtype}: logits agree as {found}", flush=True)
    exact = found["max_difference"] <= MAX_LOGIT_DIFFERENCE
    close = found["mean_difference_in_deviations"] <= MAX_BF16_DIFFERENCE
    if not (exact if dtype == "float32" else close):
        sys.exit(f"The two sides do not compute the same {dtype} model, so timing them says nothing: {found}")
    return found


def _checkpoint(seed: int) -> pathlib.Path:
    """The folder with the random weights that both sides load; made by transformers the first time."""
    folder = ROOT / ".cache" / "bench" / f"hf_151m_seed{seed}"
    if not (folder / "config.json").exists():
        with Worker(MODULES["hf"]) as worker:
            millions = worker.call("make", folder=str(folder), seed=seed)
        print(f"wrote {millions:.1f}M random parameters to {folder}", flush=True)
    return folder


def _label(side: str, variant: str) -> str:
    return f"{side} {variant}".strip()


if __name__ == "__main__":
    app.run(main)
