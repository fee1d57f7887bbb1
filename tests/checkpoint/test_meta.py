"""Meta's checkpoints: names of modules, names of released files, tensor-parallel shards, and what must stop a load.

Released files are made by `released_files`, without the tables under test.
"""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from released_files import cut, released
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import layouts, positions
from llama4_jax.config import RopeScaling
from llama4_jax.core import names
from llama4_jax.testing import tiny

ENCODER = "vision_embeddings.vision_encoder."
# Hugging Face's names to those of Meta's modules: the beginning, by the first pattern that fits, then every part.
RENAMED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"language_model\.model\.layers\.", "layers."),
        (r"language_model\.(model\.)?", ""),
        (r"vision_model\.model\.layers\.(\d+)\.self_attn", ENCODER + r"transformer.resblocks.\1.attn"),
        (r"vision_model\.model\.layers\.(\d+)\.input_layernorm", ENCODER + r"transformer.resblocks.\1.ln_1"),
        (r"vision_model\.model\.layers\.(\d+)\.post_attention_layernorm", ENCODER + r"transformer.resblocks.\1.ln_2"),
        (r"vision_model\.model\.layers\.", ENCODER + "transformer.resblocks."),
        (r"vision_model\.vision_adapter", "vision_embeddings.vision_adapter"),
        (r"vision_model\.patch_embedding\.linear", ENCODER + "conv1._linear"),
        (r"vision_model\.", ENCODER),
        (r"multi_modal_projector\.linear_1", "vision_projection"),
    )
]
PARTS = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "router.weight": "router_DE",
    "gate_proj": "w1",
    "experts.down_proj": "experts.w2",
    "down_proj": "w2",
    ".up_proj": ".w3",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layernorm_pre": "ln_pre",
    "layernorm_post": "ln_post",
}


def config():
    """Multimodal, dense and mixture layers by turns, with a scaling of frequencies that Meta's code can do."""
    whole = tiny.vision_config(num_layers=5)
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192)
    attention = dataclasses.replace(whole.text.attention, rope_scaling=scaling)
    moe = dataclasses.replace(whole.text.moe, step=2)
    vision = dataclasses.replace(whole.vision, mlp_dim=whole.vision.embed_dim * whole.vision.shuffle**2)
    return dataclasses.replace(whole, text=dataclasses.replace(whole.text, attention=attention, moe=moe), vision=vision)


@pytest.fixture(scope="module")
def model():
    return tiny.model(config())


@pytest.fixture(scope="module")
def logits():
    """Logits of a model for one picture and some text."""
    tokens = np.array([[5, 0, 0, 0, 0, 9, 77, 3, 14, 60]])
    images = np.linspace(-1, 1, 16 * 16 * 3, dtype=np.float32).reshape(1, 16, 16, 3)
    return jax.jit(lambda model: model(tokens, images=images).logits)


def bits(model) -> dict:
    return {
        name: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in names.split(model)[1].items()
    }


def write(model, folder: pathlib.Path, make=released, shards: int = 2, change=None) -> pathlib.Path:
    """A checkpoint of `model` in `shards` files, each made by `make`; `change` may spoil the list of their tensors."""
    checkpoint.save_meta(model, folder)
    (whole,) = folder.glob("consolidated.*")
    modules = load_file(whole)
    files = [make(modules, shard, shards) for shard in range(shards)]
    if change:
        change(files)
    whole.unlink()
    for shard, named in enumerate(files):
        named = {key: np.ascontiguousarray(tensor) for key, tensor in named.items()}
        save_file(named, folder / f"consolidated.{shard:02d}.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_of_modules_round_trip_with_the_same_bits(dtype, model, tmp_path):
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
    checkpoint.save_meta(model, tmp_path / "meta")
    loaded = checkpoint.load_meta(tmp_path / "meta", dtype=None)
    assert bits(loaded) == bits(model) and loaded.config == model.config
    checkpoint.save_meta(loaded, tmp_path / "again")
    for name in ("consolidated.00.safetensors", "params.json", "llama4_jax.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "meta" / name).read_bytes()


def test_each_tensor_of_metas_modules_is_that_of_hugging_face(model):
    named, wanted = checkpoint.to_tensors(model, layouts.META_MODULES), {}
    for key, tensor in checkpoint.to_tensors(model).items():
        name = next(old.sub(new, key) for old, new in RENAMED if old.match(key))
        for part, new in PARTS.items():
            name = name.replace(part, new)
        if name.endswith("gate_up_proj"):
            wanted[name.replace("gate_up_proj", "w1")], wanted[name.replace("gate_up_proj", "w3")] = np.split(
                tensor, 2, -1
            )
        else:
            wanted[name] = tensor.T if name.endswith("router_DE") else tensor
    assert named.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(named[name], tensor, err_msg=name)


@pytest.mark.parametrize(("make", "shards"), [(cut, 1), (cut, 2), (released, 1), (released, 2)])
def test_shards_join_to_the_same_bits(make, shards, model, tmp_path):
    assert bits(checkpoint.load_meta(write(model, tmp_path / "meta", make, shards))) == bits(model)


def test_bfloat16_shards_join_to_the_same_bits_layer_by_layer_too(model, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tiny.model(config(), scan=False))
    assert bits(checkpoint.load_meta(write(half, tmp_path / "meta"), dtype=None, scan=False)) == bits(half)


def test_logits_stay_the_same_through_every_layout(model, logits, tmp_path):
    wanted = logits(model)
    checkpoint.save_hf(model, tmp_path / "hf")
    checkpoint.save_hf(checkpoint.load_hf(tmp_path / "hf"), tmp_path / "separate", layout=checkpoint.HF_UNFUSED)
    last = checkpoint.load_meta(write(checkpoint.load_hf(tmp_path / "separate"), tmp_path / "meta"))
    np.testing.assert_array_equal(logits(last), wanted)
    assert np.isfinite(wanted).all() and np.std(wanted) > 0.1


def test_groups_of_a_file_may_have_names_of_modules(model, tmp_path):
    def make(modules, shard, shards):
        mixed, plain = released(modules, shard, shards), cut(modules, shard, shards)
        for name in ("fc1_weight", "fc2_weight"):
            del mixed[f"layers.0.feed_forward.mlp.{name}"], mixed[f"layers.2.feed_forward.mlp.{name}"]
            del mixed[f"layers.4.feed_forward.mlp.{name}"]
        return mixed | {key: plain[key] for key in plain if ".feed_forward.w" in key}

    assert bits(checkpoint.load_meta(write(model, tmp_path / "meta", make))) == bits(model)


def test_problems_of_all_shards_are_listed_at_once(model, tmp_path):
    def spoil(files):
        del files[0]["layers.1.feed_forward.experts.moe_w_out_eF_D"]
        files[1]["layers.0.attention.wqkv.bias"] = np.ones(3, np.float32)
        files[1]["layers.2.feed_forward.mlp.fc1_weight"] = np.ones((5, 32), np.float32)

    with pytest.raises(ValueError) as error:
        checkpoint.load_meta(write(model, tmp_path / "meta", change=spoil))
    for part in (
        "1 missing:\n  layers.1.feed_forward.experts.moe_w_out_eF_D (consolidated.00.safetensors)",
        "1 unexpected:\n  layers.0.attention.wqkv.bias (consolidated.01.safetensors)",
        "layers.2.feed_forward.mlp.fc1_weight (consolidated.01.safetensors): wanted (48, 32), got (5, 32)",
    ):
        assert part in str(error.value)


def test_a_tensor_under_two_names_is_refused(model, tmp_path):
    def spoil(files):
        files[0]["layers.1.ffn_norm.weight"] = files[0]["layers.1.feed_forward.norm.weight"]

    with pytest.raises(ValueError, match="1 unexpected:\n  layers.1.feed_forward.norm.weight"):
        checkpoint.load_meta(write(model, tmp_path / "meta", shards=1, change=spoil))


def test_more_shards_than_key_heads_are_refused(model, tmp_path):
    def repeat(modules, shard, shards):
        return cut(modules, shard % 2, 2)

    with pytest.raises(ValueError, match="axis 'k' of 2 in 4 shards: not divisible"):
        checkpoint.load_meta(write(model, tmp_path / "meta", repeat, 4))


def test_shards_that_differ_in_what_each_has_whole_are_reported(model, tmp_path, caplog):
    def spoil(files):
        files[1]["norm.weight"] = files[1]["norm.weight"] + 1

    loaded = checkpoint.load_meta(write(model, tmp_path / "meta", change=spoil))
    assert bits(loaded) == bits(model)
    assert caplog.messages == ["norm.weight differs between shard 0 and shard 1; using that of shard 0"]


def test_the_older_position_embedding_is_resampled(model, tmp_path):
    old = np.random.default_rng(0).normal(size=model.vision.position_embedding.shape).astype(np.float32)

    def age(files):
        del files[0][positions.NEW]
        files[0][positions.OLD] = old

    loaded = checkpoint.load_meta(write(model, tmp_path / "meta", shards=1, change=age))
    np.testing.assert_array_equal(loaded.vision.position_embedding[...], positions.resample(old))


def test_folders_without_a_whole_checkpoint_say_what_is_missing(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="params.json is missing"):
        checkpoint.load_meta(tmp_path)
    folder = write(model, tmp_path / "meta")
    (folder / "consolidated.00.safetensors").rename(folder / "consolidated.02.safetensors")
    with pytest.raises(FileNotFoundError, match=r"without a gap; missing \['consolidated.00.safetensors'\]"):
        checkpoint.load_meta(folder)
    (folder / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="wanted consolidated.00.pth, ... or consolidated.00.safetensors"):
        checkpoint.load_meta(folder)


def test_what_cannot_be_expressed_or_loaded_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(NotImplementedError, match="rope_scaling"):
        checkpoint.save_meta(tiny.model(tiny.text_config(2)), tmp_path / "meta")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_the_old_shards_and_keeps_other_files(model, tmp_path):
    folder = write(model, tmp_path / "meta")
    (folder / "tokenizer.model").write_text("kept")
    checkpoint.save_meta(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "consolidated.00.safetensors",
        "llama4_jax.json",
        "params.json",
        "tokenizer.model",
    ]
    assert json.loads((folder / "params.json").read_text())["n_layers"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]
