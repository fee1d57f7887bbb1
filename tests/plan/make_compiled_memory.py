"""Makes tests/goldens/compiled_memory.json: the memory that the TPU compiler allots to real steps, for `test_memory.py`.

    python tests/plan/make_compiled_memory.py                 compile all of CASES for a v5e chip and write the golden
    python tests/plan/make_compiled_memory.py --case=NAME     compile one and print its numbers as JSON

Nothing is run and no chip is needed (pip install libtpu, the extra [plan]); a training step takes the compiler a minute or
two of two CPU cores, a decoding step seconds. The measure is `peak_memory_in_bytes`. Arguments and
temporaries added up are more than a chip must hold: of the case "adapters" with 180 rows they are 17.7 GiB, with a peak of
14.2, and it compiles for a chip of 16; with 220 rows it is refused. Sizes are such that the 128 MiB of on-chip
memory, which the compiler counts in with the rest, are little beside them, and heads have the chip's width of 128.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies

from llama4_jax import config as configs
from llama4_jax.config import Llama4Config, lora, presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import names, partitioning
from llama4_jax.model import Llama4
from llama4_jax.model import lora as adapters
from llama4_jax.train import losses, optim, state, step

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "goldens" / "compiled_memory.json"
NUMBERS = ("argument_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")
WIDE = ("text.attention.num_heads=4", "text.attention.num_kv_heads=2", "text.attention.head_dim=128")
SMALL = (*WIDE, "text.num_layers=4", "text.attention.nope_interval=1")
TARGETS = (*lora.ATTENTION, *lora.SHARED_EXPERTS, *lora.ROUTED_EXPERTS)
# mode, overrides of the preset bench_151m, rows, tokens a row, and what the mode wants to know
CASES = {
    "mixtures": ("train", SMALL, 8, 2048, "block"),
    "dense layers": ("train", (*SMALL, "text.moe.step=0", "text.mlp_dim=4096"), 8, 2048, "block"),
    "both, two experts a token": (
        "train",
        (*WIDE, "text.num_layers=4", "text.attention.nope_interval=2", "text.moe.step=2", "text.moe.top_k=2"),
        8,
        2048,
        "block",
    ),
    "nothing computed again": ("train", SMALL, 4, 1024, "none"),
    "adapters": ("lora", SMALL, 8, 2048, "block"),
    "decoding": ("serve", (*WIDE, "text.num_layers=4", "text.attention.nope_interval=2"), 4, 131_072, 1),
    "a prompt": ("serve", (*WIDE, "text.num_layers=4", "text.attention.nope_interval=2"), 4, 131_072, 2048),
}


def described(overrides) -> Llama4Config:
    return configs.apply(presets.bench_151m(), overrides)


def settings(remat: str) -> TrainConfig:
    return TrainConfig(steps=10, compute_dtype="bfloat16", remat=remat)


def low_rank() -> lora.LoraConfig:
    return lora.LoraConfig(rank=16, targets=TARGETS)


def batch_of(rows: int, length: int) -> dict:
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32) | {"loss_weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}


def train(config: Llama4Config, rows: int, length: int, remat: str):
    """The step of `train.step`, and its arguments."""
    structure, params = names.split(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0))))
    optimizer = optim.make(settings(remat).optimizer, settings(remat).steps)
    objective = functools.partial(losses.next_token, config=settings(remat))
    advance = step.make(structure, objective, optimizer, settings(remat), config.text)
    return advance, (
        jax.eval_shape(functools.partial(state.create, optimizer=optimizer), params),
        batch_of(rows, length),
    )


def tune(config: Llama4Config, rows: int, length: int, remat: str):
    """A step of AdamW on adapters alone, on a base of bfloat16."""
    model = jax.eval_shape(lambda: adapters.attach(Llama4(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), low_rank()))
    structure, trained, base = adapters.split(model)
    optimizer = optax.adamw(1e-3)
    objective = functools.partial(losses.next_token, config=settings(remat))

    def advance(trained, opt_state, base, batch):
        loss = lambda trained: objective(structure.merge(trained | base), batch, None).loss  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(trained), opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    arguments = (trained, jax.eval_shape(optimizer.init, trained), base, batch_of(rows, length))
    return jax.jit(advance, donate_argnums=(0, 1)), arguments


def serve(config: Llama4Config, rows: int, length: int, new: int):
    """A call of `new` tokens a row, with the layers as `infer.prepare` leaves them and a cache of `length` slots."""
    make = lambda: Llama4(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan=False)  # noqa: E731
    model, cache = jax.eval_shape(make), jax.eval_shape(lambda: make().init_cache(rows, length))

    def call(model, tokens, cache):
        out = model.hidden(tokens, cache=cache)
        return model.unembed(out.hidden[:, -1]), out.cache

    return jax.jit(call, donate_argnums=2), (model, jax.ShapeDtypeStruct((rows, new), jnp.int32), cache)


def compiled_memory(name: str) -> dict[str, int]:
    mode, overrides, *sizes = CASES[name]
    jax.config.update("jax_platforms", "cpu")
    # Read when libtpu starts: there is no metadata server to ask, and other programs may hold its lock.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = partitioning.make_mesh({}, topology.devices[:1])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        program, arguments = {"train": train, "lora": tune, "serve": serve}[mode](described(overrides), *sizes)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
        analysis = program.lower(*placed).compile().memory_analysis()
    return {number: getattr(analysis, number) for number in NUMBERS}


def in_a_process(name: str) -> dict[str, int]:
    """The same in a process of its own, which libtpu gets for itself. Raises RuntimeError if it does not compile."""
    done = subprocess.run([sys.executable, __file__, f"--case={name}"], capture_output=True, text=True, timeout=1800)
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return json.loads(done.stdout.splitlines()[-1])
    raise RuntimeError(f"case {name!r} did not compile:\n{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="compile one and print it")
    chosen = parser.parse_args().case
    if chosen:
        print(json.dumps(compiled_memory(chosen)))
        return
    found = {}
    for name in CASES:
        found[name] = in_a_process(name)
        print(f"{name:<28}{found[name]['peak_memory_in_bytes'] / 2**20:10.1f} MiB", flush=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
