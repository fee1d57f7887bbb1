"""How a mixture-of-experts layer's time grows with the number of experts on the CPU: it should hardly grow.

    python -m benchmarks.moe_cpu [--tokens 8192] [--repeats 5] [--dtype float32] [--json PATH]

Times the routed part alone (sort, gather, both products of every expert, scatter) and the whole layer (router and
shared expert besides), forward and with all gradients, for 4, 16 and 64 experts of width 1024 at embed 512, while tokens
fall on the experts evenly, at random, nine tenths on one, or all on one. Below, one product by `lax.ragged_dot`. All cases
of a line take turns in one process and the best of the repeats counts. Milliseconds are of the clock; the last column
is the ratio of processor seconds, which other programs on the machine disturb less. Target: 64 / 4 at most 1.4, of the
whole layer.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import machine
from llama4_jax.config import MoeConfig
from llama4_jax.kernels.grouped_matmul import grouped_matmul, workloads
from llama4_jax.nn.dispatch import permute
from llama4_jax.nn.moe import Moe

EMBED, WIDTH = 512, 1024
EXPERTS = (4, 16, 64)
KINDS = ("even", "random", "skewed", "one")
TARGET = 1.4


def best_of(calls: dict[int, Callable], repeats: int) -> dict[int, tuple[float, float]]:
    """(milliseconds of the clock, of the processor) of each call: the least of `repeats` turns, after one to warm up."""
    best = dict.fromkeys(calls, (float("inf"), float("inf")))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            clock, processor = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(call())
            took = 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)
            del result
            if turn:
                best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def layer(num_experts: int, experts_of_tokens: jax.Array, dtype) -> tuple[Moe, jax.Array]:
    """A mixture and inputs [1 t d] whose first components, through a router that reads only those, name the expert."""
    moe = Moe(MoeConfig(num_experts=num_experts, expert_dim=WIDTH), EMBED, rngs=nnx.Rngs(0), dtype=dtype)
    moe.router.kernel[...] = 8 * jnp.eye(EMBED, num_experts, dtype=dtype)
    x = jax.random.normal(jax.random.key(1), (experts_of_tokens.size, EMBED), dtype)
    return moe, x.at[:, :num_experts].set(jax.nn.one_hot(experts_of_tokens, num_experts, dtype=dtype))[None]


def whole(moe: Moe, x: jax.Array) -> jax.Array:
    """The layer's output [1 t d]."""
    return moe(x, jnp.ones(x.shape[:2], bool))[0]


def routed(moe: Moe, x: jax.Array) -> jax.Array:
    """The routed experts' output [t d] without router and shared expert; the input names each token's expert."""
    x = x[0]
    experts = jnp.argmax(x[:, : moe.config.num_experts] == 1, axis=-1)
    order = jnp.argsort(experts)
    inverse = jnp.argsort(order)
    group_sizes = jnp.zeros(moe.config.num_experts, jnp.int32).at[experts].add(1)
    return permute(moe.experts(permute(x, order, inverse), group_sizes), inverse, order)


def ragged(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """One product by `lax.ragged_dot`, which costs experts-times the arithmetic on the CPU."""
    return grouped_matmul(lhs, rhs, group_sizes, implementation="ragged")


def passes(function: Callable, *arguments) -> dict[str, Callable]:
    """Calls without arguments: the function compiled, and its gradients in its first two arguments."""

    def loss(*args):
        return jnp.sum(jnp.square(function(*args).astype(jnp.float32)))

    forward, gradient = jax.jit(function), jax.jit(jax.grad(loss, (0, 1)))
    return {"forward": lambda: forward(*arguments), "gradient": lambda: gradient(*arguments)}


def report(part: str, kind: str, cases: dict[int, dict[str, Callable]], repeats: int) -> list[dict]:
    """Measures and prints one line for each pass, and returns the figures."""
    rows = []
    for name in ("forward", "gradient"):
        best = best_of({count: case[name] for count, case in cases.items()}, repeats)
        few, many = min(cases), max(cases)
        clock, processor = (best[many][i] / best[few][i] for i in (0, 1))
        milliseconds = "".join(f"{best[count][0]:9.1f}" for count in cases)
        print(f"{part:<12}{name:<10}{kind:<8}{milliseconds}{clock:8.2f}{processor:11.2f}", flush=True)
        rows.append({"part": part, "pass": name, "tokens": kind, "ratio": clock, "processor_ratio": processor})
        rows[-1]["milliseconds"] = {count: best[count][0] for count in cases}
    return rows


def ragged_cases(tokens: int, kind: str, dtype) -> dict[int, dict[str, Callable]]:
    """The product that makes gates and ups, for each number of experts."""
    cases = {}
    for count in EXPERTS:
        sizes = jnp.bincount(workloads.spread(tokens, count, kind), length=count).astype(jnp.int32)
        lhs, rhs = jnp.ones((tokens, EMBED), dtype), jnp.ones((count, EMBED, 2 * WIDTH), dtype)
        cases[count] = passes(ragged, lhs, rhs, sizes)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ragged_tokens", type=int, default=512, help="rows for ragged_dot, which is slow; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    arguments = parser.parse_args()
    dtype = jnp.dtype(arguments.dtype)
    before = machine.snapshot()
    counts = "".join(f"{count:>9}" for count in EXPERTS)
    print(f"{arguments.tokens} tokens, embed {EMBED}, expert width {WIDTH}, {dtype}; ms by number of experts")
    print(f"{'part':<12}{'pass':<10}{'tokens':<8}{counts}{'64 / 4':>8}{'processor':>11}")
    rows = []
    for kind in KINDS:
        made = {e: layer(e, workloads.spread(arguments.tokens, e, kind), dtype) for e in EXPERTS}
        for part, function in (("routed", routed), ("whole layer", whole)):
            cases = {e: passes(function, *made[e]) for e in EXPERTS}
            rows += report(part, kind, cases, arguments.repeats)
    if arguments.ragged_tokens:
        print(f"one product of {arguments.ragged_tokens} rows by lax.ragged_dot")
        rows += report("ragged_dot", "random", ragged_cases(arguments.ragged_tokens, "random", dtype), 2)
    worst = {part: max(row["ratio"] for row in rows if row["part"] == part) for part in ("whole layer", "routed")}
    foreign = machine.foreign_share(before, machine.snapshot())
    print(
        f"worst ratio of the whole layer {worst['whole layer']:.2f}, target {TARGET}, of its routed part {worst['routed']:.2f}"
    )
    print(f"other programs used {foreign:.0%} of the cores meanwhile")
    if arguments.json:
        figures = {"rows": rows, "worst_ratio": worst, "target": TARGET, "foreign_share": foreign}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
