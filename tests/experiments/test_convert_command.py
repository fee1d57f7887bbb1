"""Conversion from the command line: what it prints and writes, and a checkpoint of our own that speaks."""

import json
import re
import shutil

import numpy as np

from experiments import speaking
from llama4_jax import checkpoint, infer, tokenizer
from llama4_jax.core import names
from llama4_jax.testing import tiny

NEW = 5


def test_a_converted_run_has_the_same_weights_and_says_the_same(toy_run, script, tmp_path):
    model = speaking.load(toy_run.folder, "float32")
    checkpoint.save_hf(model, tmp_path / "hf")
    shutil.copy(toy_run.folder / "tokenizer.model", tmp_path / "hf")
    folders = [f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'ours'}"]
    process = script("convert", "--from=hf", "--to=orbax", *folders, "--json", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tensors"] > 20 and found["finished before"] == 0 and found["target"] == str(tmp_path / "ours")
    assert re.search(r"^tensors +\d+$", process.stdout, re.MULTILINE)
    assert "hf to orbax: 100%" in process.stderr and "checking" in process.stderr
    assert not re.search(r"^[IW]\d{4} ", process.stderr, re.MULTILINE)  # Orbax keeps its progress to itself
    loaded, wanted = (names.split(each)[1] for each in (speaking.load(tmp_path / "ours", "float32"), model))
    for name, array in wanted.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)

    tok = tokenizer.load(toy_run.folder / "tokenizer.model")
    prompt = [tok.bos, *tok.encode("English:")]
    (tokens,) = infer.generate(model, [prompt], max_new_tokens=NEW, stop=tuple({*tok.stop, *model.config.stop_tokens}))
    arguments = ["--model", str(tmp_path / "ours"), "--prompt", "English:", "--max_new_tokens", str(NEW)]
    script("generate", *arguments, "--json", str(tmp_path / "said.json"))
    assert json.loads((tmp_path / "said.json").read_text())["tokens"] == tokens


def test_what_is_wrong_is_said_without_a_traceback_and_ends_with_an_error(script, tmp_path):
    checkpoint.save_hf(tiny.model(tiny.text_config(1)), tmp_path / "hf")
    arguments = ["--from=hf", "--to=meta", f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'out'}"]
    process = script("convert", *arguments, status=1)
    assert "not converted: " in process.stderr and "rope_scaling" in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
