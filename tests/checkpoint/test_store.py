"""The store: what goes in comes out, damage is found, and nothing is half-written."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama4_jax.checkpoint.store import CheckpointError, MismatchError, Store, load_params


def _arrays(value: float) -> dict:
    params = {"a.kernel": jnp.full((64, 48), value), "b.scale": jnp.full((5,), value, jnp.bfloat16)}
    return {"params": params, "optimizer": optax.adam(1e-3).init(params)}


def _save(store: Store, *steps: int) -> None:
    for step in steps:
        store.save(step, _arrays(float(step)), {"data": {"position": step, "nested": [1, {"x": None}]}})
    store.wait()


def _data_files(folder: pathlib.Path, step: int, item: str = "params") -> list[pathlib.Path]:
    return [path for path in (folder / str(step) / item).rglob("*") if path.is_file() and path.parent.name == "d"]


def test_arrays_and_records_come_back_as_saved(tmp_path):
    with Store(tmp_path) as store:
        _save(store, 7)
        restored = store.restore(_arrays(0.0))
    assert restored.step == 7
    assert restored.records == {"data": {"position": 7, "nested": [1, {"x": None}]}}
    saved = _arrays(7.0)
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(saved)
    for got, wanted in zip(jax.tree.leaves(restored.arrays), jax.tree.leaves(saved)):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_an_empty_folder_restores_nothing(tmp_path):
    with Store(tmp_path) as store:
        assert store.restore(_arrays(0.0)) is None


def test_only_the_newest_are_kept(tmp_path):
    with Store(tmp_path, keep=2) as store:
        _save(store, 1, 2, 3, 4)
        assert store.steps() == [3, 4]


def test_arrays_may_be_donated_while_they_are_being_written(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Store(tmp_path) as store:
        params = {"w": jnp.full((512, 512), 3.0)}
        store.save(1, {"params": params}, {})
        for _ in range(5):
            params = overwrite(params)
        jax.block_until_ready(params)
        restored = store.restore({"params": params})
    np.testing.assert_array_equal(restored.arrays["params"]["w"], 3.0)


@pytest.mark.parametrize("damage", ["truncate", "flip one bit", "remove"])
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path, caplog, damage):
    with Store(tmp_path) as store:
        _save(store, 1, 2)
    for path in _data_files(tmp_path, 2):
        content = bytearray(path.read_bytes())
        if damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flip one bit":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        else:
            path.unlink()
    with Store(tmp_path) as store:
        restored = store.restore(_arrays(0.0))
        assert restored.step == 1
        np.testing.assert_array_equal(restored.arrays["params"]["a.kernel"], 1.0)
        assert "2 cannot be read" in caplog.text and "moved to" in caplog.text
        assert (tmp_path / "2.damaged").is_dir()
        _save(store, 2)
        assert store.restore(_arrays(0.0)).step == 2


def test_a_wrong_value_that_the_storage_cannot_notice_is_found(tmp_path, caplog):
    with Store(tmp_path) as store:
        _save(store, 1, 2)
    fingerprints = tmp_path / "2" / "fingerprints" / "metadata"
    prints = json.loads(fingerprints.read_text())
    prints["params"]["['a.kernel']"][2] += 1  # as if the array had been read back with a changed bit
    fingerprints.write_text(json.dumps(prints))
    with Store(tmp_path) as store:
        assert store.restore(_arrays(0.0)).step == 1
    assert "the bits of ['a.kernel'] are not those that were saved" in caplog.text


def test_when_all_are_damaged_nothing_starts_over_silently(tmp_path):
    with Store(tmp_path) as store:
        _save(store, 1, 2)
    for step in (1, 2):
        for path in _data_files(tmp_path, step):
            path.write_bytes(b"")
    with Store(tmp_path) as store, pytest.raises(CheckpointError, match="no checkpoint .* can be read"):
        store.restore(_arrays(0.0))
    assert (tmp_path / "1").is_dir() and (tmp_path / "2").is_dir()


def test_another_model_is_a_mismatch_and_not_damage(tmp_path):
    with Store(tmp_path) as store:
        _save(store, 1)
        other = {"params": {"a.kernel": jnp.zeros((64, 47)), "b.scale": jnp.zeros((5,), jnp.bfloat16)}}
        with pytest.raises(MismatchError, match=r"a.kernel.*saved \[\[64, 48\].*wanted \[\[64, 47\]"):
            store.restore(other)
        assert store.steps() == [1]


def test_an_unfinished_save_is_not_a_checkpoint_and_is_cleaned_up(tmp_path):
    with Store(tmp_path) as store:
        _save(store, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    (tmp_path / "1").rename(unfinished)
    with Store(tmp_path, read_only=True) as looker:
        assert looker.steps() == []
    assert unfinished.exists()
    with Store(tmp_path) as store:
        assert store.steps() == []
        _save(store, 2)
        assert store.steps() == [2]
    assert not unfinished.exists()


def test_params_load_without_a_template(tmp_path):
    with Store(tmp_path) as store:
        _save(store, 3)
    params, records = load_params(tmp_path)
    assert records["data"]["position"] == 3
    np.testing.assert_array_equal(params["a.kernel"], np.full((64, 48), 3.0, np.float32))
    assert params["b.scale"].dtype == jnp.bfloat16
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_params(tmp_path / "nowhere")


def test_records_are_those_of_the_moment_of_saving(tmp_path):
    with Store(tmp_path) as store:
        position = {"index": 1}
        store.save(1, _arrays(1.0), {"data": position})
        position["index"] = 2
        assert store.restore(_arrays(0.0)).records["data"] == {"index": 1}
        with pytest.raises(TypeError, match="not JSON serializable"):
            store.save(2, _arrays(2.0), {"data": np.int64(3)})


def test_item_names_must_be_distinct(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ValueError, match="used twice or reserved"):
        store.save(1, {"params": {"w": jnp.zeros(2)}}, {"params": 1})
