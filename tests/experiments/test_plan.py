"""Programs for TPUs that are not here, from the command line; the compiler is libtpu's own."""

import json

import pytest


def plan(script, path, *arguments):
    common = ["--model=tiny", "--topology=v5e:2x2", "--mesh=fsdp=2,expert=2", "--batch=4", f"--json={path}"]
    process = script("plan", *common, *arguments)
    return json.loads(path.read_text()), process.stdout


def test_a_training_step_is_compiled_and_counted(script, tmp_path):
    found, printed = plan(script, tmp_path / "train.json", "--length=64", "--set", "text.num_layers=4")
    assert found["fits"] is True and found["verdict"] == "fits" and found["devices"] == 4
    memory, work = found["memory_gib"], found["work_of_a_device"]
    # Adam's two means in float32 and its counters, for what is split and what is not.
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert 0 < memory["parameters"] < memory["peak"] < 1
    assert work["matrix_pflop"] > 0 and {"fsdp", "expert"} <= set(work["wire_gib_by_axes"])
    assert "estimate_not_measured.seconds_step" in printed


def test_a_decoding_step_holds_a_cache_and_no_optimizer(script, tmp_path):
    found, _ = plan(script, tmp_path / "decode.json", "--mode=decode", "--length=256")
    assert "optimizer" not in found["memory_gib"] and found["memory_gib"]["cache"] > 0
    assert found["work_of_a_device"]["matrix_pflop"] > 0


def test_an_unknown_topology_names_those_that_are_known(script, tmp_path):
    process = script("plan", "--topology=v9:2x2", status=1)
    assert "use one of v5e, v5p, v6e, tpu7x" in process.stderr
