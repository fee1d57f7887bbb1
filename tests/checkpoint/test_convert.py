"""Conversion between layouts: the same bits from each to each, in pieces, killed and resumed, checked, all or nothing."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from released_files import released
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import convert, leaves, ledger, native
from llama4_jax.config import RopeScaling
from llama4_jax.core import names
from llama4_jax.testing import tiny

KINDS = convert.WRITTEN
SHARDS = 40_000  # bytes in a file: several of them


def config():
    """Multimodal, dense and mixture layers by turns, within what every layout can express."""
    whole = tiny.vision_config(num_layers=3)
    scaling = RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192)
    attention = dataclasses.replace(whole.text.attention, rope_scaling=scaling)
    text = dataclasses.replace(whole.text, attention=attention, moe=dataclasses.replace(whole.text.moe, step=2))
    vision = dataclasses.replace(whole.vision, mlp_dim=whole.vision.embed_dim * whole.vision.shuffle**2)
    return dataclasses.replace(whole, text=text, vision=vision)


def save(model, kind: str, folder: pathlib.Path) -> pathlib.Path:
    """`model` in a layout, by the functions that write whole models."""
    if kind == "orbax":
        native.save_native(model, folder)
    elif kind == "meta":
        checkpoint.save_meta(model, folder)
    else:
        layout = checkpoint.HF_FUSED if kind == "hf" else checkpoint.HF_UNFUSED
        checkpoint.save_hf(model, folder, layout=layout, max_shard_bytes=SHARDS)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny.model(config())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """(layout, dtype) -> a checkpoint of the model."""
    root = tmp_path_factory.mktemp("saved")
    models = {"float32": model, "bfloat16": jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model)}
    return {
        (kind, dtype): save(cast, kind, root / f"{kind}-{dtype}") for dtype, cast in models.items() for kind in KINDS
    }


def run(source, target, read: str, write: str, **options) -> convert.Summary:
    asked = convert.Conversion(source=source, target=target, read=read, write=write, max_shard_bytes=SHARDS, **options)
    return convert.convert(asked)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every file, but for what our own layout may do in several ways: chunks, and Orbax's notes of times."""
    found = {path for path in folder.rglob("*") if path.is_file() and "parameters" not in path.parts}
    return {path.name: path.read_bytes() for path in found} | bits(folder)


def bits(folder: pathlib.Path) -> dict[str, bytes]:
    """The parameters of a checkpoint of our own; nothing of others."""
    if not (folder / native.MANIFEST).is_file():
        return {}
    return {name: np.asarray(array).tobytes() for name, array in names.split(native.load_native(folder))[1].items()}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.thorough), "bfloat16"])
@pytest.mark.parametrize("read", KINDS)
def test_every_layout_becomes_every_other_bit_for_bit_and_in_small_pieces(read, dtype, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, "PIECE_BYTES", 300)  # most tensors in several pieces, some rows above it
    for write in KINDS:
        summary = run(saved[read, dtype], tmp_path / write, read, write)
        assert files(tmp_path / write) == files(saved[write, dtype])
        assert summary.resumed == 0 and summary.tensors > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(KINDS)


def test_logits_stay_the_same_through_a_chain_of_conversions(model, saved, tmp_path):
    tokens = np.array([[5, 0, 0, 0, 0, 9, 77, 3, 14, 60]])
    images = np.linspace(-1, 1, 16 * 16 * 3, dtype=np.float32).reshape(1, 16, 16, 3)
    logits = jax.jit(lambda model: model(tokens, images=images).logits)
    run(saved["hf", "float32"], tmp_path / "a", "hf", "orbax")
    run(tmp_path / "a", tmp_path / "b", "orbax", "meta")
    run(tmp_path / "b", tmp_path / "c", "meta", "hf_unfused")
    run(tmp_path / "c", tmp_path / "d", "hf_unfused", "orbax")
    wanted = logits(model)
    np.testing.assert_array_equal(logits(native.load_native(tmp_path / "d")), wanted)
    assert np.isfinite(wanted).all() and np.std(wanted) > 0.1


@pytest.mark.parametrize("write", ["orbax", "hf"])
def test_released_files_in_shards_are_joined_on_the_way(write, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, "PIECE_BYTES", 300)
    folder = tmp_path / "released"
    folder.mkdir()
    for path in saved["meta", "bfloat16"].iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    modules = load_file(saved["meta", "bfloat16"] / "consolidated.00.safetensors")
    for shard in range(2):
        named = {key: np.ascontiguousarray(tensor) for key, tensor in released(modules, shard, 2).items()}
        save_file(named, folder / f"consolidated.{shard:02d}.safetensors")
    run(folder, tmp_path / "joined", "meta", write)
    assert files(tmp_path / "joined") == files(saved[write, "bfloat16"])


@pytest.mark.parametrize("read", ["hf", "orbax"])
def test_weights_are_rounded_on_request(read, saved, tmp_path):
    run(saved[read, "float32"], tmp_path / "half", read, "hf_unfused", dtype="bfloat16")
    assert files(tmp_path / "half") == files(saved["hf_unfused", "bfloat16"])


# -------------------------------------------------------------------------------------------------- stopped half-way

KILLED = """
import os, pathlib, signal, sys
from llama4_jax.checkpoint import convert
source, target, write, shards = sys.argv[1:]
def advance(progress):
    if progress.phase == "writing" and 4 * progress.done > progress.total:
        os.kill(os.getpid(), signal.SIGKILL)
asked = convert.Conversion(
    source=pathlib.Path(source), target=pathlib.Path(target), read="hf", write=write, max_shard_bytes=int(shards))
convert.convert(asked, advance)
"""


def finished(folder: pathlib.Path) -> dict:
    return dict(map(json.loads, (folder / ledger.NAME).read_text().splitlines()[1:]))


@pytest.mark.parametrize("write", ["orbax", "hf_unfused"])
def test_a_killed_conversion_goes_on_and_does_nothing_twice(write, saved, tmp_path, root):
    source, target, partial = saved["hf", "float32"], tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", KILLED, str(source), str(target), write, str(SHARDS)]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    done = finished(partial)
    assert not target.exists() and 10 < len(done) < 80
    with open(partial / ledger.NAME, "a") as file:
        file.write('["half a line')
    if write == "orbax":
        times = {path: (partial / native.PARAMETERS / path / "array" / "zarr.json").stat().st_mtime_ns for path in done}
        (partial / native.PARAMETERS / "norm.scale.orbax-checkpoint-tmp").mkdir()  # as if it had been writing that
    summary = run(source, target, "hf", write)
    assert summary.resumed == len(done) and not partial.exists()
    assert files(target) == files(saved[write, "float32"])
    if write == "orbax":
        array = target / native.PARAMETERS
        assert {path: (array / path / "array" / "zarr.json").stat().st_mtime_ns for path in done} == times
        assert {path.name for path in array.iterdir()} == set(native.NativeLeaves(target).records)


def interrupted(source, target, write: str, **options) -> None:
    """A conversion that an exception ends when all is written and nothing is checked."""

    def stop(progress):
        if progress.phase == "checking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked = {"read": "hf", "write": write, "max_shard_bytes": SHARDS} | options
        convert.convert(convert.Conversion(source=source, target=target, **asked), stop)


@pytest.mark.parametrize("write", ["orbax", "hf"])
def test_a_damaged_tensor_is_found_by_its_checksum_and_made_again(write, saved, tmp_path):
    source, target, partial = saved["hf", "float32"], tmp_path / "out", tmp_path / "out.partial"
    interrupted(source, target, write)
    where = "parameters/norm.scale/array/c/0" if write == "orbax" else "model-00001-of-*.safetensors"
    (path,) = partial.glob(where)
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"on disk 1 of \d+ tensors are not what was written:\n  .*\n.*made anew"
    ) as error:
        run(source, target, "hf", write)
    (damaged,) = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert damaged not in finished(partial) and not target.exists()
    summary = run(source, target, "hf", write)
    assert summary.resumed == summary.tensors - 1
    assert files(target) == files(saved[write, "float32"])


def test_unfinished_work_of_another_kind_is_not_continued(saved, tmp_path):
    source, target = saved["hf", "float32"], tmp_path / "out"
    interrupted(source, target, "hf")
    with pytest.raises(ValueError, match='unfinished work of another kind:\n  dtype: there null, now "bfloat16"\nGive'):
        run(source, target, "hf", "hf", dtype="bfloat16")
    other = tmp_path / "source"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    interrupted(other, tmp_path / "changed", "hf")
    (other / "config.json").touch()
    with pytest.raises(ValueError, match="another kind:\n  files"):
        run(other, tmp_path / "changed", "hf", "hf")
    assert run(source, target, "hf", "hf").resumed > 50


def test_two_processes_do_not_write_to_one_target(saved, tmp_path):
    asked = convert.Conversion(source=saved["hf", "float32"], target=tmp_path / "out", read="hf", write="hf")
    with ledger.Ledger(asked.partial, asked.work()), pytest.raises(BlockingIOError, match="another process is writing"):
        convert.convert(asked)


# ------------------------------------------------------------------------------------------------------ what stops it


@pytest.mark.parametrize("write", ["orbax", "meta"])
def test_unknown_missing_and_misshapen_keys_are_listed_and_nothing_is_written(write, saved, tmp_path):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved["hf", "float32"] / "config.json").read_bytes())
    named = {}
    for path in saved["hf", "float32"].glob("*.safetensors"):
        named |= load_file(path)
    del named["language_model.model.norm.weight"]
    named["language_model.model.layers.0.rotary"] = np.ones(3, np.float32)
    named["language_model.lm_head.weight"] = np.ones((3, 5), np.float32)
    save_file(named, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        run(folder, tmp_path / "out", "hf", write)
    for part in (
        "1 missing:\n  language_model.model.norm.weight",
        "1 unexpected:\n  language_model.model.layers.0.rotary",
        "1 misshapen:\n  language_model.lm_head.weight: wanted (128, 32), got (3, 5)",
    ):
        assert part in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_what_a_layout_cannot_express_is_refused_before_anything_is_written(tmp_path):
    native.save_native(tiny.model(tiny.text_config(2)), tmp_path / "text")
    with pytest.raises(NotImplementedError, match="rope_scaling"):
        run(tmp_path / "text", tmp_path / "out", "orbax", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_an_existing_target_is_refused_unless_a_checkpoint_may_be_overwritten(saved, tmp_path):
    source, target = saved["hf", "float32"], tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="out exists; choose another target, or say to overwrite it"):
        run(source, target, "hf", "meta")
    with pytest.raises(FileExistsError, match="it is no checkpoint, and is not overwritten"):
        run(source, target, "hf", "meta", overwrite=True)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    (target / "config.json").write_text("{}")
    run(source, target, "hf", "meta", overwrite=True)
    assert files(target) == files(saved["meta", "float32"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_in_the_way_is_left_alone(saved, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ValueError, match="out.partial exists and has no ledger.jsonl, so it is not ours"):
        run(saved["hf", "float32"], tmp_path / "out", "hf", "meta")
    with pytest.raises(ValueError, match="one in the other"):
        run(tmp_path, tmp_path / "inside", "hf", "meta")
    with pytest.raises(ValueError, match="read='gguf'; wanted one of hf, hf_unfused, meta, orbax"):
        run(tmp_path, tmp_path / "out", "gguf", "meta")
    with pytest.raises(ValueError, match="read it as 'hf'"):
        run(saved["hf", "float32"], tmp_path / "other", "hf_unfused", "meta")


# ------------------------------------------------------------------------------------------------- what comes with it


def test_the_tokenizer_comes_along(model, tmp_path):
    save(model, "hf", tmp_path / "hf")
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (tmp_path / "hf" / name).write_text(name)
    run(tmp_path / "hf", tmp_path / "out", "hf", "orbax")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["chat_template.jinja", "manifest.json", "parameters", "tokenizer.model", "tokenizer_config.json"]


def halved(path: str, leaf: np.ndarray) -> np.ndarray:
    """Fewer bits for matrices of experts alone."""
    return leaf.astype("bfloat16") if ".experts." in path else leaf


def flattened(path: str, leaf: np.ndarray) -> np.ndarray:
    return leaf.reshape(-1)


def test_a_transform_sees_each_whole_parameter_on_its_way_to_our_own_layout(model, saved, tmp_path):
    run(saved["hf", "float32"], tmp_path / "out", "hf", "orbax", transform=halved)
    for path, array in names.split(native.load_native(tmp_path / "out"))[1].items():
        wanted = names.split(model)[1][path]
        assert array.dtype == ("bfloat16" if ".experts." in path else "float32"), path
        np.testing.assert_array_equal(array, wanted.astype(array.dtype), err_msg=path)
    with pytest.raises(NotImplementedError, match="only 'orbax' stores what a transform makes"):
        run(saved["hf", "float32"], tmp_path / "hf", "hf", "hf", transform=halved)
    with pytest.raises(ValueError, match="transform must keep the shape"):
        run(saved["hf", "float32"], tmp_path / "flat", "hf", "orbax", transform=flattened)
