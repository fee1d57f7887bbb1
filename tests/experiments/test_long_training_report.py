"""What the report on long rows says of a case that is small enough to count by hand."""

import json

import pytest


@pytest.mark.thorough
def test_layers_that_are_all_global_send_a_ring_each(script, tmp_path):
    """Two layers, 256 tokens over four chips in eight pieces, chunks of 16; keys and values are 2 heads of 8 each."""
    path = tmp_path / "report.json"
    sizes = ["--model=tiny", "--topology=v5e:2x2", "--mesh=expert=2,context=2", "--length=256"]
    changes = ("text.num_layers=2", "text.attention.nope_interval=2", "text.moe.step=0")
    sizes += [f"--set={change}" for change in changes]
    process = script("long_training", *sizes, f"--json={path}", f"--answers={tmp_path}")
    report = json.loads(path.read_text())
    hybrid, whole = report["hybrid"], report["all global"]
    assert hybrid["fits"] and whole["fits"] and "all global        0.0      fits" in process.stdout
    assert whole["attention_pflop_by_formula"] > hybrid["attention_pflop_by_formula"]

    sent = [row["work_of_a_device"]["wire_gib_by_kind"]["collective-permute"] * 2**30 for row in (hybrid, whole)]
    key, tag = 2 * 2 * 8 * 2, 2 * 4  # bytes of a token's key and value, and of its position and segment
    # Forward, and again before backward; then keys and their gradients in float32 go all the way round.
    ring = 64 * (2 * 3 * (key + tag) + 4 * (3 * key + tag))
    # The last 15 tokens of both pieces, and as much back.
    exchange = 2 * 15 * (2 * (key + tag) + key)
    assert sent[0] == pytest.approx(ring + exchange, abs=1)
    # Positions and segments are the same in both rings, and the compiler may send them once.
    assert 2 * ring - 64 * 10 * tag <= sent[1] <= 2 * ring + 1
