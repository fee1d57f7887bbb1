"""Hugging Face files with one linear layer an expert, plain and in FP8 with scales."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import assembly, quantised, schemes
from llama4_jax.core import names
from llama4_jax.testing import tiny

FP8 = jnp.float8_e4m3fn
GATE = "language_model.model.layers.1.feed_forward.experts.2.gate_proj.weight"
DOWN = "language_model.model.layers.1.feed_forward.experts.0.down_proj.weight"
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}


def config():
    """Multimodal, dense and mixture layers by turns, with the one width that Hugging Face's files tie to another."""
    whole = tiny.vision_config(num_layers=5)
    text = dataclasses.replace(whole.text, moe=dataclasses.replace(whole.text.moe, step=2))
    vision = dataclasses.replace(whole.vision, mlp_dim=whole.vision.embed_dim * whole.vision.shuffle**2)
    return dataclasses.replace(whole, text=text, vision=vision)


@pytest.fixture(scope="module")
def model():
    return tiny.model(config())


def bits(model) -> dict:
    return {
        name: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in names.split(model)[1].items()
    }


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def rewrite(model, folder: pathlib.Path, change, quantization: dict | None = None) -> pathlib.Path:
    """A checkpoint of `model` with separate experts whose dict of tensors went through `change`."""
    checkpoint.save_hf(model, folder, layout=checkpoint.HF_UNFUSED)
    named = stored(folder)
    change(named)
    save_file(named, folder / "model.safetensors")
    if quantization is not None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, "quantization_config": quantization}))
    return folder


def quantise(named: dict, key: str, scale: np.ndarray) -> np.ndarray:
    """Puts `key` in FP8 with `scale`; returns the weight that this means."""
    named[key] = (named[key] / scale.reshape(-1, 1)).astype(FP8)
    named[f"{key}_scale"] = scale
    return named[key].astype(np.float32) * scale.reshape(-1, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_to_separate_and_back_gives_the_same_bits(dtype, model, tmp_path):
    checkpoint.save_hf(jax.tree.map(lambda leaf: leaf.astype(dtype), model), tmp_path / "fused")
    first = checkpoint.load_hf(tmp_path / "fused", dtype=None)
    checkpoint.save_hf(first, tmp_path / "separate", layout=checkpoint.HF_UNFUSED, max_shard_bytes=100_000)
    second = checkpoint.load_hf(tmp_path / "separate", dtype=None)
    assert bits(second) == bits(first) and second.config == first.config
    checkpoint.save_hf(second, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("fused", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_each_expert_is_three_linear_layers(model):
    named = checkpoint.to_tensors(model, checkpoint.HF_UNFUSED)
    fused = checkpoint.to_tensors(model)["language_model.model.layers.1.feed_forward.experts.gate_up_proj"]
    np.testing.assert_array_equal(named[GATE], fused[2, :, :24].T)
    np.testing.assert_array_equal(named[GATE.replace("gate", "up")], fused[2, :, 24:].T)
    assert named[DOWN].shape == (32, 24) and not any(key.endswith("gate_up_proj") for key in named)
    assert bits(checkpoint.from_tensors(model.config, named)) == bits(model)


def test_missing_surplus_and_misshapen_experts_are_listed_at_once(model, tmp_path):
    def spoil(named):
        del named[GATE]
        named[GATE.replace("experts.2", "experts.4")] = np.ones((24, 32), np.float32)
        named[DOWN] = np.ones((24, 32), np.float32)

    with pytest.raises(ValueError) as error:
        checkpoint.load_hf(rewrite(model, tmp_path / "spoilt", spoil))
    for part in (
        f"1 missing:\n  {GATE}",
        "1 unexpected:\n",
        "experts.4.gate",
        f"{DOWN}: wanted (32, 24), got (24, 32)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_weights_are_multiplied_by_their_scales(strategy, model, tmp_path):
    meant = {}

    def change(named):
        for key in (GATE, DOWN):
            size = len(named[key])
            scale = np.linspace(0.01, 0.02, size)[:, None] if strategy == "channel" else np.array([0.015])
            meant[key] = quantise(named, key, scale.astype(np.float32))

    weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True}
    released = {**COMPRESSED, "config_groups": {"group_0": {"weights": weights}}}
    loaded = checkpoint.load_hf(rewrite(model, tmp_path / "fp8", change, released))
    got = checkpoint.to_tensors(loaded, checkpoint.HF_UNFUSED)
    for key, weight in checkpoint.to_tensors(model, checkpoint.HF_UNFUSED).items():
        np.testing.assert_array_equal(got[key], meant.get(key, weight))
    assert not np.array_equal(meant[GATE], checkpoint.to_tensors(model, checkpoint.HF_UNFUSED)[GATE])
    checkpoint.save_hf(loaded, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_scale_may_be_one_number_of_any_shape_and_its_dtype_is_the_weights():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3).astype(FP8)
    for shape in ((), (1,), (1, 1)):
        named = {"a.weight": weight, "a.weight_scale": np.full(shape, 0.3, jnp.bfloat16)}
        reader = quantised.Dequantised(assembly.InMemory(named))
        assert reader.shapes == {"a.weight": (2, 3)} and reader.dtypes["a.weight"] == jnp.bfloat16
        wanted = (weight.astype(np.float32) * np.float32(jnp.bfloat16(0.3))).astype(jnp.bfloat16)
        np.testing.assert_array_equal(reader.read("a.weight"), wanted)


def test_fp8_tensors_and_scales_that_do_not_match_are_listed_at_once(model, tmp_path):
    def change(named):
        quantise(named, GATE, np.ones((24, 1), np.float32))
        quantise(named, DOWN, np.ones((32, 1), np.float32))
        del named[f"{GATE}_scale"]
        named[f"{DOWN}_scale"] = np.ones((8, 1), np.float32)
        named["language_model.lm_head.weight_scale"] = np.ones(1, np.float32)
        named["vision_model.class_embedding"] = named["vision_model.class_embedding"].astype(FP8)

    with pytest.raises(ValueError) as error:
        checkpoint.load_hf(rewrite(model, tmp_path / "fp8", change))
    for part in (
        f"{GATE}: FP8 without {GATE}_scale",
        f"{DOWN}_scale: wanted (32, 1) or one number, got (8, 1)",
        "lm_head.weight_scale: a scale, but language_model.lm_head.weight is not in FP8",
        "vision_model.class_embedding: FP8 of shape (32,); wanted the matrix",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    named = {"a.weight": np.ones((2, 2), FP8), "a.weight_scale": np.full((2, 1), scale, np.float32)}
    with pytest.raises(ValueError, match="a.weight_scale: scales must be positive"):
        quantised.Dequantised(assembly.InMemory(named)).read("a.weight")


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "fbgemm_fp8"},
        {"config_groups": {}},
        {"format": "nvfp4-pack-quantized"},
        {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 3, "strategy": "channel"}}}},
        {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 4, "group_size": 8, "actorder": "group"}}}},
        {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 4, "strategy": "channel"}}}},
        {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "block"}}}},
        {
            "config_groups": {
                "g": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": False}}
            }
        },
    ],
)
def test_other_quantisations_are_refused_with_what_was_seen(change):
    with pytest.raises(NotImplementedError, match="wanted quant_method 'compressed-tensors'") as error:
        schemes.Schemes({**COMPRESSED, **change})
    assert str(next(iter(change.values()))) in str(error.value)
