"""A decoding step with weights and cache in few bits or in 16, compiled for a TPU that is not here."""

import json

import pytest

from llama4_jax import config as configs
from llama4_jax.config import presets, quant
from llama4_jax.model import accounting
from llama4_jax.plan import memory, topology, weights
from llama4_jax.plan.memory import GIB, Storage

# Heads of the chip's width; most of the bytes are experts, of which a copy in bfloat16 would show.
CHANGES = (
    *("text.num_layers=2", "text.vocab_size=512", "text.attention.nope_interval=2", "text.attention.chunk_size=1024"),
    *("text.attention.num_heads=4", "text.attention.num_kv_heads=2", "text.attention.head_dim=128"),
    "text.moe.expert_dim=16384",
)
ROWS, SLOTS = 4, 65_536
CHIP = "v5e:2x2"


@pytest.mark.parametrize(
    ("recipe", "cache_dtype"), [(quant.int4_all(), "int8"), (None, "bfloat16")], ids=["few bits", "16 bits"]
)
def test_a_decoding_step_holds_what_the_recipe_and_the_closed_form_say(script, tmp_path, recipe, cache_dtype):
    path, changes = tmp_path / "plan.json", [part for value in CHANGES for part in ("--set", value)]
    flags = ("--model=bench_151m", "--mode=decode", f"--topology={CHIP}", "--mesh=data=2,tensor=2", f"--batch={ROWS}")
    kept = (*([f"--quant={recipe.name}"] if recipe else []), f"--cache={cache_dtype}", f"--length={SLOTS}")
    script("plan", *flags, *kept, *changes, f"--answers={tmp_path}", f"--json={path}")
    results = json.loads(path.read_text())
    found = results["memory_gib"]
    config = configs.apply(presets.bench_151m(), CHANGES)

    # Half of every matrix on a device; routers, norms, and scales of a whole axis are on both.
    parameters = sum(weights.by_part(config, recipe).values()) / 2
    assert found["parameters"] * GIB == pytest.approx(parameters, rel=0.03)
    cache = accounting.cache_bytes(config, SLOTS, batch=ROWS, dtype=cache_dtype) / 4
    assert found["cache"] * GIB == pytest.approx(cache, rel=1e-4) and found["written_in_place"] >= found["cache"]

    bits = 4 if recipe else 16
    need = memory.serve(config, Storage(bits=bits), batch=ROWS, context=SLOTS, prompt=1, cache=cache_dtype)
    assert need.weights == 2 * parameters and need.cache == 4 * cache
    # At most at once would count what is on the chip, and not in its memory, which is much beside so small a model.
    held = (found["parameters"] + found["cache"] + found["temporaries"]) * GIB
    assert held == pytest.approx(need.weights / 2 + (need.cache + need.activations) / 4, rel=0.1)
    # So neither the cache nor all weights are there once more, in bfloat16 or in another order.
    assert found["temporaries"] * GIB < accounting.parameters(config).routed_experts / 2

    # Weights are read as they lie, and of the cache only a slot is written: no other order of either, nor all of a cache again.
    read = results["closed_form"]["seconds_hbm"] * topology.device(CHIP).hbm
    if recipe is None:  # XLA's own kernel leaves experts unread that no row visits, but does not say so
        moe = config.text.moe
        visited = weights.visited(moe.num_experts, moe.top_k, ROWS // 2) / moe.num_experts
        read += weights.by_part(config)["routed_experts"] / 2 * (1 - visited)
    assert read < results["work_of_a_device"]["hbm_tb"] * 1e12 < 1.1 * read
