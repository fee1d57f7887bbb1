"""What a training, prefill or decoding step needs and costs on TPUs that are not here, compiled by their own compiler.

Claim:     a layout fits a pod, or by how much it does not, before anyone rents one; memory, products and bytes are those
           of the real program, times are estimates and not measured.
Command:   python -m experiments.plan --model=scout --mode=train --topology=v5p:4x4x8 --mesh=fsdp=8,expert=16 \
               --batch=256 --length=8192 --remat=block --json=plan.json
           python -m experiments.plan --model=scout --mode=decode --topology=v5e:4x4 --mesh=tensor=8,expert=2 --batch=16
Hardware:  a CPU with the package libtpu (the extra [plan]); no TPU.
Wall time: seconds for small models, minutes for Scout and Maverick, whatever their depth.
Expected:  docs/sharding.md.

`--set` changes the model, `--train` the training, as in pretrain_nano.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is a library; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import resource

from absl import app, flags

from experiments import output
from llama4_jax import config as configs
from llama4_jax.config import presets
from llama4_jax.config.train import REMAT, TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.model import accounting
from llama4_jax.plan import programs, report, topology
from llama4_jax.train import shards

MODEL = flags.DEFINE_enum("model", "scout", sorted(presets.PRESETS), "which preset")
MODE = flags.DEFINE_enum("mode", "train", ["train", "prefill", "decode"], "which step")
TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x8", "kind of TPU and shape of the slice")
MESH = flags.DEFINE_string("mesh", "fsdp=-1", "sizes of mesh axes; -1 takes what is left")
BATCH = flags.DEFINE_integer("batch", 256, "rows, over all devices")
LENGTH = flags.DEFINE_integer("length", 8192, "tokens of a row; in decoding, slots of the cache")
REMATERIALISE = flags.DEFINE_enum("remat", "block", sorted(REMAT), "what the backward pass finds")
SET = flags.DEFINE_multi_string("set", [], "model override, as text.num_layers=8")
TRAIN = flags.DEFINE_multi_string("train", [], "training override, as accumulation=2")


def lower(config, mesh) -> programs.Step:
    """The step that the flags ask for."""
    if MODE.value != "train":
        make = programs.prefill if MODE.value == "prefill" else programs.decode
        return make(config, mesh, batch=BATCH.value, length=LENGTH.value)
    train = TrainConfig(steps=1000, compute_dtype="bfloat16", remat=REMATERIALISE.value, logits_limit=2**28)
    train = configs.apply(train, TRAIN.value)
    return programs.train(config, train, mesh, batch=BATCH.value, length=LENGTH.value)


def flops(config, devices: int) -> tuple[float, float, float]:
    """Tokens of a step; a device's FLOPs of attention; and those that the model, without recomputing, takes."""
    tokens = BATCH.value * (1 if MODE.value == "decode" else LENGTH.value)
    forward = accounting.forward_flops(config, LENGTH.value)
    recomputed = REMATERIALISE.value in ("block", "shared")
    passes = (4 if recomputed else 3) if MODE.value == "train" else 1
    attention = report.attention_flops(config, LENGTH.value, tokens / devices, passes)
    return tokens, attention, tokens * forward * (3 if MODE.value == "train" else 1) / devices


def advice(over: float) -> str:
    """What to change for a program that is `over` GiB too large; the nearest first."""
    if MODE.value == "train" and REMATERIALISE.value != "block":
        return f"does not fit by {over:.2f} GiB a device; nearest: --remat=block"
    if MODE.value == "train":
        return f"does not fit by {over:.2f} GiB a device; nearest: --train accumulation=2, then more devices"
    return f"does not fit by {over:.2f} GiB a device; nearest: a larger tensor axis, then a smaller batch"


def main(_) -> None:
    output.quiet_libraries()
    config = configs.apply(presets.PRESETS[MODEL.value](), SET.value)
    device, devices = topology.device(TOPOLOGY.value), topology.devices(TOPOLOGY.value)
    mesh = partitioning.make_mesh(shards.parse(MESH.value), devices)
    step = lower(config, mesh)
    compiled = report.compile_step(step.lowered)
    parameters = accounting.parameters(config)
    results = {name: flag.value for name, flag in (("model", MODEL), ("mode", MODE), ("topology", TOPOLOGY))}
    results |= {"mesh": MESH.value, "batch": BATCH.value, "length": LENGTH.value, "remat": REMATERIALISE.value}
    results |= {"parameters": parameters.total, "active_parameters": parameters.active, "devices": len(devices)}
    results |= {"compile_seconds": compiled.seconds}
    if compiled.program is None:
        results |= {"fits": False, "verdict": advice(compiled.over)}
    else:
        memory, counts = report.memory(compiled.program, step.arguments), report.counts(compiled.program, mesh)
        over = memory["peak"] - device.memory
        tokens, attention, model = flops(config, len(devices))
        estimates = report.estimates(device, counts, attention, model, tokens)
        loops_once = compiled.program.cost_analysis().get("optimal_seconds", float("nan"))
        results |= {"memory_gib": memory, "work_of_a_device": report.work(counts)}
        results |= {"attention_pflop_by_formula": attention / 1e15}
        results |= {"estimate_not_measured": estimates | {"compiler_seconds_loop_bodies_once": loops_once}}
        results |= {"fits": over <= 0, "verdict": "fits" if over <= 0 else advice(over)}
    results |= {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    output.finish(results)


if __name__ == "__main__":
    app.run(main)
