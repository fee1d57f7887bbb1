"""What fewer bits are worth in decoding, in closed form: against hand arithmetic, and against the parameters themselves."""

import jax
import pytest

from llama4_jax.config import presets, quant
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.plan import latency, memory, weights
from llama4_jax.plan.latency import BASELINE, Asked
from llama4_jax.plan.memory import Scope, Storage
from llama4_jax.plan.weights import Kept

SCOUT, MAVERICK = presets.scout(), presets.maverick()
INT4 = QuantSpec()
SHARED = ("decoder.*.shared.gate_up.kernel", "decoder.*.shared.down.kernel")
ROUTED_AND_SHARED = QuantRecipe(name="routed and shared", rules=tuple((n, INT4) for n in quant.EXPERTS + SHARED))


@pytest.mark.parametrize(
    ("recipe", "wanted"), [(quant.int4_experts(), 1.38), (ROUTED_AND_SHARED, 2.25), (quant.int4_all(), 3.88)]
)
def test_one_token_of_scout_reads_so_many_times_fewer_bytes_of_weights(recipe, wanted):
    """By hand, in 1e9 weights: attention 3.02, shared and one routed expert a layer 6.04 each, unembedding 1.03; 4.125 bits."""
    plain, low = (sum(weights.read(SCOUT, each, tokens=1)) for each in (None, recipe))
    assert plain == pytest.approx(2 * 16.13e9, rel=1e-3)
    assert plain / low == pytest.approx(wanted, abs=0.006)


def test_experts_that_tokens_visit():
    assert weights.visited(4, 1, 1) == 1
    assert weights.visited(4, 1, 2) == 1.75  # the second token is at the same one in a quarter of the cases
    assert weights.visited(4, 2, 2) == 3  # 2, and half of the other two
    assert weights.visited(16, 1, 256) == pytest.approx(16, rel=1e-6)


def test_the_busiest_device_reads_at_least_one_expert():
    dense, routed = weights.read(SCOUT, None, tokens=1, experts_apart=16)
    assert (dense, routed) == weights.read(SCOUT, None, tokens=1)
    everything = weights.by_part(SCOUT)["routed_experts"]
    assert weights.read(SCOUT, None, tokens=10_000, experts_apart=16)[1] == pytest.approx(everything / 16)


@pytest.mark.parametrize("config", [SCOUT, MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize(
    ("recipe", "storage"),
    [
        (quant.int4_all(), Storage(bits=4)),
        (quant.int4_experts(32), Storage(bits=4, scope=Scope.EXPERTS, group=32)),
        (quant.int8(128), Storage(bits=8)),
        (None, Storage()),
    ],
    ids=["int4_all", "int4_experts", "int8", "bf16"],
)
def test_the_hardware_table_counts_what_recipes_keep(config, recipe, storage):
    """`experiments.hardware` multiplies counts; here every parameter and its scales is added up."""
    assert memory.weight_bytes(config, storage) == sum(weights.by_part(config, recipe).values())


@pytest.mark.parametrize(
    "recipe", [*(make(None) for make in quant.PRESETS.values()), quant.int4_all(8)], ids=lambda r: r.name
)
def test_bytes_by_part_are_those_of_the_quantised_parameters(recipe):
    leaves = jax.tree.leaves(weights.abstract(presets.tiny(), recipe), is_leaf=lambda x: isinstance(x, QuantizedArray))
    held = sum(leaf.bits if isinstance(leaf, QuantizedArray) else 16 * leaf.size for leaf in leaves) / 8
    assert sum(weights.by_part(presets.tiny(), recipe).values()) == held
    assert any(isinstance(leaf, QuantizedArray) for leaf in leaves)


def test_a_gain_dies_at_the_batch_from_which_on_it_stays_below():
    gains = {1: 1.2, 2: 1.6, 4: 1.4, 8: 1.5, 16: 1.0, 32: 1.4}
    assert latency.dies(gains, 1.5) == 16
    assert latency.dies(gains, 1.3) is None
    assert latency.dies(gains, 9.0) == 1


def gains(config=SCOUT, chip="H100", batch=1, context=4096, **cache) -> dict[str, float]:
    formats = tuple(Kept(recipe=make(), **cache) for make in quant.PRESETS.values())
    found = latency.answer(Asked(config=config, chip=chip, batch=batch, context=context), formats)
    assert found.gain(BASELINE.name) == 1 and set(found.seconds) == {each.name for each in (BASELINE, *formats)}
    return {form.weights: found.gain(form.name) for form in formats}


def test_gains_of_one_row_are_those_of_the_weights_less_the_cache():
    found = gains()
    assert 1.3 < found["int4_experts"] < 1.38 < found["int8"] < 2.0 < 3.0 < found["w4a8"] < found["int4_all"] < 3.88


def test_a_cache_in_few_bits_is_worth_more_the_longer_it_is():
    only_cache = [
        latency.answer(Asked(config=SCOUT, chip="v6e", batch=16, context=n), (Kept(cache="int8"),))
        for n in (4096, 524_288)
    ]
    short, long = (each.gain("bf16, int8 cache") for each in only_cache)
    assert 1.0 <= short < 1.1 < 1.4 < long < 2 / (1 + 4 / 128)


def test_fewer_bits_do_not_help_where_products_take_the_time_but_for_int8_products():
    # Of one chip with much memory: 2,048 rows of few tokens meet each weight more often than v5e's 240 operations a byte.
    found = gains(batch=4096, context=64, chip="v5e")
    assert found["int4_all"] == pytest.approx(1.0, abs=0.05) and found["w4a8"] > 1.5
    assert gains(batch=4096, context=64, chip="tpu7x")["w4a8"] == pytest.approx(1.0, abs=0.05)  # has no such products


def test_bfloat16_takes_more_chips_than_int4():
    asked = Asked(config=SCOUT, chip="H100", batch=1, context=4096)
    found = {form.name: latency.chips_needed(asked, form) for form in (BASELINE, Kept(recipe=quant.int4_all()))}
    assert found == {"bf16": 4, "int4_all": 1}


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="bf16 fits no .* chips of v5e; ask for fewer rows or tokens"):
        latency.chips_needed(Asked(config=SCOUT, chip="v5e", batch=2**20, context=10_000_000), BASELINE)
