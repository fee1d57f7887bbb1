"""What do I need to run it: the memory of Scout, or any preset, in closed form against a table of chips.

Claim:     Scout in int4 answers with 262,144 tokens of context on one H100: 68 GiB, of which the hybrid cache is 13, where
           it would be 48 if every layer kept all tokens. In bfloat16 it takes four, and on RTX 4090 cards four in int4.
Command:   python -m experiments.hardware --model=scout --bits=4 --context=262144 --batch=1
           python -m experiments.hardware --model=scout --bits=4 --context=1000000 --cache=int8
           python -m experiments.hardware --model=maverick --mode=full --context=8192 --batch=256
Wall time: two seconds; nothing is compiled or measured. Hardware: none.
Expected:  68.1 GiB within 0.1; the formulas are within 10 % of compiled programs (see tests/plan/test_memory.py).

Modes: serve; lora (adapters on a frozen base); qat (all weights trained, rounded in each forward pass); full.
int8 and int4 weights have a bfloat16 scale for each group of --group numbers; norms, routers, the embedding table and
the vision tower stay bfloat16: these are the bytes of the recipes int4_all, int4_experts and int8 in groups (`config/quant.py`).
What compiled programs in low bits take besides is in docs/low_bit.md.
A run is cut evenly over a power of two of chips. Pictures are not counted beyond the weights that read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from absl import app, flags

from experiments import output
from llama4_jax.config import Llama4Config, lora, presets
from llama4_jax.config import apply as apply_overrides
from llama4_jax.config.train import REMAT as POLICIES
from llama4_jax.config.train import TrainConfig
from llama4_jax.model import accounting
from llama4_jax.plan import memory
from llama4_jax.plan.chips import CHIPS
from llama4_jax.plan.memory import GIB, Need, Scope, Storage

MODEL = flags.DEFINE_enum("model", "scout", sorted(presets.PRESETS), "the model")
SET = flags.DEFINE_multi_string("set", [], "change the model: a.b=c")
MODE = flags.DEFINE_enum("mode", "serve", ["serve", "lora", "qat", "full"], "what is done with it")
BITS = flags.DEFINE_enum("bits", "4", ["16", "8", "4"], "of a stored weight, in the answer; the tables have all")
QUANTISE = flags.DEFINE_enum("quantise", "all", [scope.value for scope in Scope], "which weights have those bits")
GROUP = flags.DEFINE_integer("group", 128, "numbers that share a scale", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 262_144, "tokens of a row", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 1, "rows at once", lower_bound=1)
CACHE = flags.DEFINE_enum("cache", "bfloat16", ["bfloat16", "int8"], "serve: dtype of keys and values")
PROMPT = flags.DEFINE_integer("prompt", 2048, "serve: tokens of a prompt that are read at once", lower_bound=1)
REMAT = flags.DEFINE_enum("remat", "block", sorted(POLICIES), "training: what the backward pass finds")
RANK = flags.DEFINE_integer("rank", 16, "lora: rank of the adapters", lower_bound=1)
TARGETS = flags.DEFINE_list("targets", "attention,shared", "lora: of attention, dense, shared and routed")
USABLE = flags.DEFINE_float("usable", memory.USABLE, "share of a chip's memory to fill", 0.01, 1.0)

GROUPS = {
    "attention": lora.ATTENTION,
    "dense": lora.DENSE,
    "shared": lora.SHARED_EXPERTS,
    "routed": lora.ROUTED_EXPERTS,
}


def columns() -> dict[str, Storage]:
    """Label -> how weights are stored, for every column of the tables."""
    if MODE.value == "full":
        return {"float32": Storage()}  # none are stored in any other way
    found = {} if MODE.value == "qat" else {"bf16": Storage()}
    for bits in (8, 4):
        for scope in Scope:
            found[label(bits, scope)] = Storage(bits=bits, scope=scope, group=GROUP.value)
    return found


def label(bits: int, scope: Scope) -> str:
    return "bf16" if bits == 16 else f"int{bits}" + (" experts" if scope is Scope.EXPERTS else "")


def answer() -> str:
    """The label of the column that --bits and --quantise name."""
    if MODE.value == "qat" and BITS.value == "16":
        raise app.UsageError("--mode=qat --bits=16: nothing would be rounded; use --bits=8 or 4, or --mode=full")
    return "float32" if MODE.value == "full" else label(int(BITS.value), Scope(QUANTISE.value))


def adapters() -> lora.LoraConfig:
    unknown = sorted(set(TARGETS.value) - set(GROUPS))
    if unknown or not TARGETS.value:
        raise app.UsageError(f"--targets={','.join(TARGETS.value)}: wanted some of {', '.join(GROUPS)}")
    return lora.LoraConfig(rank=RANK.value, targets=sum((GROUPS[name] for name in TARGETS.value), ()))


def need_of(config: Llama4Config, storage: Storage) -> Callable[[int], Need]:
    """What the chosen mode needs, of the tokens in a row."""
    settings = TrainConfig(steps=1, compute_dtype="bfloat16", remat=REMAT.value)
    rows = {"batch": BATCH.value}
    return {
        "serve": lambda length: memory.serve(
            config, storage, context=length, prompt=PROMPT.value, cache=CACHE.value, **rows
        ),
        "lora": lambda length: memory.lora(config, settings, storage, adapters(), length=length, **rows),
        "qat": lambda length: memory.qat(config, settings, storage, length=length, **rows),
        "full": lambda length: memory.train(config, settings, length=length, **rows),
    }[MODE.value]


def show_needs(needs: dict[str, Need]) -> None:
    print("\nGiB in all" + "".join(f"{name:>14}" for name in needs))
    for field in dataclasses.fields(Need)[:-1]:
        if any(getattr(need, field.name) for need in needs.values()):
            print(
                f"{field.name:<11}" + "".join(f"{getattr(need, field.name) / GIB:13,.2f} " for need in needs.values())
            )
    print(f"{'total':<11}" + "".join(f"{need.per_chip(1) / GIB:13,.2f} " for need in needs.values()))


def show_chips(needs: dict[str, Need], longest: dict[str, int]) -> None:
    labels = "".join(f"{name:>14}" for name in needs)
    print(f"\nchips needed  GiB{labels}   on one, {answer()}: longest row")
    for chip in CHIPS:
        counts = (memory.chips_needed(need, chip.memory * GIB, USABLE.value) for need in needs.values())
        cells = "".join(f"{count or '-':>14}" for count in counts)
        tokens = f"{longest[chip.name]:,} tokens" if longest[chip.name] else "does not fit"
        print(f"{chip.name:<12}{chip.memory:5.0f}{cells}   {tokens:>26}")


def results_of(config: Llama4Config, need: Need, longest: dict[str, int]) -> dict:
    found = {field.name: getattr(need, field.name) / GIB for field in dataclasses.fields(need)}
    found["total"] = need.per_chip(1) / GIB
    if need.cache:
        attention = dataclasses.replace(config.text.attention, chunk_size=CONTEXT.value)
        flat = dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))
        size = accounting.cache_bytes(flat, CONTEXT.value, batch=BATCH.value, dtype=CACHE.value)
        found["cache_were_all_layers_global"] = size / GIB
    chips = {chip.name: memory.chips_needed(need, chip.memory * GIB, USABLE.value) for chip in CHIPS}
    return {"gib": found, "chips": chips, "longest_on_one": longest}


def main(_) -> None:
    config = apply_overrides(presets.PRESETS[MODEL.value](), SET.value)
    count, limit = accounting.parameters(config), config.text.context_length
    if CONTEXT.value > limit:
        raise app.UsageError(f"--context={CONTEXT.value}: this model has at most {limit}; --set text.context_length=N")
    storages = columns()
    needs = {name: need_of(config, storage)(CONTEXT.value) for name, storage in storages.items()}
    weights = f"{count.total / 1e9:.1f}B weights, {count.active / 1e9:.1f}B active"
    print(f"{MODEL.value}: {weights}; {MODE.value}, batch {BATCH.value}, {CONTEXT.value:,} tokens a row")
    show_needs(needs)
    chosen = need_of(config, storages[answer()])
    longest = {chip.name: memory.longest(chosen, chip.memory * GIB, limit, USABLE.value) for chip in CHIPS}
    show_chips(needs, longest)
    print(f"\n{answer()}:")
    output.finish(results_of(config, needs[answer()], longest))


if __name__ == "__main__":
    app.run(main)
