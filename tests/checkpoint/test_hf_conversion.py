"""Meta -> native -> Hugging Face is what Hugging Face's own conversion makes of the same files, tensor by tensor.

The golden was made by that script itself (`tests/parity/make_hf_conversion.py`).
"""

import json

import drawn_meta
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint


@pytest.fixture(scope="module")
def golden(root):
    return json.loads((root / "tests" / "goldens" / "hf_conversion.json").read_text())


@pytest.mark.parametrize("dtype", drawn_meta.DTYPES)
@pytest.mark.parametrize("shards", drawn_meta.SHARDS)
def test_metas_files_become_what_hugging_faces_script_makes_of_them(shards, dtype, golden, tmp_path):
    source = drawn_meta.write(tmp_path / "meta", golden, dtype, shards, save_file, ".safetensors")
    checkpoint.save_hf(checkpoint.load_meta(source, dtype=None), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in found.values()} == {dtype}
    prints = {name: drawn_meta.fingerprint(tensor) for name, tensor in found.items()}
    assert prints == golden["tensors"][dtype]


def test_the_golden_covers_every_kind_of_layer(golden):
    names = golden["tensors"]["bfloat16"]
    for part in (
        "feed_forward.gate_proj",
        "experts.gate_up_proj",
        "shared_expert",
        "router",
        "vision_model",
        "lm_head",
    ):
        assert any(part in name for name in names), part
