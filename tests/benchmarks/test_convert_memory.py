"""The benchmark of conversions makes what it says, and can say no."""

import json
import subprocess
import sys

import pytest

from benchmarks import convert_memory

GOOD = {"direction": "hf to orbax", "seconds": 2.0, "rate": 4e9, "copy_rate": 8e9, "peak": 3.1e9, "others": 0.0}


@pytest.mark.parametrize(
    ("change", "met"),
    [({}, True), ({"same": True}, True), ({"peak": 3.6e9}, False), ({"same": False}, False)],
    ids=["small", "and the same", "large", "not the same"],
)
def test_the_verdict_wants_little_memory_and_the_same_bits(change, met):
    records = [{**GOOD, "same": None}, {**GOOD, "same": None, **change}]
    assert convert_memory.verdict(records, largest=2_000_000_000) is met


def test_the_table_lines_up():
    records = [{**GOOD, "same": None}, {**GOOD, "direction": "hf_unfused to hf", "same": False}]
    header, *lines = convert_memory.table(records, largest=2_000_000_000).splitlines()
    assert {len(line) for line in lines} == {len(header)}
    assert lines[1].split()[-7:] == ["4.00", "8.00", "0.50", "3.10", "1.10", "0%", "NO"]


def test_one_changed_byte_is_not_the_same(tmp_path):
    for name, content in {"one": b"12345", "same": b"12345", "longer": b"123456", "other": b"12x45"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert convert_memory.same_files(tmp_path / "one", tmp_path / "same")
    assert not convert_memory.same_files(tmp_path / "one", tmp_path / "other")
    assert not convert_memory.same_files(tmp_path / "one", tmp_path / "longer")
    assert not convert_memory.same_files(tmp_path / "longer", tmp_path / "one")


def test_a_process_is_measured_by_its_own_peak(root):
    touch = "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096])"  # every page
    # From a small process, as the benchmark is: until a child becomes another program, it counts what its parent has.
    code = f"import json, sys; from benchmarks import convert_memory; touch = [sys.executable, '-c', {touch!r}]; "
    code += "print(json.dumps(convert_memory.timed(touch)))"
    found = json.loads(
        subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.PIPE).stdout
    )
    assert 300e6 < found["peak"] < 380e6 and found["seconds"] > 0 and 0 <= found["others"] <= 1
    with pytest.raises(RuntimeError, match="ended with 3"):
        convert_memory.timed([sys.executable, "-c", "raise SystemExit(3)"])
