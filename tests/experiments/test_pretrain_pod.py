"""Recipes for pods at toy size: trained, killed and resumed, spread over processes, and refused with what would work."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llama4_jax import checkpoint, tokenizer
from llama4_jax import config as configs
from llama4_jax.checkpoint.store import load_params
from llama4_jax.config import presets
from llama4_jax.config.data import DataConfig
from llama4_jax.data import loader
from llama4_jax.model import initialise
from llama4_jax.testing import text
from llama4_jax.train import metrics

TINY = (
    *("text.num_layers=2", "text.attention.nope_interval=2", "text.vocab_size=400"),
    *("vision=None", "patch_token=None", "image_start_token=None", "image_end_token=None"),
)
FEW = (
    "save_every=1",
    "log_every=1",
    "keep=20",
    "compute_dtype=float32",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1e-2",
)
STEPS = 8


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A toy of the recipe on two folders of text, but for --mesh and --output."""
    top = tmp_path_factory.mktemp("pod")
    texts = list(loader.tokenizer_texts(DataConfig(images_per_batch=0), text_bytes=60_000))
    tokenizer.train(texts, 400, top / "tokenizer.model")
    text.prepare(top / "left", texts[::2], documents=2)
    text.prepare(top / "right", texts[1::2], documents=2)
    found = ["--model=tiny", f"--data={top}/left:0.7", f"--data={top}/right:0.3", f"--tokenizer={top}"]
    found += ["--batch=4", "--length=48", f"--steps={STEPS}"]
    return [*found, *(f"--set={change}" for change in TINY), *(f"--train={change}" for change in FEW)]


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{name}", *arguments]


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(root, arguments, tmp_path_factory):
    """An undisturbed run of one process on one device."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*arguments, "--mesh=fsdp=1", f"--output={folder}", f"--json={folder / 'out.json'}"]
    ran = subprocess.run(command("pretrain_scout", *words), cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "process 0 makes 4 of 4 rows" in ran.stderr
    return folder


@pytest.mark.thorough  # as tests of the loop and of the launcher show
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(root, script, arguments, whole, tmp_path):
    words = [*arguments, "--mesh=fsdp=1", f"--output={tmp_path}"]
    with subprocess.Popen(command("pretrain_scout", *words), cwd=root, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "checkpoints" / "2").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    printed = script("pretrain_scout", *words).stderr
    assert 2 <= int(re.search(r"resuming \S+ at step (\d+)", printed)[1]) < STEPS
    assert losses(tmp_path) == losses(whole)
    (params, records), (wanted, others) = (load_params(each / "checkpoints") for each in (tmp_path, whole))
    assert records["data"] == others["data"]
    for name, value in params.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@pytest.mark.thorough
def test_two_processes_train_as_one_does_each_with_its_own_rows(root, arguments, whole, tmp_path):
    words = [*arguments, "--mesh=fsdp=2", f"--output={tmp_path}"]
    line = [sys.executable, "-m", "launch.local", "--processes=2", "--", *command("pretrain_maverick", *words)]
    ran = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    for index in range(2):
        assert re.search(rf"\[{index}\] .*process {index} makes 2 of 4 rows", ran.stderr)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)
    (_, records), (_, others) = (load_params(each / "checkpoints") for each in (tmp_path, whole))
    assert records["data"] == others["data"]
    tokens = [metrics.read(each / "metrics.jsonl")[-1]["tokens"] for each in (tmp_path, whole)]
    assert tokens == [STEPS * 4 * 48] * 2


def test_the_final_numbers_are_those_of_the_run(whole):
    results = json.loads((whole / "out.json").read_text())
    assert (results["steps"], results["tokens"]) == (STEPS, STEPS * 4 * 48)
    assert results["loss"] == losses(whole)[-1] < losses(whole)[0] - 0.3


MANY = """
import sys
from experiments import pod
from experiments.pretrain_scout import RECIPE
for arguments in map(str.split, sys.argv[1:]):
    for name in pod.flags.FLAGS:
        pod.flags.FLAGS[name].unparse()
    pod.flags.FLAGS(["scout", *arguments])
    try:
        found = pod.run(RECIPE)
        print(*(f"{name} {value}" for name, value in found.items()), sep=", ")
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def released(arguments, tmp_path_factory) -> pathlib.Path:
    """The weights that `whole` begins with, as a folder of Hugging Face's."""
    folder = tmp_path_factory.mktemp("released") / "hf"
    config = configs.apply(presets.tiny(), TINY)
    vocabulary = tokenizer.load(pathlib.Path(arguments[3].removeprefix("--tokenizer=")) / "tokenizer.model")
    config = dataclasses.replace(config, bos_token=vocabulary.bos, stop_tokens=tuple(vocabulary.stop))
    checkpoint.save_hf(initialise(config, seed=0), folder)
    return folder


def test_recipes_are_planned_start_from_weights_and_say_what_would_work(root, arguments, released, whole, tmp_path):
    model, data, more, vocabulary, *rest = arguments
    small = " ".join(rest)
    shape = " ".join(word for word in rest if not word.startswith("--set"))
    plan = "--plan_only --model=tiny --set=text.num_layers=1 --topology=v5e:2x2 --batch=4 --length=64"
    asked = {
        "--tokenizer=x": "wanted --data=FOLDER, prepared by `python -m experiments.prepare_text",
        f"--data={tmp_path}": "run `python -m experiments.prepare_text` to its end",
        data: "wanted --tokenizer=FILE",
        f"{data} {vocabulary}": "sizes must multiply to 1, .*; --mesh=fsdp=1,expert=1 works",
        f"{data} {vocabulary} --mesh=fsdp=1 {model}": "the tokenizer has 400 tokens and the model rows for 128",
        f"{data} {vocabulary} --mesh=fsdp=1 --load={tmp_path}": "--load=.*: wanted a folder with one of config.json",
        f"{data} {vocabulary} {small} --train=accumulation=5 --mesh=fsdp=1": "use a multiple of 5, as --batch=5",
        f"{plan} --mesh=fsdp=3": "sizes must multiply to 4, .*--mesh=fsdp=1,expert=4 works",
        f"{plan} --mesh=fsdp=2,expert=2": "devices 4, flags --mesh=fsdp=2,expert=2 .*'parameters': .*fits True",
        f"{data} {more} {vocabulary} {shape} --mesh=fsdp=1 --load={released} --output={tmp_path}": f"steps {STEPS}, loss",
    }
    ran = subprocess.run([sys.executable, "-c", MANY, *asked], cwd=root, capture_output=True, text=True, timeout=300)
    said = ran.stdout.splitlines()
    assert len(said) == len(asked), ran.stderr[-2000:]
    for found, wanted in zip(said, asked.values()):
        assert re.search(wanted, found), found
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)
