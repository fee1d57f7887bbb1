"""Checkpoints in and out: bit for bit, every tensor once, all problems in one message, all or nothing on disk."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import hf
from llama4_jax.checkpoint.tensors import write_file
from llama4_jax.config import presets
from llama4_jax.model import Llama4
from llama4_jax.testing import goldens

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/meta.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Each golden's checkpoint, in fp32."""
    scratch = tmp_path_factory.mktemp("checkpoints")
    return {name: goldens.load(GOLDENS / name, scratch).checkpoint for name in NAMES}


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same_bits(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert got[key].tobytes() == tensor.tobytes(), key


def rewrite(folder: pathlib.Path, target: pathlib.Path, change) -> pathlib.Path:
    """A copy of a checkpoint whose dict of tensors went through `change`."""
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    named = stored(folder)
    save_file(change(named) or named, target / "model.safetensors")
    return target


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_saving_what_was_loaded_gives_the_same_bits(name, scan, folders, tmp_path):
    model = checkpoint.load_hf(folders[name], scan=scan)
    checkpoint.save_hf(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), stored(folders[name]))
    assert hf.read_config(tmp_path / "saved") == model.config


def test_bfloat16_round_trip_gives_the_same_bits(folders, tmp_path):
    half = rewrite(
        folders["vision"], tmp_path / "half", lambda named: {k: v.astype(jnp.bfloat16) for k, v in named.items()}
    )
    model = checkpoint.load_hf(half, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    checkpoint.save_hf(model, tmp_path / "saved")
    assert_same_bits(stored(tmp_path / "saved"), stored(half))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_are_converted_on_request(folders):
    wanted = stored(folders["scout"])["lm_head.weight"].astype(jnp.bfloat16)
    model = checkpoint.load_hf(folders["scout"], dtype="bfloat16")
    np.testing.assert_array_equal(np.asarray(model.head.kernel[...]), wanted.T)
    with pytest.raises(ValueError, match="dtype='int8'; wanted one of float32"):
        checkpoint.load_hf(folders["scout"], dtype="int8")


def test_shards_with_an_index_hold_the_same_bits_and_load_again(folders, tmp_path):
    checkpoint.save_hf(checkpoint.load_hf(folders["bias"]), tmp_path / "saved", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert_same_bits(stored(tmp_path / "saved"), stored(folders["bias"]))
    assert_same_bits(checkpoint.to_tensors(checkpoint.load_hf(tmp_path / "saved")), stored(folders["bias"]))


def test_a_missing_shard_is_named(folders, tmp_path):
    checkpoint.save_hf(checkpoint.load_hf(folders["bias"]), tmp_path / "saved", max_shard_bytes=100_000)
    lost = next((tmp_path / "saved").glob("model-00002*"))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        checkpoint.load_hf(tmp_path / "saved")


def test_an_index_that_disagrees_with_its_files_is_refused(folders, tmp_path):
    checkpoint.save_hf(checkpoint.load_hf(folders["bias"]), tmp_path / "saved", max_shard_bytes=100_000)
    path = tmp_path / "saved" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"disagree.*only in the file \['model.norm.weight'\]"):
        checkpoint.load_hf(tmp_path / "saved")


def test_all_missing_unexpected_and_misshapen_tensors_are_listed_at_once(folders, tmp_path):
    def spoil(named):
        del named["model.norm.weight"], named["model.layers.2.feed_forward.experts.down_proj"]
        named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        named["model.layers.1.self_attn.q_proj.weight"] = np.ones((3, 48), np.float32)
        named["lm_head.weight"] = np.ones((48, 128), np.float32)

    with pytest.raises(ValueError) as error:
        checkpoint.load_hf(rewrite(folders["scout"], tmp_path / "spoilt", spoil))
    for part in (
        "2 missing:\n  model.layers.2.feed_forward.experts.down_proj\n  model.norm.weight",
        "1 unexpected:\n  model.layers.0.self_attn.rotary_emb.inv_freq",
        "2 misshapen:",
        "lm_head.weight: wanted (128, 48), got (48, 128)",
        "model.layers.1.self_attn.q_proj.weight: wanted (64, 48), got (3, 48)",
    ):
        assert part in str(error.value)


def test_a_tied_checkpoint_has_no_output_matrix_and_refuses_one(folders, tmp_path):
    model = checkpoint.load_hf(folders["tied"])
    assert model.head is None and "lm_head.weight" not in checkpoint.to_tensors(model)

    def untie(named):
        named["lm_head.weight"] = named["model.embed_tokens.weight"]

    with pytest.raises(ValueError, match="1 unexpected:\n  lm_head.weight"):
        checkpoint.load_hf(rewrite(folders["tied"], tmp_path / "untied", untie))


def test_text_weights_under_the_multimodal_prefix_load_too(folders, tmp_path):
    prefixed = rewrite(
        folders["scout"], tmp_path / "p", lambda named: {f"language_model.{k}": v for k, v in named.items()}
    )
    assert_same_bits(checkpoint.to_tensors(checkpoint.load_hf(prefixed)), stored(folders["scout"]))


def test_gate_and_up_land_in_their_halves(folders):
    named, model = stored(folders["top2"]), checkpoint.load_hf(folders["top2"], scan=False)
    dense, mixture = model.decoder.tail[0].feed_forward, model.decoder.tail[2].feed_forward
    np.testing.assert_array_equal(dense.gate_up.kernel[:, 0], named["model.layers.0.feed_forward.gate_proj.weight"].T)
    np.testing.assert_array_equal(dense.gate_up.kernel[:, 1], named["model.layers.0.feed_forward.up_proj.weight"].T)
    fused = named["model.layers.2.feed_forward.experts.gate_up_proj"]
    np.testing.assert_array_equal(mixture.experts.gate_up[:, :, 1], fused[:, :, 32:])


def test_tensors_in_memory_make_the_same_model_as_a_file(folders):
    model = checkpoint.from_tensors(hf.read_config(folders["vision"]), stored(folders["vision"]))
    assert_same_bits(checkpoint.to_tensors(model), stored(folders["vision"]))


def test_an_existing_checkpoint_is_replaced_and_other_files_stay(folders, tmp_path):
    target = tmp_path / "saved"
    checkpoint.save_hf(checkpoint.load_hf(folders["bias"]), target, max_shard_bytes=100_000)
    (target / "tokenizer.model").write_text("kept")
    checkpoint.save_hf(checkpoint.load_hf(folders["scout"]), target)
    assert (target / "tokenizer.model").read_text() == "kept"
    assert_same_bits(stored(target), stored(folders["scout"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_debris(folders, tmp_path, monkeypatch):
    target = tmp_path / "saved"
    checkpoint.save_hf(checkpoint.load_hf(folders["scout"]), target)
    written = []

    def fill_the_disk(path, specs, produce):
        if written:
            raise OSError("No space left on device")
        write_file(path, specs, produce)
        written.append(path)

    monkeypatch.setattr("llama4_jax.checkpoint.tensors.write_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_hf(checkpoint.load_hf(folders["bias"]), target, max_shard_bytes=100_000)
    assert written and not written[0].exists()
    assert_same_bits(stored(target), stored(folders["scout"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_what_the_format_cannot_express_is_refused_before_anything_is_written(tmp_path):
    tiny = presets.tiny()  # its vision MLP is narrower than its adapter's input
    model = jax.eval_shape(lambda: Llama4(tiny, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match=r"vision.mlp_dim=48.*= 128"):
        checkpoint.save_hf(model, tmp_path / "saved")
    text = dataclasses.replace(tiny.text, moe=dataclasses.replace(tiny.text.moe, selection_bias=True))
    biased = dataclasses.replace(tiny, text=text, vision=None, patch_token=None)
    model = jax.eval_shape(lambda: Llama4(biased, rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="selection_bias"):
        checkpoint.save_hf(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_folders_without_a_checkpoint_say_what_is_missing(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        checkpoint.load_hf(tmp_path)
    (tmp_path / "config.json").write_bytes((folders["scout"] / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        checkpoint.load_hf(tmp_path)


def test_dtypes_that_are_no_weights_are_refused_by_name(folders, tmp_path):
    def quantise(named):
        named["lm_head.weight"] = named["lm_head.weight"].astype(np.int8)

    with pytest.raises(NotImplementedError, match="lm_head.weight has dtype int8"):
        checkpoint.load_hf(rewrite(folders["scout"], tmp_path / "int8", quantise))


def test_what_is_written_is_what_safetensors_writes_even_with_mixed_dtypes(tmp_path):
    named = {"odd": np.arange(3).astype(jnp.bfloat16), "wide": np.arange(4.0, dtype=np.float32).reshape(2, 2)}
    specs = {key: (tensor.shape, tensor.dtype) for key, tensor in named.items()}
    write_file(tmp_path / "ours.safetensors", specs, named.__getitem__)
    assert_same_bits(load_file(tmp_path / "ours.safetensors"), named)
    with pytest.raises(ValueError, match="odd: wanted"):
        write_file(tmp_path / "bad.safetensors", {**specs, "odd": ((4,), specs["odd"][1])}, named.__getitem__)
