"""The script that says what hardware a run needs."""

import json
import re

import pytest

from llama4_jax.plan.chips import CHIPS

LABELS = ("bf16", "int8", "int8 experts", "int4", "int4 experts")


def run(script, folder, *flags):
    process = script("hardware", *flags, "--json", str(folder / "out.json"))
    return process.stdout, json.loads((folder / "out.json").read_text())


def test_scout_in_int4_with_a_long_context_fits_one_h100(script, tmp_path):
    printed, found = run(script, tmp_path, "--model=scout", "--bits=4", "--context=262144", "--batch=1")
    assert found["gib"]["total"] == pytest.approx(68.1, abs=0.1)
    # 36 layers with 8,192 slots and 12 with all, of 2 x 8 x 128 numbers of 2 bytes
    assert found["gib"]["cache"] == (36 * 8192 + 12 * 262_144) * 4096 / 2**30
    assert found["gib"]["cache_were_all_layers_global"] == 48
    assert found["chips"] == {chip.name: found["chips"][chip.name] for chip in CHIPS}
    assert (found["chips"]["H100"], found["chips"]["RTX 4090"], found["chips"]["v5e"]) == (1, 4, 8)
    assert 262_144 < found["longest_on_one"]["H100"] < found["longest_on_one"]["H200"]
    assert found["longest_on_one"]["v5e"] == 0
    for title, rows in (("GiB in all", 4), ("chips needed", len(CHIPS))):
        head, *lines = printed[printed.index(title) :].split("\n\n")[0].splitlines()
        assert len(lines) == rows and len({len(line.rstrip()) for line in lines}) == 1
        assert all(label in head for label in LABELS)


def test_each_mode_has_its_own_kinds_of_memory(script, tmp_path):
    totals = {}
    for mode in ("lora", "qat", "full"):
        printed, found = run(script, tmp_path, "--model=scout", f"--mode={mode}", "--context=8192", "--bits=4")
        totals[mode] = found["gib"]["total"]
        assert "cache" not in printed.split("float32:" if mode == "full" else "int4:")[0] and re.search(
            r"^gradients", printed, re.MULTILINE
        )
        assert found["chips"]["v5p"] > 0 and "cache_were_all_layers_global" not in found["gib"]
    assert totals["lora"] < 100 < 1400 < totals["full"] < totals["qat"]


def test_wrong_flags_say_what_would_be_right(script):
    process = script("hardware", "--context=20000000", status=1)
    assert "--context=20000000: this model has at most 10485760; --set text.context_length=N" in process.stderr
    process = script("hardware", "--mode=lora", "--targets=everything", status=1)
    assert "wanted some of attention, dense, shared, routed" in process.stderr
