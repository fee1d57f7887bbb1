"""The script that gives a checkpoint more tokens, on a toy run and on the same model in Hugging Face's layout."""

import json
import shutil

import numpy as np
import pytest

from experiments import speaking
from llama4_jax import checkpoint, tokenizer
from llama4_jax.tokenizer.expand import parts

NEW = 30
FEW = ("--new_tokens", str(NEW), "--text_bytes", "60000", "--pieces", "12")


@pytest.fixture(scope="module")
def expanded(toy_run, script, tmp_path_factory):
    """The folder that the script wrote for the toy run, after two steps of training beside it, and its numbers."""
    folder = tmp_path_factory.mktemp("expanded") / "run"
    arguments = ("--model", str(toy_run.folder), "--output", str(folder), *FEW, "--steps", "2")
    script("expand_vocabulary", *arguments, "--json", str(folder.parent / "out.json"))
    return folder, json.loads((folder.parent / "out.json").read_text())


def test_a_run_comes_back_as_a_checkpoint_of_ours_with_new_rows_from_their_parts(toy_run, expanded):
    folder, _ = expanded
    old, new = (tokenizer.load(place / "tokenizer.model") for place in (toy_run.folder, folder))
    before, after = (speaking.load(place, "float32") for place in (toy_run.folder, folder))
    assert new.vocab_size == after.config.text.vocab_size == old.vocab_size + NEW
    table, grown = np.asarray(before.embed.table[...]), np.asarray(after.embed.table[...])
    assert np.array_equal(grown[: old.vocab_size], table)
    means = [table[part].mean(axis=0) for part in parts(old, new)]
    np.testing.assert_allclose(grown[old.vocab_size :], means, rtol=1e-5, atol=1e-6)


def test_numbers_are_of_fewer_tokens_and_of_all_three_starts(expanded):
    _, found = expanded
    assert found["tokens"]["new"] < found["tokens"]["old"]
    assert found["tokens"]["ratio"] == found["tokens"]["new"] / found["tokens"]["old"]
    before, after = found["bits_per_byte"], found["bits_per_byte_after_2_steps"]
    assert before.keys() == after.keys() == {"old", "parts", "random"}
    # An untrained model knows little: about log2(400) bits a token, whatever the start.
    assert all(1.0 < bits < 12.0 for bits in (*before.values(), *after.values()))
    assert len({*before.values(), *after.values()}) == 6
    assert found["heldout_bytes"] > 12 * 200


@pytest.mark.thorough
def test_a_hugging_face_folder_comes_back_as_one(toy_run, script, tmp_path):
    source, folder = tmp_path / "hf", tmp_path / "grown"
    checkpoint.save_hf(speaking.load(toy_run.folder, "float32"), source)
    shutil.copy(toy_run.folder / "tokenizer.model", source / "tokenizer.model")
    script("expand_vocabulary", "--model", str(source), "--output", str(folder), *FEW, "--steps", "0")
    read = checkpoint.load_hf(folder)
    assert read.embed.table.shape[0] == tokenizer.load(folder / "tokenizer.model").vocab_size == 400 + NEW


def test_a_folder_that_is_there_is_not_written_over(toy_run, script):
    process = script(
        "expand_vocabulary", "--model", str(toy_run.folder), "--output", str(toy_run.folder), *FEW, status=1
    )
    assert f"{toy_run.folder} is there already" in process.stdout + process.stderr
