"""Preparing text from the command line: a trial with planted documents, and sources of one's own."""

import json

from llama4_jax import tokenizer
from llama4_jax.data import tokens
from llama4_jax.data.preparation import read


def test_a_trial_finds_all_that_was_planted_and_nothing_else(script, tmp_path):
    vocabulary = tokenizer.train(["Tokens of the shards, too. " * 40], 280, tmp_path / "tokenizer.model")
    process = script(
        *("prepare_text", "--folder", str(tmp_path / "text"), "--json", str(tmp_path / "out.json"), "--seed", "4"),
        *(
            "--builtin",
            "documentation",
            "--manuals",
            str(tmp_path / "none"),
            "--plant",
            "3",
            "--limit",
            "250",
            "--nosentences",
            "--tokenizer",
            str(tmp_path / "tokenizer.model"),
        ),
    )
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("planted_missed", "planted_false", "duplicates_missed", "leaks_missed"):
        assert found[name] == 0, process.stdout
    assert found["duplicates_false_positive_rate"] == found["leaks_false_positive_rate"] == 0
    assert found["language_accuracy"] is None
    table = process.stdout.split("planted documents, against exhaustive search\n")[1].split("\n\n")[0].splitlines()
    numbers = {line[:27].strip(): line[27:].split() for line in table[1:]}
    assert numbers["copy"] == numbers["leak, 13 words"] == ["3", "3", "3", "0", "0", "0"]
    assert numbers["copy, spaced otherwise"] == numbers["copy, 1 % of words"] == ["3", "3", "3", "0", "0", "0"]
    assert numbers["no leak, 12 words"] == numbers["copy, 10 % of words"] == ["3", "0", "0", "0", "0", "0"]
    assert len({len(line) for line in table}) == 1  # the columns line up
    assert not (tmp_path / "text" / "work").exists()
    sources, written = read.sources(tmp_path / "text"), tokens.Tokens(tmp_path / "text", vocabulary)
    assert len(sources) == len(written.bounds) - 1 == found["kept_documents"]
    assert vocabulary.decode(written.read(7, 1, written.bounds[8] - written.bounds[7])) == sources[7].read()
    assert "false-positive rate" in process.stdout and "MB/s" in process.stdout


def test_a_source_without_licence_is_refused(script, tmp_path):
    process = script("prepare_text", "--folder", str(tmp_path), "--builtin=", "--source", "notes:/tmp/*.txt", status=1)
    assert "wanted --source \"name:licence:glob\", got 'notes:/tmp/*.txt'" in process.stderr
