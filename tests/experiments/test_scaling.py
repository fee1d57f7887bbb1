"""The script that lays what the compiler said beside the closed form: docs/scaling.md has what it prints."""

import json


def test_the_table_of_the_docs_is_the_one_that_the_answers_make(script, tmp_path, root):
    printed = script("scaling", f"--plot={tmp_path / 'scaling.png'}").stdout
    lines = [line for line in printed.splitlines() if line.startswith(("| Scout", "| Maverick"))]
    written = (root / "docs" / "scaling.md").read_text()
    assert len(lines) == 6 and all(line in written for line in lines)
    assert (tmp_path / "scaling.png").stat().st_size > 20_000


def test_an_answer_takes_the_place_of_a_cell_that_was_not_compiled(script, tmp_path):
    flags = {"model": "maverick", "mode": "train", "topology": "v6e:16x16", "mesh": "fsdp=8,expert=32"}
    flags |= {"placement": "train", "batch": 256, "length": 8192, "remat": "block", "accumulation": 1}
    answer = {"kept_in": "host", "fits": False, "over_gib": 2.125, "compile_seconds": 1.0}
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "one.json").write_text(json.dumps(flags | answer))
    table = f"--table={tmp_path / 'table.json'}"
    process = script("scaling", table, f"--plans={tmp_path / 'plans'}", f"--plot={tmp_path / 'scaling.png'}")
    row = next(line for line in process.stdout.splitlines() if line.startswith("| Maverick | 256 v6e"))
    assert row.split(" | ")[1:3] == ["256 v6e, kept_in=host", "2.1 GiB too much (26.0 / 1.3)"]
    assert process.stdout.count("not compiled") == 2 * 17  # in the table, and in the final numbers
    assert json.loads((tmp_path / "table.json").read_text()).popitem()[1]["over_gib"] == 2.125


def test_what_does_not_fit_on_the_devices_is_compiled_with_inputs_on_their_hosts(script, tmp_path):
    commands = script("scaling", "--commands", f"--table={tmp_path / 'none.json'}").stdout.splitlines()
    assert len(commands) == 18
    assert all(("kept_in=host" in line) == ("maverick" in line and "v6e" in line) for line in commands)
