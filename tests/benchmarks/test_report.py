"""What the comparison with transformers prints, and when it refuses to."""

import os

import pytest

from benchmarks import machine, report

RESULTS = {
    "float32": {
        "agreement": {"max_difference": 1e-5},
        "prefill": {
            "ours": [{"seconds": 0.5}, {"seconds": 0.8}, {"seconds": 0.4}],
            "hf sdpa": [{"seconds": 1.0}],
            "hf compile": [{"seconds": 0.75}],
        },
        "memory": {"ours": [{"peak": 3e9, "loss": 10.0}], "hf sdpa": [{"peak": 2e9, "loss": 10.0}]},
    }
}


def test_the_ratio_is_of_medians_against_the_rival_that_is_hardest_to_beat():
    prefill = report.numbers(RESULTS, ratios=True)["float32"]["prefill"]
    assert prefill["best_rival"] == "hf compile"
    assert prefill["ratio_median"] == pytest.approx(0.75 / 0.5)
    assert prefill["ratio_best"] == pytest.approx(0.75 / 0.4)
    assert prefill["met"]


def test_memory_must_stay_below_its_target():
    memory = report.numbers(RESULTS, ratios=True)["float32"]["memory"]
    assert memory["ratio_median"] == 1.5
    assert not memory["met"]
    assert "MISSED" in report.table(RESULTS, ratios=True)


def test_a_loaded_machine_gets_no_ratio_anywhere():
    found = report.numbers(RESULTS, ratios=False)["float32"]["prefill"]
    assert found.keys() == {"sides"}
    assert "target" not in report.table(RESULTS, ratios=False)


def test_work_of_the_processes_under_test_is_not_foreign():
    before = machine.Snapshot(wall=10.0, busy=100.0, ours=40.0)
    alone = machine.Snapshot(wall=20.0, busy=120.0, ours=60.0)
    shared = machine.Snapshot(wall=20.0, busy=118.0, ours=43.0)
    assert machine.foreign_share(before, alone) == 0.0
    assert machine.foreign_share(before, shared) == pytest.approx(15 / (10 * os.cpu_count()))


def test_snapshots_of_this_machine_move_forward():
    before = machine.snapshot()
    sum(range(2_000_000))
    after = machine.snapshot()
    assert after.wall > before.wall
    assert after.busy >= before.busy
    assert after.ours >= before.ours
