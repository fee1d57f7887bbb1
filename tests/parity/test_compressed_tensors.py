"""What we write in few bits, others read: compressed-tensors has the same bits, transformers the same logits."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from llama4_jax import checkpoint
from llama4_jax.config import quant
from llama4_jax.quant import ptq
from llama4_jax.testing import goldens

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # as in test_goldens.py
GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
ASYMMETRIC = quant.QuantSpec(group=8, symmetric=False)
RECIPES = {
    "int4_all": quant.int4_all(8),
    "int4_experts": quant.int4_experts(8),
    "w4a8": quant.w4a8(8),
    "int8": quant.int8(),
    "fp8_mixed": quant.fp8_mixed(),
    "offsets": quant.QuantRecipe(name="offsets", rules=tuple((name, ASYMMETRIC) for name in quant.EXPERTS)),
}


def published(name: str, recipe: str, dtype: str, scratch: pathlib.Path):
    """A golden, its model in few bits, and the folder that this is saved in."""
    golden = goldens.load(GOLDENS / name, scratch)
    model = ptq.quantise(checkpoint.load_hf(golden.checkpoint, dtype=dtype), RECIPES[recipe])
    checkpoint.save_hf(model, scratch / "published")
    return golden, model, scratch / "published"


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, "bfloat16") for recipe in RECIPES] + [(recipe, "float32") for recipe in ("int4_all", "fp8_mixed")],
)
def test_compressed_tensors_decompresses_what_we_save_to_the_same_bits(recipe, dtype, tmp_path):
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    _, _, folder = published("vision", recipe, dtype, tmp_path)
    ours = checkpoint.to_tensors(checkpoint.load_hf(folder, dtype=dtype), checkpoint.HF_UNFUSED)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    modules = sorted(key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale"))
    assert len(modules) > 10
    for module in modules:
        assert any(re.match(target.removeprefix("re:"), module) for target in scheme.targets), module
        state = {key.removeprefix(f"{module}."): t for key, t in stored.items() if key.startswith(f"{module}.")}
        weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
        wanted = torch.from_numpy(np.asarray(ours[f"{module}.weight"], np.float32))
        assert torch.equal(weight.to(torch.float32), wanted), module


# What has offsets transformers 5.23 loads dequantised alone: compressed-tensors 0.20 gets their shape wrong before loading.
@pytest.mark.parametrize(
    ("name", "recipe", "dequantize"),
    [
        ("scout", "int4_all", True),
        ("scout", "int4_all", False),
        ("vision", "int4_experts", False),
        ("top2", "offsets", True),
    ],
)
def test_transformers_computes_what_we_save(name, recipe, dequantize, tmp_path):
    import torch
    import transformers

    golden, model, folder = published(name, recipe, "float32", tmp_path)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.Llama4ForCausalLM if golden.images is None else transformers.Llama4ForConditionalGeneration
    asked = transformers.CompressedTensorsConfig(dequantize=dequantize)
    theirs, loading = kind.from_pretrained(
        folder, dtype=torch.float32, quantization_config=asked, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extra = {} if golden.images is None else {"pixel_values": torch.from_numpy(golden.arrays["pixel_values"])}
    with torch.no_grad():
        got = theirs.eval()(input_ids=torch.from_numpy(golden.arrays["input_ids"]), **extra).logits.numpy()
    loaded = checkpoint.load_hf(folder)
    inputs = {} if golden.images is None else {"images": golden.images}
    wanted = jax.jit(type(loaded).__call__)(loaded, golden.arrays["input_ids"].astype(np.int32), **inputs).logits
    assert np.abs(got - golden.arrays["logits"]).max() > 0.01  # rounding shows
    np.testing.assert_allclose(got, np.asarray(wanted), rtol=0, atol=TOLERANCE)
