"""The closed form of memory against parameter trees, against the TPU compiler's own count, and against hand arithmetic.

What the compiler gave a training step is in `tests/goldens/compiled_memory.json` (minutes to make again, see
`make_compiled_memory.py`); a decoding step is compiled here and now.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import make_compiled_memory as compiled
import pytest
from flax import nnx

from llama4_jax import config as configs
from llama4_jax.config import lora, presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.model import Llama4, accounting
from llama4_jax.model import lora as adapters
from llama4_jax.plan import memory
from llama4_jax.plan.chips import CHIPS
from llama4_jax.plan.memory import GIB, Need, Scope, Storage

SCOUT = presets.scout()
TRAINING = TrainConfig(steps=1, compute_dtype="bfloat16", remat="block")


def predicted(case: str) -> Need:
    mode, overrides, rows, length, last = compiled.CASES[case]
    described = compiled.described(overrides)
    if mode == "serve":
        return memory.serve(described, Storage(), batch=rows, context=length, prompt=last)
    settings = compiled.settings(last)
    if mode == "train":
        return memory.train(described, settings, batch=rows, length=length)
    return memory.lora(described, settings, Storage(), compiled.low_rank(), batch=rows, length=length)


def check(need: Need, counted: dict) -> None:
    """What goes in is exact but for tokens and scalars (under 1 MiB); with what is made on the way, within 10 %."""
    given = need.weights + need.optimizer + need.cache
    assert given <= counted["argument_size_in_bytes"] < given + 2**20
    assert need.per_chip(1) == pytest.approx(counted["peak_memory_in_bytes"], rel=0.1)


@pytest.mark.parametrize("case", compiled.CASES)
def test_formula_is_within_a_tenth_of_what_the_compiler_gave(case, root):
    check(predicted(case), json.loads((root / "tests" / "goldens" / "compiled_memory.json").read_text())[case])


def test_formula_is_within_a_tenth_of_a_decoding_step_compiled_now(root):
    counted = compiled.in_a_process("decoding")
    check(predicted("decoding"), counted)
    golden = json.loads((root / "tests" / "goldens" / "compiled_memory.json").read_text())["decoding"]
    assert counted["argument_size_in_bytes"] == golden["argument_size_in_bytes"]


@pytest.mark.parametrize("preset", [presets.tiny, presets.nano, presets.scout, presets.maverick])
def test_bfloat16_weights_are_the_bytes_of_the_parameter_tree(preset):
    model = jax.eval_shape(lambda: Llama4(preset(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    assert memory.weight_bytes(preset(), Storage()) == size


def test_int4_of_scout_is_a_quarter_and_its_scales():
    count = accounting.parameters(SCOUT)
    kept = count.embedding + count.router + count.norms + count.vision
    low = count.total - kept
    assert Storage(bits=4).bits_per_weight == 4 + 16 / 128
    assert 16 / Storage(bits=4).bits_per_weight == pytest.approx(3.88, abs=0.005)
    assert memory.weight_bytes(SCOUT, Storage(bits=4)) == low / 2 + low / 128 * 2 + kept * 2
    assert memory.weight_bytes(SCOUT, Storage(bits=8, group=32)) == low + low / 32 * 2 + kept * 2


def test_experts_alone_leave_all_else_in_bfloat16():
    count = accounting.parameters(SCOUT)
    low = count.routed_experts
    experts = memory.weight_bytes(SCOUT, Storage(bits=4, scope=Scope.EXPERTS))
    assert experts == low / 2 + low / 128 * 2 + (count.total - low) * 2
    assert memory.weight_bytes(SCOUT, Storage(bits=4)) < experts < memory.weight_bytes(SCOUT, Storage())
    assert memory.weight_bytes(SCOUT, Storage(scope=Scope.EXPERTS)) == memory.weight_bytes(SCOUT, Storage())


def test_other_widths_are_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"Storage.bits=3; use 4 \(int4\), 8 \(int8\) or 16"):
        Storage(bits=3)
    with pytest.raises(ValueError, match="Storage.group=0; wanted 1 or more"):
        Storage(group=0)


def test_a_cache_longer_than_the_model_can_make_is_refused():
    with pytest.raises(ValueError, match=r"context=20000000, but context_length=10485760"):
        memory.serve(SCOUT, Storage(), batch=1, context=20_000_000)


@pytest.mark.parametrize("targets", [lora.ATTENTION, lora.DENSE, lora.SHARED_EXPERTS, lora.ROUTED_EXPERTS, ("down",)])
def test_adapters_are_counted_as_they_are_attached(targets):
    described, wanted = presets.tiny(), lora.LoraConfig(rank=3, targets=targets)
    model = jax.eval_shape(lambda: adapters.attach(Llama4(described, rngs=nnx.Rngs(0)), wanted))
    trained = sum(math.prod(leaf.shape) for leaf in adapters.split(model)[1].values())
    assert accounting.adapter_parameters(described, wanted) == trained > 0


def test_targets_that_describe_nothing_are_refused():
    with pytest.raises(ValueError, match=r"target 'feed_forward.gate_up.kernel' describes no parameter"):
        accounting.adapter_parameters(SCOUT, lora.LoraConfig(targets=lora.DENSE))


def test_training_carries_twelve_bytes_a_weight_and_adapters_a_base_of_low_bits():
    count = accounting.parameters(SCOUT).total
    full = memory.train(SCOUT, TRAINING, batch=1, length=8192)
    assert (full.weights + full.optimizer, full.gradients) == (
        12 * count,
        4 * count,
    )  # gradients, and a copy, in bfloat16
    rounded = memory.qat(SCOUT, TRAINING, Storage(bits=4), batch=1, length=8192)
    assert 0 < rounded.per_chip(1) - full.per_chip(1) < 0.02 * count  # scales: 2 bytes for 128 weights
    tuned = memory.lora(SCOUT, TRAINING, Storage(bits=4), lora.LoraConfig(), batch=1, length=8192)
    assert tuned.per_chip(1) < 0.05 * full.per_chip(1)
    assert tuned.activations == full.activations
    base = Storage(bits=4, scope=Scope.EXPERTS)  # what is gathered, all but routed experts, is bfloat16 then
    partly = memory.lora(SCOUT, TRAINING, base, lora.LoraConfig(), batch=1, length=8192)
    assert partly.workspace == full.workspace == pytest.approx(tuned.workspace * 16 / 4.125)


def test_recomputing_layers_saves_activations_and_nothing_else():
    kept = dataclasses.replace(TRAINING, remat="none")
    few, many = (memory.train(SCOUT, settings, batch=1, length=8192) for settings in (TRAINING, kept))
    assert few.activations < many.activations / 8
    assert dataclasses.replace(few, activations=0) == dataclasses.replace(many, activations=0)


def test_chips_share_all_but_the_workspace():
    need = Need(weights=60.0, cache=30.0, activations=10.0, workspace=8.0)
    assert [need.per_chip(chips) for chips in (1, 2, 4)] == [100.0, 58.0, 33.0]
    assert memory.chips_needed(need, 100.0, usable=1.0) == 1
    assert memory.chips_needed(need, 100.0, usable=0.9) == 2
    assert memory.chips_needed(need, 33.0, usable=1.0) == 4
    assert memory.chips_needed(need, 8.0, usable=1.0) is None


def test_the_longest_row_fits_and_one_token_more_does_not():
    need = lambda tokens: memory.serve(SCOUT, Storage(bits=4), batch=1, context=tokens)  # noqa: E731
    tokens = memory.longest(need, 80 * GIB, 10_485_760)
    assert need(tokens).per_chip(1) <= memory.USABLE * 80 * GIB < need(tokens + 1).per_chip(1)
    assert memory.longest(need, 10 * GIB, 10_485_760) == 0
    assert memory.longest(need, 1000 * GIB, 10_485_760) == 10_485_760


def test_every_chip_has_a_name_of_its_own_and_says_where_its_memory_is_from():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert all(chip.source and 8 <= chip.memory <= 1024 for chip in CHIPS)
    assert {"v5e", "v5p", "v6e", "tpu7x", "H100", "H200", "B200"} < {chip.name for chip in CHIPS}
    assert {chip.kind for chip in CHIPS} == {"tpu", "gpu", "consumer"}


def test_configuration_overrides_reach_the_formulas():
    shallow = configs.apply(SCOUT, ["text.num_layers=24"])
    assert memory.weight_bytes(shallow, Storage()) < 0.52 * memory.weight_bytes(SCOUT, Storage())
