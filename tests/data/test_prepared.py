"""Batches of prepared text: every position once an epoch, by any process, resumed anywhere, and mixed as asked."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from llama4_jax.config.data import PreparedConfig
from llama4_jax.data import prepared, tokens
from llama4_jax.testing import text

LENGTH = 16


def sentences(first: int, last: int) -> list[str]:
    """Documents of 3 to 40 tokens or so; none like another."""
    counts = {number: number * 7 % 11 for number in range(first, last)}
    return [f"{number}: {' '.join(str(1000 * number + i) for i in range(count))}" for number, count in counts.items()]


@pytest.fixture(scope="module")
def folders(tok, tmp_path_factory) -> tuple[str, str]:
    """Two folders of text in several shards each, tokenised."""
    top = tmp_path_factory.mktemp("text")
    for name, texts in (("left", sentences(0, 30)), ("right", sentences(100, 120))):
        text.prepare(top / name, texts, documents=8)
        tokens.write(top / name, tok)
    return str(top / "left"), str(top / "right")


@pytest.fixture
def left(folders) -> PreparedConfig:
    return PreparedConfig(folders=folders[:1], rows=3, sequence_length=LENGTH, seed=5, prefetch=0)


def obvious(texts, tok) -> list[dict[str, list[int]]]:
    """The rows of `texts` in their order, token by token."""
    every = []
    for number, document in enumerate(texts):
        ids = tok.encode(document, bos=True, eos=True)
        every += [(number, before, after) for before, after in itertools.pairwise(ids)]
    rows = []
    for start in range(0, len(every) - LENGTH + 1, LENGTH):
        row = {"tokens": [], "targets": [], "positions": [], "segments": []}
        for _, run in itertools.groupby(every[start : start + LENGTH], key=lambda place: place[0]):
            pairs = [(before, after) for _, before, after in run]
            row["tokens"] += [before for before, _ in pairs]
            row["targets"] += [after for _, after in pairs]
            row["positions"] += range(len(pairs))
            row["segments"] += [max(row["segments"], default=0) + 1] * len(pairs)
        rows.append(row)
    return rows


def rows_of(batches, count: int) -> list[bytes]:
    """The tokens of `count` rows, in the order that they come."""
    found = []
    while len(found) < count:
        found += [row.tobytes() for row in next(batches)["tokens"]]
    return found[:count]


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_an_epoch_has_every_row_of_the_text_once_and_the_next_has_them_in_another_order(left, tok):
    wanted = obvious(sentences(0, 30), tok)
    count = len(wanted)
    assert count > 20 and any(max(row["segments"]) > 1 for row in wanted)
    assert any(row["tokens"][0] != tok.bos for row in wanted)  # a document goes on in the next row
    batches = prepared.make(dataclasses.replace(left, rows=count), tok)
    epochs = [next(batches) for _ in range(2)]
    by_tokens = {tuple(row["tokens"]): row for row in wanted}
    for batch in epochs:
        assert sorted(map(tuple, batch["tokens"].tolist())) == sorted(by_tokens)
        for number in range(count):
            row = by_tokens[tuple(batch["tokens"][number].tolist())]
            assert {name: batch[name][number].tolist() for name in row} == row
        assert np.all(batch["loss_weights"] == 1) and batch["loss_weights"].dtype == np.float32
        assert {batch[name].dtype for name in wanted[0]} == {np.dtype(np.int32)}
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"])
    assert [row["tokens"] for row in wanted] != epochs[0]["tokens"].tolist()


def test_rows_do_not_depend_on_how_many_are_in_a_batch_but_on_the_seed(left, tok):
    few, many = prepared.make(left, tok), prepared.make(dataclasses.replace(left, rows=7), tok)
    assert rows_of(few, 21) == rows_of(many, 21)
    other = prepared.make(dataclasses.replace(left, seed=6), tok)
    assert rows_of(other, 21) != rows_of(prepared.make(left, tok), 21)


def test_parts_that_processes_make_are_those_of_the_whole_and_count_the_same(left, tok):
    whole, parts = prepared.make(left, tok), [prepared.make(left, tok, own=own) for own in ([0, 2], [1])]
    for _ in range(15):  # beyond the first epoch
        batch, (first, second) = next(whole), [next(part) for part in parts]
        for name in batch:
            assert np.array_equal(first[name][[0, 2]], batch[name][[0, 2]])
            assert np.array_equal(second[name][1], batch[name][1])
        assert np.count_nonzero(first["segments"]) == np.count_nonzero(batch["segments"])
        assert not first["tokens"][1].any() and not first["loss_weights"][1].any()
        assert first["positions"][1].tolist() == list(range(LENGTH))
    assert whole.get_state() == parts[0].get_state() == parts[1].get_state()


def test_a_process_reads_no_token_of_the_rows_of_others(left, tok, monkeypatch):
    read, take = [], tokens.Tokens.read
    monkeypatch.setattr(tokens.Tokens, "read", lambda self, *place: read.append(place) or take(self, *place))
    next(prepared.make(left, tok, own=[]))
    assert not read
    next(prepared.make(left, tok, own=[1]))
    assert read


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 9])
def test_a_restored_loader_continues_bit_for_bit_in_the_middle_of_an_epoch(left, tok, prefetch, consumed):
    config = dataclasses.replace(left, prefetch=prefetch)
    whole, restored = prepared.make(config, tok), prepared.make(config, tok)
    for _ in range(consumed):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    next(restored)  # a used iterator can be set back too
    restored.set_state(state)
    for _ in range(6):
        assert same(next(restored), next(whole))
    whole.close()
    restored.close()


def test_folders_are_mixed_by_their_shares_each_at_its_own_pace(folders, tok):
    config = PreparedConfig(folders=folders, weights=(3.0, 1.0), rows=4, sequence_length=LENGTH, prefetch=0)
    alone = [obvious(texts, tok) for texts in (sentences(0, 30), sentences(100, 120))]
    names = {np.int32(row["tokens"]).tobytes(): side for side, rows in enumerate(alone) for row in rows}
    found = [names[row] for row in rows_of(prepared.make(config, tok), 400)]
    for count in range(4, 401, 4):
        assert abs(found[:count].count(0) - 3 * count / 4) <= 1
    # The smaller folder is in its second epoch or a later one by now.
    assert found.count(1) == 100 > len(alone[1])


def test_a_moved_folder_goes_on_and_other_text_is_refused(left, folders, tok, tmp_path):
    state = prepared.make(left, tok).get_state()
    moved = shutil.copytree(folders[0], tmp_path / "moved")
    prepared.make(dataclasses.replace(left, folders=(str(moved),)), tok).set_state(state)
    for other in ({"folders": folders[1:]}, {"rows": 4}, {"seed": 6}, {"sequence_length": 8}):
        with pytest.raises(ValueError, match="fingerprint .*; resume with the old ones"):
            prepared.make(dataclasses.replace(left, **other), tok).set_state(state)


def test_tokens_are_written_once_by_whoever_has_the_shard_and_again_where_they_are_missing(tok, tmp_path):
    text.prepare(tmp_path / "text", sentences(0, 30), documents=8)  # four shards
    tokens.write(tmp_path / "text", tok, index=1, count=2)
    with pytest.raises(ValueError, match="2 of 4 shards of text are not tokenised"):
        tokens.Tokens(tmp_path / "text", tok)
    tokens.write(tmp_path / "text", tok, index=0, count=2)
    files = sorted(tmp_path.glob("text/tokens-*/*.tokens"))
    assert len(files) == 4 and not list(tmp_path.glob("text/tokens-*/.*"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[0].unlink()
    tokens.write(tmp_path / "text", tok)
    assert files[0].read_bytes() == before[files[0]][1]
    assert all(path.stat().st_mtime_ns == before[path][0] for path in files[1:])
    read = tokens.Tokens(tmp_path / "text", tok)
    for number, document in enumerate(sentences(0, 30)):
        length = read.bounds[number + 1] - read.bounds[number] + 1
        assert read.read(number, 0, length).tolist() == tok.encode(document, bos=True, eos=True)


def test_what_cannot_be_read_says_why(left, tok, tmp_path):
    with pytest.raises(ValueError, match="run `python -m experiments.prepare_text` to its end"):
        prepared.make(dataclasses.replace(left, folders=(str(tmp_path),)), tok)
    with pytest.raises(ValueError, match="less than one row of sequence_length=100000; prepare more text"):
        prepared.make(dataclasses.replace(left, sequence_length=100_000), tok)
    text.prepare(tmp_path / "text", sentences(0, 9), documents=9)
    (shard,) = tmp_path.glob("text/*.arrayrecord")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="wanted sha256 .*; copy the shard again"):
        tokens.write(tmp_path / "text", tok)
    for change, message in (({"folders": ()}, "names no folder"), ({"weights": (1.0, 2.0)}, "for each of 1 folders")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(left, **change)
