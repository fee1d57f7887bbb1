"""Programs for TPUs that are not here, from the command line; the compiler is libtpu's own."""

import json

import pytest

TINY = ("--model=tiny", "--set", "text.num_layers=4", "--topology=v5e:2x2", "--batch=4")


def plan(script, folder, *arguments):
    path = folder / "plan.json"
    process = script("plan", *TINY, f"--answers={folder / 'answers'}", f"--json={path}", *arguments)
    return json.loads(path.read_text()), process.stdout


def test_a_training_step_of_long_rows_is_compiled_counted_and_recalled_when_asked_again(script, tmp_path):
    arguments = ("--mesh=fsdp=2,expert=2", "--placement=long", "--length=64")
    found, printed = plan(script, tmp_path, *arguments)
    assert found["fits"] is True and found["verdict"] == "fits" and found["devices"] == 4
    memory, work = found["memory_gib"], found["work_of_a_device"]
    # Adam's two means in float32 and its counters, for what is split and what is not.
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert 0 < memory["parameters"] < memory["peak"] < 1
    # Only a row that is shared, here over `expert`, has keys that travel from device to device.
    assert work["matrix_pflop"] > 0 and {"fsdp", "expert"} <= set(work["wire_gib_by_axes"])
    assert found["placement"] == "long" and "collective-permute" in work["wire_gib_by_kind"]
    assert "estimate_not_measured.seconds_step" in printed
    again, _ = plan(script, tmp_path, *arguments)
    assert not found["recalled"] and again == found | {"recalled": True}


def test_a_search_ranks_decoding_steps_whose_cache_is_written_in_place(script, tmp_path):
    arguments = ("--mode=decode", "--mesh=data=2,expert=2", "--length=256", "--search", "--search_limit=1")
    found, printed = plan(script, tmp_path, *arguments)
    memory = found["memory_gib"]
    assert found["placement"] == "serve" and "optimizer" not in memory
    assert 0 < memory["cache"] <= memory["written_in_place"]
    first, second = found["search"].values()
    assert first["seconds_step_estimate"] <= second["seconds_step_estimate"]
    assert first["flags"] != second["flags"] and found["work_of_a_device"]["matrix_pflop"] > 0
    rows = printed[printed.index("\nmesh") :].strip().split("\n\n")[0].splitlines()
    assert len(rows) == 3 and len({len(row.removesuffix("  <- asked")) for row in rows}) == 1
    assert sum(row.endswith("<- asked") for row in rows) == 1


def test_an_unknown_topology_names_those_that_are_known(script, tmp_path):
    process = script("plan", "--topology=v9:2x2", status=1)
    assert "use one of v5e, v5p, v6e, tpu7x" in process.stderr
