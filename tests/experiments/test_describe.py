"""Questions about pictures from the command line, against the library's own chat, tiles and generation."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import speaking
from llama4_jax import checkpoint, infer, tokenizer
from llama4_jax.data import images
from llama4_jax.tokenizer import chat

NEW = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in {"wide": (40, 18), "small": (9, 9)}.items():
        levels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{name}.png")
    return [str(folder / "wide.png"), str(folder / "small.png")]


def test_several_pictures_and_a_question_are_answered_in_the_chat_format(toy_run, pictures, script, tmp_path):
    model, tok = speaking.load(toy_run.folder, "float32"), tokenizer.load(toy_run.folder / "tokenizer.model")
    checkpoint.save_hf(model, tmp_path / "hf")
    arguments = ["--model", str(tmp_path / "hf"), "--tokenizer", str(toy_run.folder / "tokenizer.model")]
    arguments += ["--image", pictures[0], "--image", pictures[1], "--prompt", "What is it?", "--max_tiles", "4"]
    options = ["--system", "Be brief.", "--max_new_tokens", str(NEW), "--json", str(tmp_path / "out.json")]
    process = script("describe", *arguments, *options)

    tiles = [images.tile(images.read(path), model.config.vision.image_size, 4) for path in pictures]
    parts = [{"type": "image", "grid": grid} for _, grid in tiles] + [{"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    prompt = chat.encode_dialog(tok, messages, tokens_per_tile=model.config.vision.tokens_per_tile).tokens
    together = np.concatenate([each for each, _ in tiles])
    assert len(together) == 4 + 1  # three side by side and the whole; one
    (wanted,) = infer.generate(model, [prompt], max_new_tokens=NEW, images=together, stop=tok.stop)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == wanted
    assert process.stdout.startswith(found["text"])


def test_a_tokenizer_of_another_model_is_refused(toy_run, pictures, script, tmp_path):
    shorter = tmp_path / "tokenizer.model"
    lines = (toy_run.folder / "tokenizer.model").read_bytes().splitlines(keepends=True)
    shorter.write_bytes(b"".join(lines[:-1]))
    arguments = ["--model", str(toy_run.folder), "--tokenizer", str(shorter), "--image", pictures[0]]
    process = script("describe", *arguments, status=1)
    assert "give the tokenizer that belongs to the model" in process.stdout + process.stderr
