"""The ledger and the shards: what is finished, and nothing that only looks so."""

import numpy as np
import pytest

from llama4_jax.data.preparation import shards
from llama4_jax.data.preparation.ledger import NAME, Ledger, write


def test_a_finished_file_is_known_to_the_next_process(tmp_path):
    ledger = Ledger(tmp_path, "f")
    write(tmp_path / "a", b"content")
    assert not ledger.has("a")
    ledger.add("a")
    again = Ledger(tmp_path, "f")
    assert again.has("a") and again["a"]["bytes"] == 7
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", NAME]  # no temporary file stays


@pytest.mark.parametrize("damage", [b"contenT", b"conten", None])
def test_a_file_that_changed_since_is_not_finished(tmp_path, damage):
    ledger = Ledger(tmp_path, "f")
    write(tmp_path / "a", b"content")
    ledger.add("a")
    (tmp_path / "a").unlink() if damage is None else (tmp_path / "a").write_bytes(damage)
    assert not ledger.has("a") and not Ledger(tmp_path, "f").has("a")


def test_half_a_line_that_a_kill_left_is_forgotten(tmp_path):
    ledger = Ledger(tmp_path, "f")
    for name in "ab":
        write(tmp_path / name, b"content")
        ledger.add(name)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-20])
    again = Ledger(tmp_path, "f")
    assert again.has("a") and not again.has("b")
    again.add("b")
    assert Ledger(tmp_path, "f").has("b")


def test_a_folder_with_another_preparation_is_refused(tmp_path):
    Ledger(tmp_path, "first")
    with pytest.raises(ValueError, match="holds a preparation with fingerprint first, wanted second"):
        Ledger(tmp_path, "second")


def test_a_shard_gives_its_records_back_in_any_order_and_the_same_bytes_twice(tmp_path):
    records = [bytes([i]) * (i * 997 % 5000) + b"end" for i in range(50)]
    for name in "ab":
        shards.write(tmp_path / name, records)
    assert shards.read(tmp_path / "a", [7, 0, 49]) == [records[7], records[0], records[49]]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("limit", [1, 10, 35, 1000])
def test_cuts_cover_all_documents_once_and_none_is_empty(limit):
    sizes = np.array([5, 1, 30, 2, 2, 2, 9, 0, 4])
    runs = shards.cut(sizes, limit)
    assert np.concatenate([np.arange(len(sizes))[run] for run in runs]).tolist() == list(range(len(sizes)))
    assert all(run.stop > run.start for run in runs)
    assert len(runs) <= -(-int(sizes.sum()) // limit)
    assert (len(runs) == 1) == (limit >= sizes.sum())
    assert shards.cut(sizes[:0], limit) == []
