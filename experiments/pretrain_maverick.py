"""Pretrain Llama 4 Maverick, 400B parameters of which 17B are active, on prepared text: the recipe for 128 TPU v5p chips.

Claim:     a step of 128 rows of 8,192 tokens, fp32 weights and AdamW state, bf16 compute, fits fsdp 4 x expert 32: 58.5 of a
           chip's 95 GiB, 129 GiB on the wire. Baseline: docs/sharding.md.
Command:   python -m experiments.prepare_text --folder=/data/text --tokenizer=tokenizer.model --builtin= --source=...
           python -m experiments.pretrain_maverick --cluster --data=/data/text --tokenizer=tokenizer.model --output=/data/maverick
           python -m experiments.pretrain_maverick --plan_only       (compiles this very step; no TPU is needed)
Hardware:  `python -m launch.gke --slice=v5p:4x4x8 ...`; --plan_only a CPU, 5 GiB of memory and the package libtpu.
Wall time: --plan_only 2 minutes. Estimates, not measured: 2.5 s a step at the least, by products alone; 416,000 tokens/s, so
           that 100,000 steps, 105 billion tokens, take 70 hours.
Expected:  it has run at toy size on CPUs alone (tests/experiments/test_pretrain_pod.py), never on TPUs; nothing was tuned.

All else is as in experiments.pretrain_scout.
"""

from __future__ import annotations

from absl import app

from experiments import output, pod
from llama4_jax.config.train import OptimizerConfig, TrainConfig

RECIPE = pod.Recipe(
    name="maverick",
    model="maverick",
    topology="v5p:4x4x8",
    mesh="fsdp=4,expert=32",
    batch=128,
    length=8192,
    train=TrainConfig(
        steps=100_000,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, beta2=0.95),
        compute_dtype="bfloat16",
        remat="block",
        balance_loss=0.01,
        z_loss=1e-4,
        logits_limit=2**28,
        save_every=500,
    ),
)


def main(_) -> None:
    if results := pod.run(RECIPE):
        output.finish(results)


if __name__ == "__main__":
    app.run(main)
