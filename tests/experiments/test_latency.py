"""The script that says what fewer bits are worth in decoding: its table, its picture, and its clock."""

import json

import matplotlib.image
import pytest

TABLE = ("--models=scout", "--chips=v5e", "--contexts=4096", "--batches=1,256", "--recipes=int4_all")


def test_the_table_says_that_it_is_an_estimate_and_where_a_gain_dies(script, tmp_path):
    picture, numbers = tmp_path / "gains.png", tmp_path / "latency.json"
    printed = script("latency", *TABLE, f"--json={numbers}", f"--plot={picture}").stdout
    found = json.loads(numbers.read_text())["estimate_not_measured"]["v5e"]["scout"]["4096"]
    assert set(found["gain"]) == {"bf16, int8 cache", "int4_all", "int4_all, int8 cache"}
    times = found["batch"]["1"]["milliseconds"]
    assert found["gain"]["int4_all"]["1"] == pytest.approx(times["bf16"] / times["int4_all"])
    lines = printed[printed.index("scout on v5e") :].splitlines()
    assert lines[1].startswith("estimate, not measured") and len({len(line) for line in lines[1:7]}) == 1
    (row,) = (line for line in lines if line.startswith("int4_all  "))
    gain = found["gain"]["int4_all"]
    dead = "/".join(str(found[f"below_{line}x_from"]["int4_all"] or "-") for line in (1.5, 1.1))
    assert row.split()[1:] == [f"{gain['1']:.2f}..{gain['256']:.2f}", dead]
    assert matplotlib.image.imread(picture).ndim == 3


@pytest.mark.thorough
def test_on_this_machine_it_measures(script, tmp_path):
    path = tmp_path / "measured.json"
    small = ("text.num_layers=1", "text.vocab_size=256", "text.attention.nope_interval=1", "text.moe.num_experts=2")
    changes = [part for value in small for part in ("--set", value)]
    size = ("--batches=1", "--contexts=8", "--new=64", "--repeats=3", "--recipes=int4_all", "--caches=bfloat16")
    printed = script("latency", "--measure", *size, *changes, f"--json={path}").stdout
    found = json.loads(path.read_text())
    times = found["1 rows of 8"]["milliseconds_measured"]
    assert set(times) == {"bf16", "int4_all"} and times["bf16"] > 0
    assert found["device"] == "cpu" and "estimate" not in printed
