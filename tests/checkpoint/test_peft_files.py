"""Adapters in PEFT's files: names, layouts, every tensor once, all problems at once, all or nothing on disk."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax import checkpoint
from llama4_jax.checkpoint.tensors import write_file
from llama4_jax.config.lora import ATTENTION, ROUTED_EXPERTS, LoraConfig
from llama4_jax.core import names
from llama4_jax.model import lora
from llama4_jax.testing import adapters, tiny

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("*",))
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def mixed_config(vision: bool = False):
    """Dense layers and mixtures by turns; two periods of two layers and one left over."""
    config = tiny.vision_config(5) if vision else tiny.text_config(5)
    moe = dataclasses.replace(config.text.moe, step=2)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, moe=moe))


@pytest.fixture(scope="module")
def plain():
    return tiny.model(mixed_config())


@pytest.fixture(scope="module")
def adapted(plain):
    return adapters.trained(plain, CONFIG)


@pytest.fixture
def folder(adapted, tmp_path) -> pathlib.Path:
    checkpoint.save_peft(adapted, tmp_path / "adapter", base_model="a/base")
    return tmp_path / "adapter"


def factors(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in lora.split(model)[1].items()}


def assert_same(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def rewrite(folder: pathlib.Path, change=lambda named: None, **fields) -> None:
    """Passes the tensors through `change` and sets fields of the configuration."""
    named = load_file(folder / WEIGHTS_FILE)
    change(named)
    save_file(named, folder / WEIGHTS_FILE)
    document = json.loads((folder / CONFIG_FILE).read_text()) | fields
    (folder / CONFIG_FILE).write_text(json.dumps(document))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LoraConfig(rank=2, alpha=5.0, targets=ATTENTION, rank_stabilised=True),
        LoraConfig(rank=2, alpha=5.0, targets=ROUTED_EXPERTS),
        LoraConfig(rank=2, alpha=5.0, targets=("experts.gate_up",)),
        LoraConfig(rank=2, alpha=5.0, targets=("experts.down", "shared.down.kernel")),
    ],
    ids=["all", "attention", "experts", "gate_up", "down"],
)
@pytest.mark.parametrize("vision", [False, True], ids=["text", "vision"])
def test_what_was_saved_loads_again_bit_for_bit(config, vision, tmp_path):
    plain = tiny.model(mixed_config(vision))
    model = adapters.trained(plain, config)
    checkpoint.save_peft(model, tmp_path / "adapter")
    loaded = checkpoint.load_peft(plain, tmp_path / "adapter")
    assert_same(factors(loaded), factors(model))
    assert {delta.config.scale for delta in lora.deltas(loaded).values()} == {config.scale}
    assert names.split(loaded)[1]["embed.table"] is names.split(plain)[1]["embed.table"]
    keys = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert all(key.startswith("base_model.model.language_model.model.") == vision for key in keys)


def test_files_are_the_same_from_stacked_and_from_single_layers(folder, adapted, tmp_path):
    single = checkpoint.load_peft(tiny.model(mixed_config(), scan=False), folder)
    assert len(factors(single)) > len(factors(adapted))
    checkpoint.save_peft(single, tmp_path / "single", base_model="a/base")
    assert_same(load_file(tmp_path / "single" / WEIGHTS_FILE), load_file(folder / WEIGHTS_FILE))
    assert (tmp_path / "single" / CONFIG_FILE).read_text() == (folder / CONFIG_FILE).read_text()


def test_names_and_shapes_are_those_that_peft_writes(folder):
    """As printed from what peft 0.21.2 saved for the same layers: embed 32, 4 heads of 8, 4 experts of 24, rank 3."""
    shapes = {key: tensor.shape for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    layer = "base_model.model.model.layers.1."
    found = {key.removeprefix(layer): shape for key, shape in shapes.items() if key.startswith(layer)}
    assert found == {
        "self_attn.q_proj.lora_A.weight": (3, 32),
        "self_attn.q_proj.lora_B.weight": (32, 3),
        "self_attn.k_proj.lora_A.weight": (3, 32),
        "self_attn.k_proj.lora_B.weight": (16, 3),
        "self_attn.v_proj.lora_A.weight": (3, 32),
        "self_attn.v_proj.lora_B.weight": (16, 3),
        "self_attn.o_proj.lora_A.weight": (3, 32),
        "self_attn.o_proj.lora_B.weight": (32, 3),
        "feed_forward.shared_expert.gate_proj.lora_A.weight": (3, 32),
        "feed_forward.shared_expert.gate_proj.lora_B.weight": (24, 3),
        "feed_forward.shared_expert.up_proj.lora_A.weight": (3, 32),
        "feed_forward.shared_expert.up_proj.lora_B.weight": (24, 3),
        "feed_forward.shared_expert.down_proj.lora_A.weight": (3, 24),
        "feed_forward.shared_expert.down_proj.lora_B.weight": (32, 3),
        "feed_forward.experts.base_layer.lora_A.weight": (12, 48),
        "feed_forward.experts.base_layer.lora_B.weight": (32, 12),
        "feed_forward.experts.lora_A.weight": (12, 32),
        "feed_forward.experts.lora_B.weight": (24, 12),
    }
    dense = {key for key in shapes if key.startswith("base_model.model.model.layers.0.feed_forward.")}
    assert len(dense) == 6 and len(shapes) == 3 * 14 + 2 * 18


def test_the_configuration_names_each_adapted_weight_in_full(folder):
    document = json.loads((folder / CONFIG_FILE).read_text())
    assert document["r"] == 3 and not document["use_rslora"]
    assert document["lora_alpha"] == 6 and type(document["lora_alpha"]) is int
    assert document["base_model_name_or_path"] == "a/base" and document["peft_type"] == "LORA"
    assert document["target_parameters"] == [
        f"model.layers.{layer}.feed_forward.experts.{name}"
        for layer in (1, 3)
        for name in ("down_proj", "gate_up_proj")
    ]
    assert len(document["target_modules"]) == 5 * 7
    assert "model.layers.4.self_attn.q_proj" in document["target_modules"]


def test_pefts_formulas_give_our_change_of_the_weights(folder, adapted):
    """`LoraLayer.get_delta_weight` and `ParamWrapper.get_delta_weight`, in numpy, on the files."""
    named = load_file(folder / WEIGHTS_FILE)
    matrices = {name: np.asarray(delta.matrix()) for name, delta in lora.deltas(adapted).items()}

    def linear(module):
        return 2.0 * named[f"{module}.lora_B.weight"] @ named[f"{module}.lora_A.weight"]  # [out in]

    def experts(module):
        a, b = named[f"{module}.lora_A.weight"], named[f"{module}.lora_B.weight"]
        return 2.0 * np.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, 4), a.reshape(4, -1, a.shape[1]))

    layer = "base_model.model.model.layers.3."  # the second of the stack
    period, close = "decoder.period.1.", {"rtol": 1e-5, "atol": 1e-6}
    query = matrices[period + "attention.query.kernel"][1]  # [d n h]
    np.testing.assert_allclose(linear(layer + "self_attn.q_proj").T, query.reshape(32, 32), **close)
    output = matrices[period + "attention.output.kernel"][1]  # [n h d]
    np.testing.assert_allclose(linear(layer + "self_attn.o_proj").T, output.reshape(32, 32), **close)
    shared = matrices[period + "feed_forward.shared.gate_up.kernel"][1]  # [d 2 f]
    for half, name in enumerate(("gate_proj", "up_proj")):
        np.testing.assert_allclose(linear(f"{layer}feed_forward.shared_expert.{name}").T, shared[:, half], **close)
    gate_up = matrices[period + "feed_forward.experts.gate_up"][1]  # [e d 2 f]
    np.testing.assert_allclose(experts(layer + "feed_forward.experts.base_layer"), gate_up.reshape(4, 32, 48), **close)
    down = matrices[period + "feed_forward.experts.down"][1]
    np.testing.assert_allclose(experts(layer + "feed_forward.experts"), down, **close)


def test_factors_in_bfloat16_are_widened(folder, plain, adapted):
    named = {key: tensor.astype(jnp.bfloat16) for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(named, folder / WEIGHTS_FILE)
    loaded = factors(checkpoint.load_peft(plain, folder))
    wanted = {name: leaf.astype(jnp.bfloat16).astype(np.float32) for name, leaf in factors(adapted).items()}
    assert_same(loaded, wanted)


def test_all_missing_unexpected_and_misshapen_tensors_are_listed_at_once(folder, plain):
    layer = "base_model.model.model.layers.2."

    def spoil(named):
        del named[layer + "self_attn.q_proj.lora_A.weight"], named[layer + "self_attn.q_proj.lora_B.weight"]
        del named[layer + "feed_forward.down_proj.lora_B.weight"]
        named["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 32), np.float32)
        named[layer + "self_attn.v_proj.lora_B.weight"] = np.ones((16, 4), np.float32)

    rewrite(folder, spoil)
    with pytest.raises(ValueError) as error:
        checkpoint.load_peft(plain, folder)
    for part in (
        f"3 missing:\n  {layer}feed_forward.down_proj.lora_B.weight\n  {layer}self_attn.q_proj.lora_A.weight",
        "1 unexpected:\n  base_model.model.lm_head.lora_A.weight",
        f"1 misshapen:\n  {layer}self_attn.v_proj.lora_B.weight: wanted (16, 3), got (16, 4)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": None},
        {"target_modules": r".*\.q_proj", "target_parameters": None},
    ],
    ids=["parameters", "list", "regular_expression"],
)
def test_what_the_targets_name_must_be_there(targets, folder, plain):
    rewrite(folder, lambda named: [named.pop(key) for key in list(named) if "k_proj" not in key], **targets)
    with pytest.raises(ValueError, match=r"missing:\n  .*(q_proj|experts).lora_A"):
        checkpoint.load_peft(plain, folder)


def test_adapters_on_some_layers_only_need_layers_that_stand_alone(folder, plain):
    def keep_one(named):
        for key in [key for key in named if not ("layers.3." in key and "self_attn" in key)]:
            del named[key]

    fields = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": None}
    rewrite(folder, keep_one, **fields, layers_to_transform=[3])
    single = checkpoint.load_peft(tiny.model(mixed_config(), scan=False), folder)
    assert {name.removesuffix(".kernel").rpartition(".")[0] for name in lora.deltas(single)} == {
        "decoder.tail.3.attention"
    }
    with pytest.raises(ValueError, match=r"missing:\n  .*layers.1.self_attn"):
        checkpoint.load_peft(plain, folder)


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"a_field_of_tomorrow": {"on": True}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"peft_version": "0.19.1"},
        {"peft_version": None},
    ],
    ids=lambda field: next(iter(field)),
)
def test_more_than_plain_adapters_is_refused_by_name(field, folder, plain):
    rewrite(folder, **field)
    shown = "target_parameters" if "peft_version" in field else next(iter(field))
    with pytest.raises(NotImplementedError, match=shown):
        checkpoint.load_peft(plain, folder)


def test_fields_that_are_off_or_of_training_are_no_obstacle(folder, plain, adapted):
    rewrite(folder, lora_dropout=0.1, use_dora=False, rank_pattern={}, revision="main", init_lora_weights="gaussian")
    assert_same(factors(checkpoint.load_peft(plain, folder)), factors(adapted))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name, folder, plain):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        checkpoint.load_peft(plain, folder)


def test_a_configuration_of_something_else_is_refused(folder, plain):
    (folder / CONFIG_FILE).write_text('{"model_type": "llama4"}')
    with pytest.raises(ValueError, match="lacks peft_type, r, lora_alpha"):
        checkpoint.load_peft(plain, folder)


def test_a_model_without_adapters_has_none_to_save(plain, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        checkpoint.save_peft(plain, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_adapters_and_other_files(folder, plain, adapted, monkeypatch):
    (folder / "README.md").write_text("kept")

    def fill_the_disk(path, specs, produce):
        write_file(path, specs, produce)
        raise OSError("No space left on device")

    other = adapters.trained(plain, CONFIG, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("llama4_jax.checkpoint.tensors.write_file", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_peft(other, folder)
    assert_same(factors(checkpoint.load_peft(plain, folder)), factors(adapted))
    checkpoint.save_peft(other, folder)
    assert_same(factors(checkpoint.load_peft(plain, folder)), factors(other))
    assert (folder / "README.md").read_text() == "kept"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_merged_checkpoint_and_its_adapters_give_the_base_back(plain, adapted, folder, tmp_path):
    checkpoint.save_hf(lora.merge(adapted), tmp_path / "merged")
    merged = checkpoint.load_hf(tmp_path / "merged")
    restored = lora.detach(lora.subtract(checkpoint.load_peft(merged, folder)))
    for (path, got), wanted in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(plain), strict=True):
        # Two roundings of float32, see `subtract`; the weights and their sums are below 4.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * 2**-22, err_msg=jax.tree_util.keystr(path))
