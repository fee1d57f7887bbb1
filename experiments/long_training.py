"""What a training step on very long rows takes of a TPU: with the hybrid layout, and if every layer were global.

Claim:     a training step of Scout on rows of 524,288 tokens, each shared by 64 chips, fits into the memory of a v5p chip,
           also if every layer attended to everything: keys travel, and no chip holds more than its piece of a row. What
           the hybrid layout of three chunked layers to a global one saves is wire and work.
Command:   python -m experiments.long_training
           python -m experiments.long_training --length=262144 --batch=2 --mesh=fsdp=2,expert=16,context=2
Hardware:  a CPU with the package libtpu (the extra [plan]) and 6 GB of memory; no TPU. Compiled, not run.
Wall time: 8 minutes of CPU time for Scout, whatever its depth; the second time seconds, from --answers.
Expected:  a chip's peak 36.1 GiB with the hybrid layout and 34.0 without, of 95; 224 and 573 GiB on the wire of a step, 126 and
           478 of them keys, values and their gradients; to a tenth, for it is a compiler's choice.

Memory and bytes are the compiler's, of the real step (`llama4_jax/plan`) with the placement `LONG`: rows in zig-zag order, with
documents that may begin anywhere. Attention is counted by formula, over one document a row.
"""

from __future__ import annotations

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is a library; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import dataclasses

from absl import app, flags
from tqdm import tqdm

from experiments import output
from llama4_jax import config as configs
from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.train import REMAT, TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.plan import topology
from llama4_jax.plan.compiler import Answers
from llama4_jax.plan.job import Choice, Job
from llama4_jax.train import shards

MODEL = flags.DEFINE_enum("model", "scout", sorted(presets.PRESETS), "which preset")
TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "kind of TPU and shape of the slice")
MESH = flags.DEFINE_string("mesh", "expert=16,context=4", "sizes of mesh axes; expert and context share a row")
BATCH = flags.DEFINE_integer("batch", 1, "rows, over all devices", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 524_288, "tokens of a row", lower_bound=1)
REMATERIALISE = flags.DEFINE_enum("remat", "block", sorted(REMAT), "what the backward pass finds")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.num_layers=8")
TRAIN = flags.DEFINE_multi_string("train", [], "training override, as accumulation=2")
ANSWERS = flags.DEFINE_string("answers", ".cache/plans", "folder of the compiler's answers")


def everything_global(config: Llama4Config) -> Llama4Config:
    """The same model, in which every layer attends to all that came before."""
    attention = dataclasses.replace(config.text.attention, nope_interval=1)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))


def compiled(config: Llama4Config) -> dict:
    """The outcome of `plan.job` for a training step of this model."""
    training = TrainConfig(steps=1000, compute_dtype="bfloat16", remat=REMATERIALISE.value, logits_limit=2**28)
    training = configs.apply(training, TRAIN.value)
    rows = {"batch": BATCH.value, "length": LENGTH.value}
    job = Job(config=config, mode="train", topology=TOPOLOGY.value, training=training, **rows)
    mesh = partitioning.make_mesh(shards.parse(MESH.value), job.devices)
    choice = Choice.of(mesh, partitioning.LONG, training)
    return job.outcome(choice, Answers(folder=pathlib.Path(ANSWERS.value)))


def main(_) -> None:
    output.quiet_libraries()
    config = configs.apply(presets.PRESETS[MODEL.value](), SET.value)
    models = {"hybrid": config, "all global": everything_global(config)}
    rows = {name: compiled(model) for name, model in tqdm(models.items(), desc="compiling", dynamic_ncols=True)}
    show(rows)
    asked = {"model": MODEL, "topology": TOPOLOGY, "mesh": MESH, "batch": BATCH, "length": LENGTH}
    output.finish({name: flag.value for name, flag in asked.items()} | rows)


def show(rows: dict[str, dict]) -> None:
    limit = topology.device(TOPOLOGY.value).memory
    print(f"\n{MODEL.value}, {BATCH.value} x {LENGTH.value:,} tokens, {TOPOLOGY.value}, {MESH.value}; of a device:")
    print(f"{'layers':11} {'peak GiB':>9} {f'of {limit:g}':>9} {'wire GiB':>9} {'attention PFLOP':>16}  wire by axes")
    for name, row in rows.items():
        if "memory_gib" not in row:
            print(f"{name:11} {limit + row['over_gib']:9.1f} {'too much':>9}")
            continue
        work, fits = row["work_of_a_device"], "fits" if row["fits"] else "too much"
        axes = ", ".join(f"{axes} {gib:.1f}" for axes, gib in work["wire_gib_by_axes"].items() if gib >= 0.05)
        numbers = f"{work['wire_gib']:9.1f} {row['attention_pflop_by_formula']:16.3f}"
        print(f"{name:11} {row['memory_gib']['peak']:9.1f} {fits:>9} {numbers}  {axes}")
    print()


if __name__ == "__main__":
    app.run(main)
