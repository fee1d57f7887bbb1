"""Decoding on this CPU with weights of float32, bfloat16, int8 and int4: one model, one run, ratios.

Claim: the 151M model of `hf_side_by_side` decodes with int8 and with int4 weights no slower than with float32, at batch 1.
Command: make bench, or python -m benchmarks.low_bit_cpu [--batches 1,8] [--json out.json]
Hardware: any quiet Linux machine with a C++ compiler; about 4 GB of memory. Wall time: about 3 minutes on 2 cores.
Method: `infer.generate` after 128 tokens of prompt, 32 steps, the steps alone; forms take turns, and a repetition during which
    other programs used the machine is thrown away. A machine that stays busy ends the run without a ratio.
    "products" are a step's matrix products alone, each form's weights read as in decoding: what bits can make faster. The
    rest of a step (attention, norms, routing, the calls themselves) is the same for all.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import machine, workload
from llama4_jax import infer
from llama4_jax.config import presets, quant
from llama4_jax.kernels import few_rows
from llama4_jax.model import Llama4, initialise
from llama4_jax.nn.linear import TransposedLinear
from llama4_jax.nn.moe import TransposedExperts
from llama4_jax.quant import ptq

TARGET = 1.0  # of float32's speed at batch 1, at least; 1.5 is aimed at
RECIPES = {"int8": quant.int8(), "int4": quant.int4_all(128), "w4a8": quant.w4a8(128)}
FORMS = ("float32", "bfloat16", *RECIPES)
MAX_DISCARDED = 12  # disturbed repetitions, after which the machine counts as loaded


def model(form: str) -> Llama4:
    """The 151M model with random weights, laid out for decoding."""
    dtype = form if form in ("float32", "bfloat16") else "float32"
    plain = initialise(presets.bench_151m(), dtype=dtype, scan=False)
    return infer.prepare(ptq.quantise(plain, RECIPES[form]) if form in RECIPES else plain)


def decoding(prepared: Llama4, batch: int) -> Callable[[], float]:
    """A call that returns the seconds of a step."""
    prompts = workload.prompts(batch=batch).tolist()

    def generate(count: int) -> float:
        with workload.timed() as timing:
            infer.generate(prepared, prompts, max_new_tokens=count)
        return timing["seconds"]

    return lambda: workload.decode_seconds(generate)["seconds"] / workload.DECODE_STEPS


def products(prepared: Llama4, batch: int) -> Callable[[], float]:
    """A call that returns the seconds of a step's matrix products, one after another, each token with one expert."""
    kinds = (TransposedLinear, TransposedExperts)
    nodes = jax.tree.leaves(prepared, is_leaf=lambda node: isinstance(node, kinds))
    modules = [node for node in nodes if isinstance(node, kinds)]
    sizes = jnp.zeros(prepared.config.text.moe.num_experts, jnp.int32).at[0].set(batch)
    x = jnp.ones((batch, 1), prepared.norm.scale.dtype)

    @jax.jit
    def run(modules, x):
        for module in modules:
            experts = isinstance(module, TransposedExperts)
            k = module.gate_up.shape[2] if experts else module.kernel.shape[1]
            rows = jnp.broadcast_to(x, (batch, k))
            y = module(rows, sizes) if experts else few_rows.multiply(rows, module.kernel[...], module.activations)
            x = x + (1e-6 * jnp.sum(y)).astype(x.dtype)  # as a model's layers, each waits for the last
        return x

    def seconds() -> float:
        with workload.timed() as timing:
            for _ in range(workload.DECODE_STEPS):
                jax.block_until_ready(run(modules, x))
        return timing["seconds"] / workload.DECODE_STEPS

    return seconds


def weight_bytes(prepared: Llama4) -> float:
    """What a step reads of matrices at batch 1: all but the table, and one of the experts."""
    experts = prepared.config.text.moe.num_experts
    leaves = jax.tree.leaves_with_path(prepared)
    size = lambda path, leaf: leaf.nbytes / (experts if "experts" in jax.tree_util.keystr(path) else 1)  # noqa: E731
    return sum(size(path, leaf) for path, leaf in leaves if "embed" not in jax.tree_util.keystr(path))


def measured(calls: dict[str, Callable[[], float]], repeats: int, anyway: bool) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, taking turns; what other programs disturbed is done again."""
    samples, discarded = {name: [] for name in calls}, 0
    for call in calls.values():
        call()  # compiles
    while min(map(len, samples.values())) < repeats:
        for name, call in calls.items():
            time.sleep(0.1)  # threads of the last spin for a while
            before = machine.snapshot()
            seconds = call()
            share = machine.foreign_share(before, machine.snapshot())
            if anyway or share <= machine.FOREIGN_SHARE:
                samples[name].append(seconds)
                continue
            discarded += 1
            if discarded > MAX_DISCARDED:
                raise machine.Loaded(f"{discarded} repetitions were disturbed, the last by {share:.0%} of the cores")
    return samples


def line(kind: str, batch: int, samples: dict[str, list[float]], ratios: bool) -> str:
    """Milliseconds of each form, and float32's over it."""
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in samples.items()}
    cells = [f"{ms[name]:8.3f}" + (f" {ms['float32'] / ms[name]:5.2f}x" if ratios else "") for name in FORMS]
    return f"{kind:<10}{batch:>6}  " + "".join(f"{cell:>17}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--anyway", action="store_true", help="measure on a loaded machine too: no ratios then")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    arguments = parser.parse_args()
    try:
        if not arguments.anyway:
            machine.require_quiet(check_average=True)
        models = {form: model(form) for form in FORMS}
        print("MB read a token: " + ", ".join(f"{form} {weight_bytes(m) / 1e6:.1f}" for form, m in models.items()))
        print(f"{'ms a step':<10}{'batch':>6}  " + "".join(f"{form:>17}" for form in FORMS))
        figures = []
        for batch in map(int, arguments.batches.split(",")):
            for kind, make in (("decode", decoding), ("products", products)):
                calls = {form: make(prepared, batch) for form, prepared in models.items()}
                samples = measured(calls, arguments.repeats, arguments.anyway)
                print(line(kind, batch, samples, not arguments.anyway), flush=True)
                figures.append({"kind": kind, "batch": batch, "seconds": samples})
    except machine.Loaded as loaded:
        sys.exit(f"No ratios: {loaded}")
    if not arguments.anyway:
        first = {name: statistics.median(seconds) for name, seconds in figures[0]["seconds"].items()}
        worst = min(first["float32"] / first[form] for form in ("int8", "int4"))
        print(f"float32 over the slower of int8 and int4 at batch {figures[0]['batch']}: {worst:.2f}, target {TARGET}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": figures, "ratios": not arguments.anyway}, indent=1) + "\n")


if __name__ == "__main__":
    main()
