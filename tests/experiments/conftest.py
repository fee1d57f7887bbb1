"""One toy run of the main job, made once, for the tests of all scripts that need a trained model."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

SMALL = (
    *("text.num_layers=2", "text.embed_dim=32", "text.mlp_dim=32", "text.attention.head_dim=8"),
    *("text.attention.nope_interval=2", "text.moe.num_experts=4", "text.moe.expert_dim=16", "vision.num_layers=1"),
    *("vision.embed_dim=16", "vision.num_heads=2", "vision.mlp_dim=64", "vision.output_dim=16"),
    *("vision.patch_size=4", "vision.image_size=16"),
)
FEW = (
    *("image_size=16", "tokens_per_tile=4", "num_emoji=6", "languages=en,de", "heldout_pairs=0.2"),
    *("rows=2", "sequence_length=96", "images_per_batch=4"),
)
SHORT = ("steps=4", "log_every=2", "save_every=4")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder, the arguments that made it, and what it printed."""

    folder: pathlib.Path
    arguments: tuple[str, ...]
    process: subprocess.CompletedProcess


def run_script(root: pathlib.Path, name: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """`python -m experiments.NAME ARGUMENTS` as a person runs it; it must end with `status`."""
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert process.returncode == status, process.stderr[-4000:]
    return process


@pytest.fixture(scope="session")
def script(root):
    """Runs an experiment: `script(name, *arguments, status=0)`."""
    return lambda name, *arguments, status=0: run_script(root, name, *arguments, status=status)


@pytest.fixture(scope="session")
def toy_run(root, tmp_path_factory) -> Run:
    """Of all workers: their folders lie side by side, and the first that comes trains while others wait. To be read only."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, printed = shared / "toy", shared / "toy.printed"
    arguments = ["--folder", str(folder), "--vocab_size", "400", "--seed", "1"]
    for flag, values in (("--set", SMALL), ("--data", FEW), ("--train", SHORT)):
        arguments += [part for value in values for part in (flag, value)]
    with open(shared / "toy.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            process = run_script(root, "pretrain_nano", *arguments, "--json", str(folder / "copy.json"))
            printed.write_bytes(pickle.dumps(process))
    return Run(folder, tuple(arguments), pickle.loads(printed.read_bytes()))
