"""Generation from the command line: from a run of ours, and from the same weights in Hugging Face's layout."""

import json
import re
import shutil

import pytest
from PIL import Image

from experiments import speaking
from llama4_jax import checkpoint, infer, tokenizer
from llama4_jax.data.documents import PictureGrammar
from llama4_jax.data.images import to_tile

NEW = 5


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGBA", (40, 30), (255, 0, 0, 200)).save(path)
    return path


@pytest.fixture(scope="module")
def arguments(picture) -> list[str]:
    return ["--prompt", "English:", "--image", str(picture), "--max_new_tokens", str(NEW)]


@pytest.fixture(scope="module")
def wanted(toy_run, picture) -> dict:
    """What the script should say, by the library."""
    model, tok = speaking.load(toy_run.folder, "float32"), tokenizer.load(toy_run.folder / "tokenizer.model")
    prompt = PictureGrammar(tok, model.config.vision.tokens_per_tile).opening + tok.encode("English:")
    tile = to_tile(Image.open(picture), model.config.vision.image_size)[None]
    (tokens,) = infer.generate(model, [prompt], max_new_tokens=NEW, images=tile, stop=model.config.stop_tokens)
    return {"tokens": tokens, "text": tok.decode([token for token in tokens if token not in model.config.stop_tokens])}


def test_a_run_of_ours_names_a_picture(toy_run, arguments, wanted, script, tmp_path):
    process = script("generate", "--model", str(toy_run.folder), *arguments, "--json", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == wanted["tokens"]
    assert found["prompt"] == "English:"
    # Half a character at the very end is held back.
    assert found["text"] == wanted["text"].rstrip("\N{REPLACEMENT CHARACTER}")
    assert process.stdout.startswith(f"English:{found['text']}\n")
    assert not re.search(r"^I\d{4} ", process.stderr, re.MULTILINE)  # libraries keep their progress to themselves


def test_the_same_weights_in_hugging_face_layout_say_the_same(toy_run, arguments, wanted, script, tmp_path):
    folder = tmp_path / "hf"
    checkpoint.save_hf(speaking.load(toy_run.folder, "float32"), folder)
    shutil.copy(toy_run.folder / "tokenizer.model", folder / "tokenizer.model")
    process = script("generate", "--model", str(folder), *arguments)
    assert process.stdout == f"English:{wanted['text'].rstrip(chr(0xFFFD))}\n"


def test_a_folder_without_tokenizer_says_which_flag_is_missing(script, tmp_path):
    process = script("generate", "--model", str(tmp_path), status=1)
    assert f"no tokenizer at {tmp_path / 'tokenizer.model'}" in process.stdout + process.stderr
    assert "--tokenizer" in process.stdout + process.stderr
