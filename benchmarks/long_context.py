"""Memory of a long forward pass on the CPU: it grows with the length, where one [t t] array would grow with its square.

    python -m benchmarks.long_context [--lengths 8192 16384 32768] [--json PATH]

The nano model without its vision tower runs one row of t tokens up to the last norm (`model.hidden`: no vocabulary). Each
length has a process of its own, whose peak (VmHWM, from when the program is compiled) is compared with that of a row of
1,024 tokens. Beside it stands what a single fp32 array [t t] would take; materialised scores need one for each head.
Target: the growth is below a tenth of that at 32,768 tokens, and doubling the length at most doubles it (10 % allowed).
Memory, unlike time, does not care how busy the machine is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib

from benchmarks import machine

BASE = 1024  # tokens of the row that the others are compared with
MOST_SHARE = 0.1  # of one [t t] array, that the growth may reach at the longest length
MOST_GROWTH = 2.83  # that a doubled length may bring: on a log scale midway from linear (2) to quadratic (4)


def peak_of_forward(length: int) -> int:
    """Bytes: the peak of this process while one row of `length` tokens goes through the model, weights and all."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from llama4_jax.config import presets
    from llama4_jax.model import Llama4

    nano = presets.nano()
    config = dataclasses.replace(nano, vision=None, patch_token=None)
    model = Llama4(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.text.vocab_size)
    run = jax.jit(lambda model, tokens: model.hidden(tokens).hidden).lower(model, tokens).compile()
    machine.peak_memory_reset()  # the compiler's own peak would hide that of short rows
    hidden = run(model, tokens)
    hidden.block_until_ready()
    peak = machine.peak_memory()
    if not bool(jnp.isfinite(hidden).all()):
        raise FloatingPointError(f"a forward pass of {length} tokens gave numbers that are not finite")
    return peak


def measure(length: int) -> int:
    """`peak_of_forward` in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=fresh) as pool:
        return pool.submit(peak_of_forward, length).result()


def figures(peaks: dict[int, int]) -> list[dict[str, float]]:
    """A record for each length but BASE, in bytes and ratios; `peaks` holds BASE too."""
    return [
        {
            "tokens": length,
            "peak": peak,
            "growth": peak - peaks[BASE],
            "square": 4 * length**2,
            "ratio": (peak - peaks[BASE]) / (4 * length**2),
        }
        for length, peak in sorted(peaks.items())
        if length != BASE
    ]


def verdict(records: list[dict[str, float]]) -> bool:
    """Whether the longest length stays below MOST_SHARE, and no growth outruns its length by more than MOST_GROWTH / 2."""
    linear = all(
        late["growth"] <= early["growth"] * (late["tokens"] / early["tokens"]) * MOST_GROWTH / 2
        for early, late in zip(records, records[1:])
    )
    return linear and records[-1]["ratio"] <= MOST_SHARE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16_384, 32_768], help="tokens in the row")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    arguments = parser.parse_args()
    records = figures({length: measure(length) for length in [BASE, *arguments.lengths]})
    print(f"{'tokens':>8} {'peak MB':>9} {'over 1k MB':>11} {'one [t t] MB':>13} {'ratio':>7}")
    for record in records:
        sizes = (record[name] / 1e6 for name in ("peak", "growth", "square"))
        print("{:8d} {:9.0f} {:11.0f} {:13.0f} {:7.4f}".format(record["tokens"], *sizes, record["ratio"]))
    met = verdict(records)
    print(f"grows with the length, and stays below {MOST_SHARE} of one [t t] array: {'met' if met else 'MISSED'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"base_tokens": BASE, "lengths": records, "met": met}, indent=1) + "\n")


if __name__ == "__main__":
    main()
