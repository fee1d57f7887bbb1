"""Quantising a checkpoint from the command line: figures, coverage, and a checkpoint that loads again."""

import json
import re

import numpy as np
import pytest

from experiments import speaking
from llama4_jax import checkpoint
from llama4_jax.core import names
from llama4_jax.quant import matrices

FLAGS = ("--rows", "8", "--length", "128", "--calibration", "2", "--heldout", "1", "--extra_tokens", "400")


@pytest.fixture(scope="module")
def quantised(root, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "int4"
    arguments = ("--model", str(root / "tests/quant/trained"), "--output", str(folder))
    process = script("quantize", *arguments, *FLAGS, "--json", str(folder.parent / "out.json"))
    return folder, process.stdout, json.loads((folder.parent / "out.json").read_text())


def test_it_prints_shares_coverage_and_losses_and_the_claim_holds(quantised):
    _, printed, found = quantised
    assert re.search(r"^routed experts +49,152 +100.00%", printed, re.MULTILINE)
    assert "Calibration tokens of each expert" in printed
    assert found["report"]["attention"]["bits_per_weight"] == 4 + 16 / 32
    assert found["report"]["embeddings"]["bits_per_weight"] == 32
    assert found["coverage"].keys() == {"1"} and min(found["coverage"]["1"]["used"]) >= 400
    assert 3 < found["loss_before"] < 4 and found["loss_before"] == pytest.approx(found["loss_after"], abs=0.05)
    assert found["divergence"] < 0.8 * found["rtn"]["divergence"]
    assert found["agreement"] > 0.85


def test_the_checkpoint_holds_few_bits_and_loads_again(quantised, root):
    before = names.held(speaking.load(root / "tests/quant/trained", "float32"))
    held = matrices.quantised(checkpoint.load_hf(quantised[0], keep_quantised=True))
    assert {leaf.values.dtype.name for leaf in held.values()} == {"int4"} and len(held) == 15
    for name, leaf in held.items():
        difference = np.abs(np.asarray(leaf.dequantize()) - np.asarray(before[name]))
        assert 0 < difference.max() < 0.5 * np.abs(np.asarray(before[name])).max(), name
    assert (quantised[0] / "tokenizer.model").is_file()


@pytest.mark.thorough  # `tests/quant/test_recipe.py` shows the errors themselves
def test_a_group_that_does_not_fit_is_refused_with_every_matrix_named(root, script):
    process = script("quantize", "--model", str(root / "tests/quant/trained"), "--group", "128", status=1)
    assert "group=128 is more than the inputs" in process.stderr
    assert "experts.gate_up" in process.stderr and "attention.query.kernel" in process.stderr
