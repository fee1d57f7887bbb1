"""Time to compile one training step of a shallow and a deep model: scanned layers should make them equal.

    python -m benchmarks.compile_time [--depths 8 48] [--repeats 3] [--json PATH]

Both depths are compiled in turn in one process, without the compilation cache, and the best of the repeats is printed.
Seconds are of processor time, over all threads: other programs on the machine then hardly matter. Target: the ratio is
at most 1.2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config import presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4
from llama4_jax.train import losses, optim, state, step


def compile_step(depth: int, *, batch: int = 2, length: int = 128) -> dict[str, float]:
    """Processor seconds of tracing and compiling the whole training step of the nano model (text) at `depth` layers."""
    nano = presets.nano()
    text = dataclasses.replace(nano.text, num_layers=depth)
    config = dataclasses.replace(nano, text=text, vision=None, patch_token=None)
    run = TrainConfig(steps=100)
    optimizer = optim.make(run.optimizer, run.steps)
    structure, params = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))
    abstract_state = jax.eval_shape(lambda p: state.create(p, optimizer), params)
    integers = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    abstract_batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), integers)
    abstract_batch["loss_weights"] = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    objective = functools.partial(losses.next_token, config=run)
    take = step.make(structure, objective, optimizer, run, config.text)
    begin = time.process_time()
    lowered = take.lower(abstract_state, abstract_batch)
    traced = time.process_time()
    lowered.compile()
    done = time.process_time()
    return {"trace": traced - begin, "compile": done - traced, "total": done - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs=2, default=(8, 48), help="layers of the two models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    best: dict[int, dict[str, float]] = {}
    for _ in range(arguments.repeats):
        for depth in arguments.depths:
            jax.clear_caches()
            seconds = compile_step(depth)
            if depth not in best or seconds["total"] < best[depth]["total"]:
                best[depth] = seconds
    shallow, deep = arguments.depths
    for depth in arguments.depths:
        print(f"{depth:3d} layers: trace {best[depth]['trace']:.2f}, compile {best[depth]['compile']:.2f} CPU seconds")
    ratio = best[deep]["total"] / best[shallow]["total"]
    print(f"ratio {ratio:.2f} (target at most 1.2)")
    if arguments.json:
        arguments.json.write_text(json.dumps({"layers": best, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
