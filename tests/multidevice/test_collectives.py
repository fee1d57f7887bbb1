"""What a training step sends on each mesh, by kind and axes, against a table: nothing is gathered by accident."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from llama4_jax.config import Llama4Config, presets
from llama4_jax.config.train import TrainConfig
from llama4_jax.core import partitioning
from llama4_jax.plan import count, hlo, programs

pytestmark = pytest.mark.multidevice

# Bytes that a device sends in a step of 8 rows of 128 tokens through two periods of two layers. On a CPU the exchange of
# tokens is an all-gather over `expert`, for want of a ragged one; that over `fsdp` is of weights; what is over `tensor` and
# `context` is of activations. Sums of metrics and the like, under 10 kB, are left out. When a line changes, know why
# before changing it here.
SENT = {
    "fsdp=8": {
        "all-gather fsdp": 378336,
        "all-reduce fsdp": 25795,
        "all-to-all fsdp": 32256,
        "reduce-scatter fsdp": 270592,
    },
    "fsdp=2,expert=2,tensor=2": {
        "all-gather expert": 933056,
        "all-gather fsdp": 79360,
        "all-gather fsdp+expert": 30912,
        "all-reduce tensor": 725120,
        "all-to-all fsdp+expert": 49152,
        "reduce-scatter expert": 15104,
        "reduce-scatter fsdp": 68096,
    },
    "fsdp=2,context=4": {
        "all-gather context": 57600,
        "all-gather fsdp": 86016,
        "all-gather fsdp+context": 136416,
        "all-to-all fsdp+context": 28672,
        "collective-permute context": 402912,
        "reduce-scatter context": 72960,
        "reduce-scatter fsdp": 105472,
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name == "fsdp=8" else ()) for name in SENT]
)
def test_a_training_step_sends_what_the_table_says(name):
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
    text = presets.tiny().text
    text = dataclasses.replace(text, num_layers=4, attention=dataclasses.replace(text.attention, nope_interval=2))
    config = Llama4Config(text=text)
    mesh = partitioning.make_mesh(sizes)
    step = programs.train(config, TrainConfig(steps=10), mesh, batch=8, length=128)
    sent = count.count(hlo.parse(step.lowered.compile().as_text()), mesh.shape).wire
    assert {" ".join(key): round(value) for key, value in sent.items() if value > 10_000} == SENT[name]


# The same of a step with 16 pictures and one layer of text: what is over `tensor` is of both, and the features' trip is an
# all-gather over all that split pictures, as the tokens' is. Sums under 2 kB are left out.
PICTURED = {
    "fsdp=2,context=2,tensor=2": {
        "all-gather context": 16816,
        "all-gather fsdp": 64352,
        "all-gather fsdp+context": 39456,
        "all-reduce fsdp+context": 7788,
        "all-reduce fsdp+tensor": 9216,
        "all-reduce tensor": 278184,
        "all-to-all fsdp": 4096,
        "all-to-all fsdp+context": 49152,
        "collective-permute context": 8160,
        "reduce-scatter context": 16800,
        "reduce-scatter fsdp": 62272,
    }
}


@pytest.mark.parametrize("name", PICTURED)
def test_pictures_send_what_the_table_says_and_the_compiler_gathers_nothing_of_its_own_accord(root, name):
    """It would say so; a program that it finds compiled already it does not look at."""
    environment = dict(os.environ, PYTHONPATH=str(root), TF_CPP_MIN_LOG_LEVEL="0", JAX_ENABLE_COMPILATION_CACHE="false")
    command = [sys.executable, "tests/multidevice/pictured_step.py", name]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "full rematerialization" not in ran.stderr
    assert {kind: value for kind, value in json.loads(ran.stdout).items() if value > 2_000} == PICTURED[name]
