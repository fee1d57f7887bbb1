"""Every second of a run is charged to one kind, across restarts too."""

import logging
import time

import pytest
from test_loop import run
from tiny_run import CountingLoader

from llama4_jax.train import feed, goodput, metrics
from llama4_jax.train.loop import Callback


def test_steps_without_a_checkpoint_are_lost_with_their_data_and_nothing_else_is():
    account = goodput.Account()
    account.resume(
        saved={"step": 10.0, "data": 2.0, "compile": 5.0, "lost": 1.0},
        last={"step": 14.0, "data": 3.0, "compile": 5.0, "lost": 1.0, "checkpoint": 0.5},
    )
    wanted = {"step": 10.0, "data": 2.0, "compile": 5.0, "checkpoint": 0.5, "evaluate": 0.0, "lost": 6.0, "other": 0.0}
    assert account.spent == wanted
    shares = account.fractions()
    assert shares["wall_seconds"] == 23.5 and shares["goodput/lost"] == 6.0 / 23.5
    assert goodput.recorded(shares) == pytest.approx(wanted)


def test_a_checkpoint_that_is_newer_than_the_last_line_loses_nothing():
    account = goodput.Account()
    account.resume(saved={"step": 10.0, "checkpoint": 1.0}, last={"step": 9.0})
    assert account.spent["step"] == 10.0 and account.spent["lost"] == 0.0


def test_the_table_lines_up_and_sums_to_the_wall_time():
    account = goodput.Account()
    account.resume(saved={"step": 90.0, "data": 10.0}, last={})
    lines = account.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["steps", "that", "count", "90.0", "90.0%"] and lines[-1].split()[-2:] == [
        "100.0",
        "100.0%",
    ]


def test_time_goes_to_what_took_it(tmp_path):
    class Slow(CountingLoader):
        def __next__(self):
            time.sleep(0.2)
            return super().__next__()

    started = time.perf_counter()
    run(tmp_path, loader=Slow(), steps=5, log_every=1, callbacks=[Callback(1, lambda params, step: time.sleep(0.1))])
    took = time.perf_counter() - started
    lines = metrics.read(tmp_path / "metrics.jsonl")
    line = lines[-1]
    seconds = goodput.recorded(line)
    assert sum(line[f"goodput/{kind}"] for kind in goodput.KINDS) == pytest.approx(1)
    assert line["wall_seconds"] <= took
    assert 0.9 <= seconds["data"] < 1.5 and 0.4 <= seconds["evaluate"] < 0.8  # five batches; four callbacks before it
    assert seconds["compile"] > 0 and seconds["lost"] == 0
    assert sum(line["data_wait"] for line in lines) == pytest.approx(seconds["data"], abs=0.01)


def test_a_rollback_is_lost_work(tmp_path):
    run(tmp_path, loader=CountingLoader(poison=8), on_nan="rollback", steps=10)
    assert goodput.recorded(metrics.read(tmp_path / "metrics.jsonl")[-1])["lost"] > 0


def test_a_loader_that_stalls_is_reported_while_it_stalls(monkeypatch, caplog):
    monkeypatch.setattr(feed, "_PATIENCE", 0.05)
    seen = []

    class Stalled(CountingLoader):
        def __next__(self):
            time.sleep(0.3)
            seen.append(caplog.text)
            return super().__next__()

    with caplog.at_level(logging.WARNING):
        feed.Feed(Stalled(), 1, None).draw(7)
    assert "process 0 has waited 0.05 s for data after step 7" in seen[0]
