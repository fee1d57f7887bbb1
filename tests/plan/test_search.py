"""Which layouts a search considers, in which order it compiles them, and what it advises; nothing is compiled here."""

import dataclasses
import math

import pytest

from llama4_jax import config as configs
from llama4_jax.config import presets
from llama4_jax.config.train import REMAT, TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.plan import estimate, search
from llama4_jax.plan.job import Choice, Job
from llama4_jax.plan.search import Tried

TRAINING = TrainConfig(steps=10, compute_dtype="bfloat16", logits_limit=2**28)
SCOUT = Job(
    config=presets.scout(), mode="train", topology="v5p:4x4x8", batch=256, length=8192, training=TRAINING
)  # 128 chips
# One period of it, which has all kinds of layers; whole, Scout would be estimated a thousand times for as many seconds.
SHALLOW = dataclasses.replace(SCOUT, config=configs.apply(presets.scout(), ["text.num_layers=4"]))
ASKED = Choice(mesh=(("fsdp", 8), ("expert", 16)), placement=partitioning.TRAIN)


def tried(
    choice: Choice, *, job: Job = SHALLOW, peak: float = 10.0, seconds: float = 1.0, over: float = 0.0, **work: float
) -> Tried:
    """A choice with an outcome such as `Job.outcome` gives."""
    outcome = {"fits": not over, "over_gib": over}
    if not over:
        outcome |= {"memory_gib": {"peak": peak}, "estimate_not_measured": {"seconds_step": seconds}}
        outcome |= {"work_of_a_device": {"wire_gib": 1.0, "matrix_pflop": 1.0} | work}
    return Tried(choice, estimate.of(job, choice), outcome)


@pytest.fixture(scope="module")
def expected() -> dict[Choice, estimate.Estimate]:
    """The closed form of every candidate."""
    return search.estimates(SHALLOW, ASKED)


def test_every_candidate_uses_all_devices_and_divides_every_size(expected):
    found = list(expected)
    assert len(found) == len(set(found)) and ASKED in found
    assert all(math.prod(dict(choice.mesh).values()) == 128 for choice in found)
    assert {choice.sizes["tensor"] for choice in found} == {1, 2, 4, 8}  # divisors of 8 key-value heads and of 128
    assert {choice.sizes["expert"] for choice in found} == {1, 2, 4, 8, 16}  # of 16 experts
    rows = [SHALLOW.batch // choice.accumulation / choice.ways("batch") for choice in found]
    assert all(row == int(row) >= 1 for row in rows)
    # Each policy keeps things on the device or on its host, but that which keeps everything.
    policies = {(choice.remat, choice.kept_in) for choice in found}
    assert policies == {(name, "device") for name in REMAT} | {(name, "host") for name in set(REMAT) - {"none"}}


def test_one_long_row_is_shared_by_all_devices_or_not_at_all():
    job = dataclasses.replace(SCOUT, batch=1, length=524_288, topology="v5p:4x4x4")
    asked = Choice(mesh=(("expert", 16), ("context", 4)), placement=partitioning.LONG)
    found = search.candidates(job, asked)
    assert asked in found
    assert all(choice.ways("batch") == 1 and choice.accumulation == 1 for choice in found)
    assert all(choice.ways("time") * choice.sizes["tensor"] == 64 for choice in found)


def test_serving_is_searched_over_copies_experts_and_heads():
    job = dataclasses.replace(SHALLOW, mode="decode", batch=64, topology="v5e:4x4")
    asked = Choice(mesh=(("expert", 2), ("tensor", 8)), placement=partitioning.SERVE)
    found = search.candidates(job, asked)
    assert asked in found and {axis for choice in found for axis, _ in choice.mesh} == {"data", "expert", "tensor"}
    assert {choice.placement.name for choice in found} == {"serve"}


def test_the_nearest_that_fits_changes_the_fewest_flags_and_the_fastest_ranks_first():
    policy = dataclasses.replace(ASKED, remat="attention")
    parts = dataclasses.replace(ASKED, accumulation=2)
    other = dataclasses.replace(ASKED, mesh=(("fsdp", 128),), remat="none")
    found = [tried(ASKED, over=3.0), tried(other, seconds=1.0), tried(parts, seconds=2.0), tried(policy, over=1.0)]
    assert [each.choice for each in search.ranked(found)] == [other, parts, policy, ASKED]
    assert search.nearest_fit(found).choice == parts
    assert search.nearest_fit(found[:1]) is None
    assert search.distance(ASKED, other) == 2 and search.distance(ASKED, ASKED) == 0


def test_what_is_promising_should_fit_and_comes_fastest_first(expected):
    need = expected[ASKED].memory
    fits = search.promising(SHALLOW, [tried(ASKED, peak=need)], expected)
    seconds = [expected[choice].seconds for choice in fits]
    assert seconds == sorted(seconds) and ASKED in fits
    # Where one of those that are known needs ten times what the closed form says, less is left of the rest.
    fewer = search.promising(SHALLOW, [tried(ASKED, peak=10 * need), tried(ASKED, peak=need)], expected)
    assert ASKED in fewer and set(fewer) < set(fits)
    assert all(10 * expected[choice].memory <= 95 for choice in fewer)


def test_limits_leave_out_what_is_expected_to_exceed_them_and_rank_below_what_did(expected):
    found = [tried(ASKED, peak=10.0, seconds=2.0), tried(dataclasses.replace(ASKED, remat="none"), peak=30.0)]
    limits = search.Limits(peak=20.0)
    assert search.ranked(found) == found[::-1] and search.ranked(found, limits) == found
    assert search.nearest_fit(found[1:], limits) is None and search.nearest_fit(found[1:]) is found[1]
    # What was compiled sends four times of what was expected, so a quarter of the limit is the most that may be expected.
    sent = expected[ASKED].wire_gib
    kept = search.promising(SHALLOW, [tried(ASKED, wire_gib=4 * sent)], expected, search.Limits(wire=8 * sent))
    assert ASKED in kept and set(kept) < set(search.promising(SHALLOW, [tried(ASKED)], expected))
    assert all(expected[choice].wire_gib <= 2 * sent for choice in kept)


def test_scouts_targets_lead_to_gate_and_up_of_the_shared_experts_on_the_host():
    policies = [dataclasses.replace(ASKED, remat=remat, kept_in="host") for remat in REMAT if remat != "none"]
    policies += [dataclasses.replace(ASKED, remat=remat) for remat in REMAT]
    expected = {choice: estimate.of(SCOUT, choice) for choice in policies}
    compiled = tried(ASKED, job=SCOUT, peak=29.7, wire_gib=118.0, matrix_pflop=1.95)
    targets = search.Limits(peak=37.0, wire=200.0, products=0.9 * 2.05)
    (found,) = search.promising(SCOUT, [compiled], expected, targets)
    assert found == dataclasses.replace(ASKED, remat="shared", kept_in="host")
    assert expected[found].host * 15e9 / 2**30 == pytest.approx(63, rel=0.01)  # GiB there and back, as compiled


def test_advice_without_compiling_changes_one_flag_where_one_is_enough():
    asked = dataclasses.replace(ASKED, remat="none")
    choice = search.likely(SHALLOW, tried(asked, over=20.0))
    assert search.distance(asked, choice) == 1
    assert estimate.of(SHALLOW, choice).memory < estimate.of(SHALLOW, asked).memory


def test_the_closed_form_is_near_what_the_compiler_said_of_scout():
    expected = estimate.of(SCOUT, ASKED)
    assert expected.memory == pytest.approx(32.1, rel=0.25)  # GiB at most, compiled
    assert expected.wire * 200e9 / 2**30 == pytest.approx(118, rel=0.05)
    matrix = expected.products * 459e12 - SCOUT.attention_flops(ASKED)
    assert matrix == pytest.approx(2.00e15, rel=0.05)


def test_more_memory_buys_fewer_products_and_more_microbatches_less_memory():
    kept = dataclasses.replace(ASKED, remat="none")
    parts = dataclasses.replace(ASKED, accumulation=2)
    block, none, halves = (estimate.of(SCOUT, choice) for choice in (ASKED, kept, parts))
    assert none.memory > 2 * block.memory and none.products < block.products
    assert halves.memory < block.memory and halves.products == block.products and halves.wire > block.wire


def test_rows_in_their_own_order_wait_for_the_device_that_holds_their_end():
    job = dataclasses.replace(SCOUT, batch=1, length=524_288, topology="v5p:4x4x4")
    zigzag = Choice(mesh=(("expert", 16), ("context", 4)), placement=partitioning.LONG)
    order = Choice(mesh=(("context", 64),), placement=partitioning.TRAIN)
    assert zigzag.imbalance == 1 and order.imbalance == 2 - 1 / 64
    assert 1.8 < job.attention_flops(order) / job.attention_flops(zigzag) < 2
