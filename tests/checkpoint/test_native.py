"""Our own checkpoints: the same bits for every way to hold the decoder, Orbax's own reading, shards, and damage."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama4_jax.checkpoint import items, native
from llama4_jax.core import names
from llama4_jax.testing import tiny


def bits(model) -> dict:
    return {
        name: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in names.split(model)[1].items()
    }


@pytest.fixture(scope="module")
def models():
    return {scan: tiny.model(tiny.vision_config(num_layers=5), scan=scan) for scan in (True, False)}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "model"
    native.save_native(models[True], folder)
    return folder


def altered(folder, target, change):
    """A copy of a checkpoint whose manifest went through `change`; the parameters are the same files."""
    document = json.loads((folder / native.MANIFEST).read_text())
    change(document)
    target.mkdir()
    (target / native.PARAMETERS).symlink_to(folder / native.PARAMETERS)
    (target / native.MANIFEST).write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("scan", [True, False])
def test_a_stacked_model_is_read_back_stacked_or_layer_by_layer_with_the_same_bits(scan, models, folder):
    loaded = native.load_native(folder, scan=scan)
    assert bits(loaded) == bits(models[scan]) and loaded.config == models[scan].config


def test_a_bfloat16_model_saved_layer_by_layer_is_read_back_stacked(models, tmp_path):
    half = {scan: jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model) for scan, model in models.items()}
    native.save_native(half[False], tmp_path / "model")
    assert bits(native.load_native(tmp_path / "model")) == bits(half[True])


def test_zeros_are_stored_as_well(tmp_path):
    zeros = jax.tree.map(lambda leaf: leaf * 0, tiny.model(tiny.text_config(1)))
    native.save_native(zeros, tmp_path / "model")
    assert bits(native.load_native(tmp_path / "model")) == bits(zeros)


def test_weights_are_converted_on_request(models, folder):
    loaded = native.load_native(folder, dtype="bfloat16")
    assert bits(loaded) == bits(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), models[True]))
    with pytest.raises(ValueError, match="dtype='int8'; wanted one of float32"):
        native.load_native(folder, dtype="int8")


def test_orbax_itself_reads_every_parameter(models, folder):
    wanted = names.split(models[False])[1]
    with ocp.StandardCheckpointer() as reader:
        for path, array in wanted.items():
            read = reader.restore(folder / native.PARAMETERS / path)["array"]
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array, err_msg=path)
    assert {path.name for path in (folder / native.PARAMETERS).iterdir()} == set(wanted)


SHARDED = """
import pathlib, sys
import jax, numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from llama4_jax.checkpoint import items, native
from llama4_jax.core import names, partitioning
from llama4_jax.model import Llama4

folder = pathlib.Path(sys.argv[1])
leaves = native.NativeLeaves(folder)
mesh = partitioning.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
abstract = jax.eval_shape(lambda: Llama4(leaves.config, rngs=nnx.Rngs(0)))
places = names.split(partitioning.shardings(abstract, partitioning.TRAIN, mesh))[1]
largest, original = {}, native.NativeLeaves.window
def watched(self, path, box):
    part = original(self, path, box)
    largest[path] = max(largest.get(path, 0), part.size)
    return part
native.NativeLeaves.window = watched
model = native.load_native(folder, mesh=mesh)
native.NativeLeaves.window = original
whole = names.split(native.load_native(folder))[1]
split = 0
for name, array in names.split(model)[1].items():
    assert array.sharding == places[name], name
    shards = array.addressable_shards
    assert len(shards) == 8 and all(s.data.shape == places[name].shard_shape(array.shape) for s in shards)
    np.testing.assert_array_equal(array, whole[name], err_msg=name)
    split += shards[0].data.size < array.size
assert split > 30, split
for path in ("decoder.tail.2.feed_forward.experts.gate_up", "embed.table", "decoder.tail.4.attention.query.kernel"):
    wanted = leaves.specs[path][0]
    assert largest[path] == np.prod(wanted) // 8, (path, largest[path], wanted)
path = "decoder.tail.2.feed_forward.experts.gate_up"
sharding = jax.NamedSharding(mesh, jax.P("expert", "fsdp", None, "tensor"))
with ocp.StandardCheckpointer() as reader:
    like = {"array": jax.ShapeDtypeStruct(*leaves.specs[path], sharding=sharding)}
    restored = reader.restore(native.item(folder, path).absolute(), like)["array"]
assert restored.sharding == sharding
np.testing.assert_array_equal(restored, leaves.window(path, tuple(map(slice, restored.shape))))
print("in their shards")
"""


def test_parameters_arrive_in_their_shards_and_no_host_copy_of_one_is_made(folder, root):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(folder)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "in their shards", done.stderr[-3000:]


def test_changed_bits_are_found_by_the_sum_and_by_the_bytes(models, tmp_path):
    native.save_native(models[True], tmp_path / "model")
    path = "decoder.tail.1.attention.query.kernel"
    (chunk,) = [
        each for each in (tmp_path / "model" / native.PARAMETERS / path / "array" / "c").rglob("*") if each.is_file()
    ]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=rf"the bits of .*{path}.* are not those that were saved"):
        native.load_native(tmp_path / "model")
    assert (
        items.stored_record(native.item(tmp_path / "model", path))
        != native.NativeLeaves(tmp_path / "model").records[path]
    )
    content[5] ^= 1
    content[:4], content[4:8] = content[4:8], content[:4]
    chunk.write_bytes(content)  # the sum stays, the order does not
    found, wanted = (
        items.stored_record(native.item(tmp_path / "model", path)),
        native.NativeLeaves(tmp_path / "model").records[path],
    )
    assert found["sum"] == wanted["sum"] and found["crc32"] != wanted["crc32"]
    chunk.unlink()
    with pytest.raises(ValueError, match="query.kernel"):
        items.stored_record(native.item(tmp_path / "model", path))


def test_all_that_a_manifest_has_wrong_is_listed_at_once(folder, tmp_path):
    def spoil(document):
        parameters = document["parameters"]
        parameters["new.scale"] = parameters.pop("norm.scale")
        parameters["embed.table"]["shape"] = [3, 5]

    with pytest.raises(ValueError) as error:
        native.load_native(altered(folder, tmp_path / "spoilt", spoil))
    for part in ("1 missing:\n  norm.scale", "1 unexpected:\n  new.scale", "embed.table: wanted (128, 32), got (3, 5)"):
        assert part in str(error.value)


def test_folders_that_are_no_checkpoint_of_ours_say_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        native.load_native(tmp_path)
    with pytest.raises(ValueError, match="wanted format 'llama4_jax parameters, version 1', got 'other'"):
        native.load_native(altered(folder, tmp_path / "other", lambda document: document.update(format="other")))
    empty = altered(folder, tmp_path / "empty", lambda document: None)
    (empty / native.PARAMETERS).unlink()
    with pytest.raises(FileNotFoundError, match="zarr.json is missing; the checkpoint is incomplete"):
        native.load_native(empty)


def test_an_existing_checkpoint_is_replaced_and_other_files_stay(models, tmp_path):
    text = tiny.model(tiny.text_config(2))
    native.save_native(text, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_text("kept")
    (tmp_path / "model" / native.PARAMETERS / "stale").mkdir()
    native.save_native(text, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.model").read_text() == "kept"
    assert bits(native.load_native(tmp_path / "model")) == bits(text)
    assert not (tmp_path / "model" / native.PARAMETERS / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
