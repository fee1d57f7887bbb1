"""Programs for TPUs that are not here, from the command line; the compiler is libtpu's own."""

import json

import pytest

TINY = ("--model=tiny", "--set", "text.num_layers=4", "--topology=v5e:2x2", "--batch=4")


def plan(script, folder, *arguments):
    path = folder / "plan.json"
    process = script("plan", *TINY, f"--answers={folder / 'answers'}", f"--json={path}", *arguments)
    return json.loads(path.read_text()), process.stdout


@pytest.mark.thorough
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


def test_a_decoding_step_writes_its_cache_in_place(script, tmp_path):
    found, _ = plan(script, tmp_path, "--mode=decode", "--mesh=data=2,expert=2", "--length=256")
    memory = found["memory_gib"]
    assert found["placement"] == "serve" and "optimizer" not in memory
    assert 0 < memory["cache"] <= memory["written_in_place"]
    assert found["work_of_a_device"]["matrix_pflop"] > 0


# 64 experts of 24 GiB together: whole they are too much for a chip of 16 GiB, and divided they fit.
LARGE = ("text.num_layers=2", "text.embed_dim=128", "text.moe.num_experts=64", "text.moe.expert_dim=524288")


@pytest.mark.thorough
def test_what_does_not_fit_is_told_a_change_that_was_compiled_and_does(script, tmp_path):
    large = [part for value in LARGE for part in ("--set", value)]
    arguments = ("--mode=decode", "--mesh=data=4", "--length=256", "--search", "--search_limit=1", *large)
    found, printed = plan(script, tmp_path, *arguments)
    assert found["fits"] is False and 8 < found["over_gib"]
    first, second = found["search"].values()
    assert first["fits"] and first["peak_gib"] < 16 and second["over_gib"] == found["over_gib"]
    change = first["flags"].split()[0]
    over = f"does not fit by {found['over_gib']:.2f} GiB a device"
    assert found["verdict"] == f"{over}; nearest change that does: {change} (compiled)"
    rows = printed[printed.index("\nmesh  ") :].strip().split("\n\n")[0].splitlines()
    assert len(rows) == 3 and rows[2].endswith("GiB too much  <- asked")
    assert len(rows[0]) == len(rows[1])


def test_an_unknown_topology_names_those_that_are_known(script, tmp_path):
    process = script("plan", "--topology=v9:2x2", status=1)
    assert "use one of v5e, v5p, v6e, tpu7x" in process.stderr


def test_a_conversion_exchanges_nothing_and_its_hosts_read_each_part_of_the_files_once(script, tmp_path):
    found, printed = plan(script, tmp_path, "--mode=conversion", "--mesh=fsdp=2,expert=2")
    memory = found["memory_gib"]
    assert found["fits"] is True and found["work_of_a_device"]["wire_gib"] == 0
    assert memory["parameters"] == pytest.approx(2 * memory["checkpoint"])  # float32 of bfloat16
    assert memory["checkpoint"] + memory["parameters"] <= memory["peak"]
    # All four chips have one host, which reads all of the files.
    assert found["read_by_a_host_gib"] == pytest.approx(found["parameters"] * 2 / 2**30, rel=1e-6)
    assert "mfu" not in printed and "tokens_per_second" not in printed


@pytest.mark.thorough
def test_a_step_of_training_with_rounding_holds_the_ranges_that_it_learns(script, tmp_path):
    learned = ("--train", "qat.group=8", "--train", "qat.ranges=learned")
    found, _ = plan(script, tmp_path, "--mode=qat", "--mesh=data=4", "--length=64", *learned)
    memory, weights = found["memory_gib"], 4 * found["parameters"] / 2**30  # float32, whole on each device
    assert found["mode"] == "qat" and found["qat"] == "int4_all" and found["fits"]
    assert 1.05 * weights < memory["parameters"] < 1.125 * weights  # one for each 8 weights of most matrices
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
