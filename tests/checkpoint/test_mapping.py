"""The table of names itself: what it says for a small model, and that it notices when it is wrong."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from llama4_jax.checkpoint import layouts, mapping
from llama4_jax.config import presets
from llama4_jax.model import Llama4

TINY = presets.tiny()  # 9 layers, period 4, mixtures on odd layers


def leaves(config, scan=True) -> dict:
    state = nnx.state(jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=scan)))
    return {".".join(map(str, path)): parameter.shape for path, parameter in nnx.to_flat_state(state)}


def where(key: str, stacked: bool = True) -> tuple[str, tuple]:
    (entry,) = [entry for entry in mapping.entries(TINY, layouts.HF_FUSED, stacked=stacked) if entry.key == key]
    return entry.path, entry.index


def test_layers_land_in_their_period_their_repetition_or_the_tail():
    prefix = "language_model.model.layers."
    assert where(prefix + "0.input_layernorm.weight") == ("decoder.period.0.attention_norm.scale", (0,))
    assert where(prefix + "7.input_layernorm.weight") == ("decoder.period.3.attention_norm.scale", (1,))
    assert where(prefix + "8.input_layernorm.weight") == ("decoder.tail.0.attention_norm.scale", ())
    assert where(prefix + "7.input_layernorm.weight", stacked=False) == ("decoder.tail.7.attention_norm.scale", ())
    gate = prefix + "4.feed_forward.up_proj.weight"
    assert where(gate) == ("decoder.period.0.feed_forward.gate_up.kernel", (1, mapping.ALL, 1))


@pytest.mark.parametrize("scan", [True, False])
def test_the_table_covers_a_model_of_every_kind_of_layer(scan):
    table, shapes = mapping.entries(TINY, layouts.HF_FUSED, stacked=scan), leaves(TINY, scan)
    files = {entry.key: entry.file_shape(shapes[entry.path]) for entry in table}
    assert files["language_model.model.layers.0.self_attn.q_proj.weight"] == (32, 32)
    assert files["language_model.model.layers.1.feed_forward.experts.gate_up_proj"] == (4, 32, 48)
    mapping.account(table, {"": files}, shapes, "here")


def test_file_and_parameter_layouts_are_inverse():
    entry = mapping.Entry("key", "path", (1,), "e d (two f) -> e d two f")
    tensor = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    leaf = np.zeros((5, 2, 3, 2, 4), int)
    entry.fill(leaf, tensor)
    np.testing.assert_array_equal(leaf[1, :, :, 1], tensor[:, :, 4:])
    np.testing.assert_array_equal(entry.to_file(leaf), tensor)
    assert entry.file_shape(leaf.shape) == tensor.shape


def test_a_wrong_table_is_noticed():
    table, shapes = mapping.entries(TINY, layouts.HF_FUSED, stacked=True), leaves(TINY)
    files = {entry.key: entry.file_shape(shapes[entry.path]) for entry in table}
    gate, up = (next(e for e in table if e.key.endswith(name)) for name in ("gate_proj.weight", "up_proj.weight"))
    up_again = [dataclasses.replace(e, index=gate.index) if e is up else e for e in table]
    with pytest.raises(ValueError, match=f"1 filled twice in the model:\n  {gate.path}"):
        mapping.account(up_again, {"": files}, shapes, "here")
    with pytest.raises(ValueError, match="1 not filled in the model:\n  new.kernel"):
        mapping.account(table, {"": files}, {**shapes, "new.kernel": (3,)}, "here")
    with pytest.raises(ValueError, match="1 not in the model:\n  gone.scale"):
        extra = mapping.Entry("gone", "gone.scale", (), "d -> d")
        mapping.account([*table, extra], {"": {**files, "gone": (3,)}}, shapes, "here")


def test_shards_fill_their_part_of_a_parameter_and_parts_follow_each_other_in_a_tensor():
    query = mapping.Entry("qkv", "query", (0,), "(n h) d -> d n h", "n")
    value = mapping.Entry("qkv", "value", (0,), "(k h) d -> d k h", "k")
    shapes = {"query": (1, 3, 4, 2), "value": (1, 3, 2, 2)}
    query_rows, value_rows = np.arange(24).reshape(8, 3), np.arange(100, 112).reshape(4, 3)
    leaves = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    for shard in (0, 1):
        tensor = np.concatenate([query_rows[4 * shard :][:4], value_rows[2 * shard :][:2]])
        assert mapping.stored_shape([query, value], shapes, 2) == tensor.shape
        for part in (query, value):
            part.fill(leaves[part.path], tensor[mapping.rows([query, value], part, shapes, 2)], shard, 2)
    np.testing.assert_array_equal(query.to_file(leaves["query"]), query_rows)
    np.testing.assert_array_equal(value.to_file(leaves["value"]), value_rows)


@pytest.mark.parametrize("layout", [layouts.HF_UNFUSED, layouts.META_MODULES, layouts.META_FILES], ids=lambda x: x.name)
def test_every_layout_covers_a_model_of_every_kind_of_layer(layout):
    table, shapes = mapping.entries(TINY, layout, stacked=True), leaves(TINY)
    files = {key: mapping.stored_shape(parts, shapes) for key, parts in mapping.by_key(table).items()}
    mapping.account(table, {"": files}, shapes, "here")
