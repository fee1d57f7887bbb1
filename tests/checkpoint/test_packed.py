"""Models in few bits on disk: the same bits back, two int4 a byte, and rounded on the way from one checkpoint to another."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint import convert, items, leaves, low_bit, native
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import ptq
from llama4_jax.testing import tiny

INT4, INT8 = QuantSpec(group=8, symmetric=False), QuantSpec(values="int8", group=None)
FP8 = QuantSpec(values="float8_e4m3fn", group=None, activations="float8_e4m3fn")
# Every kind of values, groups within a head and across heads, scales in both dtypes, with and without offsets.
RECIPE = QuantRecipe(
    name="of every kind",
    rules=(
        ("decoder.*.experts.*", INT4),
        ("decoder.*.attention.output.kernel", QuantSpec(group=16)),
        ("decoder.*.attention.query.kernel", QuantSpec(group=4, activations="int8")),
        ("decoder.*.attention.*.kernel", INT8),
        ("decoder.*.gate_up.kernel", FP8),
        ("head.kernel", QuantSpec(group=16, scales="float32")),
    ),
)
QUERY = "decoder.tail.1.attention.query.kernel"
GATE = "model.layers.1.feed_forward.experts.2.gate_proj.weight"


def config():
    """Two periods of a dense layer and a mixture each: stacks of two."""
    whole = tiny.text_config(4)
    return dataclasses.replace(
        whole, text=dataclasses.replace(whole.text, moe=dataclasses.replace(whole.text.moe, step=2))
    )


def bits(model) -> dict:
    return {
        name: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for name, leaf in names.split(model)[1].items()
    }


def held(model) -> dict[str, low_bit.Held]:
    return leaves.ModelLeaves(model).held


def dequantised(model):
    few = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if few(leaf) else leaf, model, is_leaf=few)


@pytest.fixture(scope="module")
def plain():
    return tiny.model(config())


@pytest.fixture(scope="module")
def model(plain):
    return ptq.quantise(plain, RECIPE)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "model"
    native.save_native(model, folder)
    return folder


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    checkpoint.save_hf(model, folder, max_shard_bytes=40_000)
    return folder


# ---------------------------------------------------------------------------------------------- our own checkpoints


def test_our_own_checkpoint_gives_the_same_bits_back_without_being_told_how_it_is_quantised(model, folder):
    assert bits(native.load_native(folder)) == bits(model)
    alone = leaves.ModelLeaves(native.load_native(folder, scan=False))
    wanted = leaves.ModelLeaves(model)
    assert alone.held == wanted.held and alone.specs == wanted.specs
    for name, (shape, _) in wanted.specs.items():
        box = leaves.whole(shape)
        assert alone.window(name, box).tobytes() == wanted.window(name, box).tobytes(), name
    few = [dtype for _, dtype in wanted.specs.values() if dtype == "int4"]
    assert len(few) == 13  # 2 of each mixture, 2 of each attention, the head


def test_two_numbers_of_four_bits_are_one_byte_on_disk(model, folder):
    records = native.NativeLeaves(folder).records
    for name, record in records.items():
        stored = [path for path in (native.item(folder, name) / "array" / "c").rglob("*") if path.is_file()]
        rows, last = int(np.prod(record["shape"][:-1])), record["shape"][-1]
        width = {"int4": -(-last // 2), "int8": last, "float8_e4m3fn": last, "bfloat16": 2 * last}
        assert sum(path.stat().st_size for path in stored) == rows * width.get(record["dtype"], 4 * last), name
    on_disk = sum(path.stat().st_size for path in folder.rglob("c/**/*") if path.is_file())
    leaves_of = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    assert on_disk == sum(leaf.bits // 8 if isinstance(leaf, QuantizedArray) else leaf.nbytes for leaf in leaves_of)


def test_any_part_of_packed_numbers_is_read_alone(tmp_path):
    values = np.random.default_rng(0).integers(-8, 8, (3, 5, 7)).astype(np.int8).astype("int4")
    with items.Writer() as writer:
        for axis in range(3):
            record = writer.write(tmp_path / "item", (values.shape, values.dtype), axis, values.__getitem__)
            assert record == items.stored_record(tmp_path / "item") and record["shape"] == [3, 5, 7]
    for start in range(7):
        for stop in range(start + 1, 8):
            box = (slice(1, 3), slice(2, 5), slice(start, stop))
            np.testing.assert_array_equal(items.read(tmp_path / "item", box), values[box])


def test_what_is_loaded_in_another_dtype_stands_for_an_array_of_that(model, folder):
    loaded = native.load_native(folder, dtype="bfloat16", scan=False).decoder.tail[1].attention.query.kernel.get_value()
    wanted = model.decoder.period[1].attention.query.kernel.get_value()
    assert loaded.dtype == "bfloat16" and loaded.values.dtype == "int4" and loaded.activations == "int8"
    np.testing.assert_array_equal(loaded.dequantize(), wanted.dequantize()[0].astype("bfloat16"))


def test_one_changed_number_of_four_bits_is_found(model, tmp_path):
    native.save_native(model, tmp_path / "model")
    name = "decoder.tail.1.feed_forward.experts.down.values"
    (chunk,) = [p for p in (native.item(tmp_path / "model", name) / "array" / "c").rglob("*") if p.is_file()]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 0x10
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=f"the bits of .*{name}.* are not those that were saved"):
        native.load_native(tmp_path / "model")


def test_a_manifest_that_says_something_else_is_told_what_was_wanted_and_what_came(folder, tmp_path):
    def altered(name: str, **fields) -> pathlib.Path:
        document = json.loads((folder / native.MANIFEST).read_text())
        document["quantised"][QUERY] |= fields
        (tmp_path / name).mkdir()
        (tmp_path / name / native.PARAMETERS).symlink_to(folder / native.PARAMETERS)
        (tmp_path / name / native.MANIFEST).write_text(json.dumps(document))
        return tmp_path / name

    with pytest.raises(ValueError, match=rf"{QUERY}.scales: wanted \(4, 4, 8\), got \(8, 4, 8\)"):
        native.load_native(altered("group", group=8))
    with pytest.raises(ValueError, match=rf"{QUERY}.values: wanted int8, got int4"):
        native.load_native(altered("values", values="int8"))
    with pytest.raises(ValueError, match=rf"1 missing:\n  {QUERY}.offsets"):
        native.load_native(altered("offsets", symmetric=False))


def test_layers_that_are_held_in_different_ways_load_layer_by_layer(tmp_path):
    recipe = QuantRecipe(name="one layer", rules=(("tail.0.attention.query.kernel", INT8),))
    alone = ptq.quantise(tiny.model(tiny.text_config(4), scan=False), recipe)
    native.save_native(alone, tmp_path / "model")
    assert bits(native.load_native(tmp_path / "model", scan=False)) == bits(alone)
    with pytest.raises(ValueError, match=r"tail.0.attention.query.kernel is .*int8.*tail.2.* is not.*scan=False"):
        native.load_native(tmp_path / "model")


def test_numbers_that_are_still_being_trained_are_not_saved(plain, tmp_path):
    recipe = QuantRecipe(name="head", rules=(("head.kernel", INT8),))
    training = ptq.quantise(plain, recipe)
    array = training.head.kernel.get_value()
    training.head.kernel = training.head.kernel.replace(
        dataclasses.replace(array, values=array.values.astype("float32"))
    )
    with pytest.raises(ValueError, match="head.kernel: values are float32; wanted one of int4"):
        native.save_native(training, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- Hugging Face's layout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_comes_back_in_few_bits_or_as_the_floats_they_stand_for(dtype, model, tmp_path):
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), model, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    checkpoint.save_hf(cast, tmp_path / "model")
    floats = checkpoint.load_hf(tmp_path / "model", dtype=dtype)
    assert bits(floats) == bits(dequantised(cast))
    kept = checkpoint.load_hf(tmp_path / "model", dtype=dtype, keep_quantised=True)
    assert bits(dequantised(kept)) == bits(dequantised(cast))
    for path, how in held(kept).items():
        # Scales of another dtype than the weight stands for are stored in float32, with the same numbers.
        scales = dtype if held(cast)[path].spec.scales == dtype else "float32"
        assert how.spec == dataclasses.replace(held(cast)[path].spec, scales=scales), path
    numbers = [names.split(each)[1] for each in (kept, cast)]
    for name, leaf in numbers[1].items():
        np.testing.assert_array_equal(
            np.asarray(numbers[0][name], np.float32), np.asarray(leaf, np.float32), err_msg=name
        )


def test_config_json_says_which_weights_are_quantised_and_how(published):
    document = json.loads((published / "config.json").read_text())["quantization_config"]
    groups = list(document["config_groups"].values())
    assert document["quant_method"] == "compressed-tensors" and document["format"] == "mixed-precision"
    (experts,) = [group for group in groups if not group["weights"]["symmetric"]]
    assert experts["targets"] == [
        rf"re:model\.layers\.\d+\.feed_forward\.experts\.\d+\.{name}_proj$" for name in ("gate", "up", "down")
    ]
    assert experts["format"] == "pack-quantized" and experts["input_activations"] is None
    assert experts["weights"].items() >= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}.items()
    assert sum(bool(group["input_activations"]) for group in groups) == 2


def test_a_pattern_that_would_name_weights_that_stay_is_not_written(tmp_path):
    recipe = QuantRecipe(name="one layer", rules=(("tail.0.attention.query.kernel", INT8),))
    checkpoint.save_hf(ptq.quantise(tiny.model(tiny.text_config(4), scan=False), recipe), tmp_path / "model")
    document = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert document["config_groups"]["group_0"]["targets"] == ["model.layers.0.self_attn.q_proj"]
    kept = checkpoint.load_hf(tmp_path / "model", keep_quantised=True, scan=False)
    assert list(held(kept)) == ["decoder.tail.0.attention.query.kernel"]
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight is Quant.*layers.2.* is not quantised"):
        checkpoint.load_hf(tmp_path / "model", keep_quantised=True)


def test_all_that_does_not_fit_together_is_listed_at_once(plain, tmp_path):
    recipe = QuantRecipe(name="integers", rules=(("decoder.*.experts.*", INT4), ("head.kernel", INT8)))
    checkpoint.save_hf(ptq.quantise(plain, recipe), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    named = load_file(file)
    del named[GATE + "_zero_point"]
    named[GATE.replace("gate", "up") + "_scale"] = np.ones((24, 3), np.float32)
    named[GATE.replace("gate", "down") + "_packed"] = np.ones((32, 2), np.int32)
    del named["lm_head.weight_shape"]
    save_file(named, file)
    for keep in (True, False):
        with pytest.raises(ValueError) as error:
            checkpoint.load_hf(tmp_path / "model", keep_quantised=keep)
        for part in (
            f"{GATE}: int4 without {GATE}_zero_point",
            "up_proj.weight_scale: wanted (24, 4), got (24, 3)",
            "down_proj.weight_packed: wanted (32, 3), got (32, 2)",
            "lm_head.weight_shape: wanted the shape of the weight, 2 numbers, got None",
        ):
            assert part in str(error.value)


def test_layouts_that_have_no_few_bits_refuse_them(model, tmp_path):
    with pytest.raises(NotImplementedError, match="few bits in the layout 'Hugging Face, fused experts'; wanted"):
        checkpoint.save_hf(model, tmp_path / "fused", layout=checkpoint.HF_FUSED)
    with pytest.raises(NotImplementedError, match="is in few bits, which Meta's layouts are not"):
        checkpoint.save_meta(model, tmp_path / "meta")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- rounded on the way, piece by piece


def run(source, target, read: str, write: str, advance=lambda _: None, **options) -> convert.Summary:
    asked = convert.Conversion(source=source, target=target, read=read, write=write, max_shard_bytes=40_000, **options)
    return convert.convert(asked, advance)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("read", ["hf", "orbax"])
def test_a_checkpoint_rounded_in_small_pieces_is_the_one_that_the_whole_model_makes(
    read, plain, folder, published, tmp_path, monkeypatch
):
    (native.save_native if read == "orbax" else checkpoint.save_hf)(plain, tmp_path / read)
    monkeypatch.setattr(leaves, "PIECE_BYTES", 2000)
    largest, window = {}, leaves.FileLeaves.window

    def watched(self, path, box):
        part = window(self, path, box)
        largest[path] = max(part.nbytes, largest.get(path, 0))
        return part

    monkeypatch.setattr(leaves.FileLeaves, "window", watched)
    run(tmp_path / read, tmp_path / "rounded", read, "hf_unfused", recipe=RECIPE)
    assert files(tmp_path / "rounded") == files(published)
    if read == "hf":
        run(tmp_path / read, tmp_path / "own", read, "orbax", recipe=RECIPE)
        assert bits(native.load_native(tmp_path / "own")) == bits(native.load_native(folder))
        few = held(native.load_native(folder, scan=False))
        assert max(largest[path] for path in few) == 32 * 2 * 24 * 4  # one expert; all else in pieces


def test_what_was_interrupted_goes_on_and_nothing_half_written_is_at_the_target(plain, published, tmp_path):
    checkpoint.save_hf(plain, tmp_path / "hf")

    def stop(progress):
        if 4 * progress.done > progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "hf", tmp_path / "out", "hf", "hf_unfused", stop, recipe=RECIPE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished work of another kind:\n  recipe"):
        run(tmp_path / "hf", tmp_path / "out", "hf", "hf_unfused")
    summary = run(tmp_path / "hf", tmp_path / "out", "hf", "hf_unfused", recipe=RECIPE)
    assert 10 < summary.resumed < summary.tensors and files(tmp_path / "out") == files(published)


def test_few_bits_go_from_layout_to_layout_as_they_are(published, tmp_path):
    run(published, tmp_path / "own", "hf", "orbax", keep_quantised=True)
    run(tmp_path / "own", tmp_path / "back", "orbax", "hf_unfused")
    assert files(tmp_path / "back") == files(published)
    with convert.opened("hf", published) as floats:
        assert not floats.held
    with pytest.raises(ValueError, match="is in few bits already"):
        run(tmp_path / "own", tmp_path / "twice", "orbax", "hf_unfused", recipe=RECIPE)
    for write in ("hf", "meta"):
        with pytest.raises(NotImplementedError, match="few bits"):
            run(tmp_path / "own", tmp_path / "other", "orbax", write)
    assert not (tmp_path / "other").exists() and not (tmp_path / "twice").exists()
