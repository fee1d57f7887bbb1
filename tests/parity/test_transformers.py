"""What we write is what transformers reads, the goldens can be made again, and configurations beyond them agree too."""

import json
import pathlib

import jax
import numpy as np
import pytest

from llama4_jax import checkpoint, infer
from llama4_jax.testing import goldens

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4  # as in test_goldens.py
GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
NAMES = sorted(folder.name for folder in GOLDENS.iterdir() if folder.is_dir())

# Sizes and switches that no golden has; every model has more layers than one period or a leftover layer.
CONFIGURATIONS = {
    "narrow_heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "hidden_size": 20},
    "top3_of_5": {"num_local_experts": 5, "num_experts_per_tok": 3, "interleave_moe_layer_step": 2},
    "all_dense": {"moe_layers": [], "use_qk_norm": False},
    "no_global_layer": {"no_rope_layers": [1] * 5, "no_rope_layer_interval": 6},
    "every_layer_global": {"no_rope_layer_interval": 1, "attn_scale": 0.5, "floor_scale": 3},
    "biased_and_tied": {"attention_bias": True, "tie_word_embeddings": True, "attention_chunk_size": 5},
}


@pytest.fixture(scope="module")
def maker():
    """The module that makes goldens; needs torch."""
    import make_goldens
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return make_goldens


def hf_logits(folder, golden: goldens.Golden) -> np.ndarray:
    import torch
    from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

    model_class = Llama4ForCausalLM if golden.images is None else Llama4ForConditionalGeneration
    model, loading = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extra = {} if golden.images is None else {"pixel_values": torch.from_numpy(golden.arrays["pixel_values"])}
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(golden.arrays["input_ids"]), **extra).logits.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_we_save(name, tmp_path, maker):
    golden = goldens.load(GOLDENS / name, tmp_path)
    saved = tmp_path / "saved"
    checkpoint.save_hf(checkpoint.load_hf(golden.checkpoint), saved, max_shard_bytes=200_000)
    assert (saved / "model.safetensors.index.json").exists()
    np.testing.assert_allclose(hf_logits(saved, golden), golden.arrays["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_goldens_can_be_made_again(name, maker):
    assert maker.check_variant(name, {**maker.BASE, **maker.VARIANTS[name]}) == []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_other_configurations_agree(name, tmp_path, maker):
    folder = make_clear_golden(tmp_path / name, {**maker.BASE, **CONFIGURATIONS[name]}, maker)
    compare(goldens.load(folder, tmp_path / "checkpoints"))


def test_the_early_spelling_of_the_configuration_agrees(tmp_path, maker):
    folder = make_clear_golden(tmp_path / "early", maker.BASE, maker)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config |= {"rope_scaling": rope, "no_rope_layers": [], "eos_token_id": [5, 6]}
    del config["layer_types"], config["moe_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    golden = goldens.load(folder, tmp_path / "checkpoints")
    np.testing.assert_allclose(hf_logits(golden.checkpoint, golden), golden.arrays["logits"], rtol=0, atol=TOLERANCE)
    # The first releases wrote 4 for true here, which transformers has since come to refuse.
    (golden.checkpoint / "config.json").write_text(json.dumps(config | {"attn_temperature_tuning": 4}))
    assert checkpoint.load_hf(golden.checkpoint).config.stop_tokens == (5, 6)
    compare(golden)


def make_clear_golden(folder: pathlib.Path, variant: dict, maker) -> pathlib.Path:
    """A golden made now, of the first seed from 1000 whose choices are all clear."""
    folder.mkdir()
    for seed in range(1000, 1100):
        arrays, meta = maker.make(folder, variant, seed)
        if min(meta["router_margin"], meta["greedy_margin"]) >= maker.MARGIN:
            break
    np.savez(folder / "golden.npz", **arrays)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def compare(golden: goldens.Golden) -> None:
    model, tokens = checkpoint.load_hf(golden.checkpoint), golden.arrays["input_ids"]
    logits = jax.jit(type(model).__call__)(model, tokens.astype(np.int32)).logits
    np.testing.assert_allclose(np.asarray(logits), golden.arrays["logits"], rtol=0, atol=TOLERANCE)
    time, total = tokens.shape[1], golden.arrays["greedy_ids"].shape[1]
    new = infer.generate(model, tokens.tolist(), max_new_tokens=total - time)
    assert new == golden.arrays["greedy_ids"][:, time:].tolist()
