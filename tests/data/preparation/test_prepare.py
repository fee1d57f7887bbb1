"""The whole preparation: what it says, and the same bytes for one worker, for two, and after kill -9."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from llama4_jax.data.mixture import TextStream
from llama4_jax.data.preparation import corpus, prepare, read, workers
from llama4_jax.data.preparation.ledger import NAME
from llama4_jax.data.preparation.settings import Settings

# Run by this test in its own process, and, as a program, in one that is killed.
PROGRAM = '''
"""Prepares modules of the standard library, in many small parts."""

import sys

from llama4_jax.data.preparation import corpus, prepare
from llama4_jax.data.preparation.settings import Settings


def prepare_library(folder, num_workers):
    held_out = corpus.standard_library("documentation", "heldout").items[:5]
    evaluation = {"held out": {item.name: corpus.read(item).decode() for item in held_out}}
    library = corpus.standard_library("code", limit=60)
    settings = Settings(part_bytes=50_000, shard_bytes=300_000, seed=3)
    return prepare.run([library], evaluation, settings, folder, num_workers=num_workers)


if __name__ == "__main__":
    prepare_library(sys.argv[1], int(sys.argv[2]))
'''


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[pathlib.Path, prepare.Prepared]:
    """Modules of the library, by one worker without a break."""
    names: dict = {"__name__": "program"}
    exec(compile(PROGRAM, "program", "exec"), names)
    folder = tmp_path_factory.mktemp("prepared") / "text"
    return folder, names["prepare_library"](folder, 1)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Everything that was written; the ledger has the order in which parts were finished."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != NAME}


def children(process: int) -> set[int]:
    listed = pathlib.Path(f"/proc/{process}/task/{process}/children")
    return set(map(int, listed.read_text().split())) if listed.exists() else set()


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="looks for orphans in Linux's /proc")
def test_two_workers_killed_and_one_that_goes_on_write_the_bytes_of_an_unbroken_run(prepared, tmp_path, root):
    program, folder = tmp_path / "program.py", tmp_path / "text"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(root)}
    start = lambda count: subprocess.Popen([sys.executable, program, folder, str(count)], env=environment)  # noqa: E731
    process = start(2)
    while not (folder / NAME).exists() or (folder / NAME).read_text().count("\n") < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    born = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / read.MANIFEST).exists() and len(born) >= 2
    deadline = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{child}").exists() for child in born):
        assert time.monotonic() < deadline, "workers outlive the program that started them"
        time.sleep(0.05)
    finished = (folder / NAME).read_text().splitlines()[:5]
    assert start(1).wait() == 0
    lines = (folder / NAME).read_text().splitlines()
    assert lines[:5] == finished and len(set(lines)) == len(lines)  # what was done was not done again
    assert files(folder) == files(prepared[0])


def test_a_finished_preparation_is_read_and_not_done_again(prepared, tmp_path):
    folder, first = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("text-*")}
    names: dict = {"__name__": "program"}
    exec(compile(PROGRAM, "program", "exec"), names)
    again = names["prepare_library"](folder, 1)
    assert again.manifest == first.manifest and again.megabytes == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("text-*")} == before


def test_the_manifest_accounts_for_every_document(prepared):
    folder, found = prepared
    (source,) = found.manifest["sources"].values()
    assert source["licence"] == "PSF-2.0" and source["documents"] == 60
    assert source["kept"]["documents"] + sum(source["removed"].values()) == 60
    removed = [json.loads(line) for line in (folder / prepare.REMOVED).read_text().splitlines()]
    assert len(removed) == sum(source["removed"].values()) > 0
    shards = found.manifest["shards"]
    assert len(shards) > 2
    assert sum(shard["documents"] for shard in shards) == source["kept"]["documents"]
    assert sum(shard["text_bytes"] for shard in shards) == source["kept"]["bytes"]
    read.verify(folder)


def test_the_loader_reads_every_kept_document_once(prepared, tok):
    folder, found = prepared
    sources = read.sources(folder)
    texts = [source.read() for source in sources]
    kept = found.manifest["sources"]["code"]["kept"]
    assert len(set(texts)) == len(texts) == kept["documents"]
    assert sum(len(text.encode()) for text in texts) == kept["bytes"]
    library = {corpus.read(item).decode("utf-8", "replace") for item in corpus.standard_library("code", limit=60).items}
    assert set(texts) <= library
    piece = TextStream(sources, tok, seed=1).take(50)
    assert tok.decode(piece.inputs[1:].tolist()) in "\n".join(texts)


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> pathlib.Path:
    """Seven documents, each with a fate of its own."""
    folder = tmp_path_factory.mktemp("little")
    story = "\n".join(f"The {word} went to the river, and Dr. {word} saw it." for word in "abcdefghijklmnopqrst")
    secret = "Nobody has ever told the keeper of the lighthouse why the third lamp burns blue at midnight."
    texts = {
        "a": story,
        "b": story.replace(" ", "  "),
        "c": story + " So it ended there.",
        "d": f"It is well known. {secret} So they say in the village, and the village is old and it is far from here.",
        "e": "Too short.",
        "f": "One and two and three: e\u0301te\u0301 and another word, then some more words. "
        + "Да это так и есть. " * 5,
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "g.txt").write_bytes("Größe über alles, aber nicht hier und jetzt. ".encode("latin-1") * 6)
    (folder / "secret.jsonl").write_text(json.dumps({"question": secret}))
    return folder


@pytest.fixture(scope="module")
def fates(little, tmp_path_factory) -> tuple[dict, list[dict], prepare.Prepared]:
    """(Reason and witness of each removed document by its letter, records of the others, the whole)."""
    folder = tmp_path_factory.mktemp("fates")
    source = corpus.from_files("mine", "CC0-1.0", f"{little}/*.txt")
    riddle = json.loads((little / "secret.jsonl").read_text())["question"]
    settings = Settings(part_bytes=500)  # several parts
    found = prepare.run([source], {"riddles": {"lamp": riddle}}, settings, folder)
    lines = [json.loads(line) for line in (folder / prepare.REMOVED).read_text().splitlines()]
    removed = {pathlib.Path(line["name"]).stem: (line["reason"], line.get("of")) for line in lines}
    places = [(shard["file"], row) for shard in found.manifest["shards"] for row in range(shard["documents"])]
    records = [read.record(folder / file, row) for file, row in places]
    return removed, records, found


def test_every_document_meets_its_fate(fates, little):
    removed, records, _ = fates
    first = f"mine/{little / 'a.txt'}"
    assert removed == {
        "b": ("exact duplicate", first),
        "c": ("near duplicate", first),
        "d": ("evaluation leak", "riddles/lamp"),
        "e": ("words", None),
        "g": ("repaired", None),
    }
    assert {pathlib.Path(record["name"]).stem for record in records} == {"a", "f"}


def test_a_record_says_where_it_comes_from_and_leads_back_there(fates, little):
    from llama4_jax.data.preparation.offsets import Offsets

    record = next(record for record in fates[1] if record["name"].endswith("f.txt"))
    source, text = (little / "f.txt").read_bytes(), record["text"].encode()
    assert (record["source"], record["licence"], record["repaired"]) == ("mine", "CC0-1.0", 0)
    assert "été" in record["text"] and set(record["scripts"]) == {"Latin", "Cyrillic"}
    assert record["languages"] == {}  # nothing was learned
    offsets = Offsets.of_list(record["offsets"])
    assert len(record["sentences"]) > 4
    for start, end in record["sentences"]:
        left, right = offsets.to_source([start, end])
        assert source[left:right].decode().replace("e\u0301", "é") == text[start:end].decode()


def test_counts_say_what_was_repaired(fates):
    assert fates[2].manifest["sources"]["mine"]["repaired_bytes"] == 3 * 6  # ö, ß, ü in Latin-1
    assert fates[2].manifest["evaluation"]["sets"]["riddles"]["documents_removed"] == 1


def test_a_folder_with_other_settings_is_refused(little, tmp_path):
    source = corpus.from_files("mine", "CC0-1.0", f"{little}/*.txt")
    prepare.run([source], {}, Settings(), tmp_path)
    with pytest.raises(ValueError, match="its settings, sources or evaluation sets are others"):
        prepare.run([source], {}, Settings(seed=1), tmp_path)


def test_a_damaged_shard_is_seen_and_made_again(little, tmp_path):
    source = corpus.from_files("mine", "CC0-1.0", f"{little}/*.txt")
    prepare.run([source], {}, Settings(), tmp_path)
    (shard,) = tmp_path.glob("text-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    with pytest.raises(ValueError, match="wanted sha256 .*, got .*; copy the shard again"):
        read.verify(tmp_path)
    prepare.run([source], {}, Settings(), tmp_path)
    assert shard.read_bytes() == whole


def test_nothing_to_prepare_and_nothing_prepared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wanted documents, and sources of different names, got 0 documents"):
        prepare.run([], {}, Settings(), tmp_path)
    with pytest.raises(ValueError, match="run `python -m experiments.prepare_text` to its end"):
        read.sources(tmp_path)
    with pytest.raises(ValueError, match="wanted workers >= 1, got 0"), workers.pool(0, None):
        pass
