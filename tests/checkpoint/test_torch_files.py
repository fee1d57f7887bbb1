"""Files of torch.save, read without torch, and without running what is in them.

`torch_saved.pth` was written by torch 2.13 with `python tests/checkpoint/write_torch_saved.py`.
"""

import io
import os
import pathlib
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.checkpoint import torch_files

SAVED = pathlib.Path(__file__).with_name("torch_saved.pth")
COUNT = np.arange(24, dtype=np.float32).reshape(4, 6)


def read_all(path: pathlib.Path) -> dict[str, np.ndarray]:
    with torch_files.open_file(path) as reader:
        return {key: reader.read(key) for key in reader.shapes if reader.dtypes[key].kind != "O"}


def rewrite(target: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    """A copy of the saved file in which some members are others."""
    with zipfile.ZipFile(SAVED) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, members.get(name.split("/", 1)[1], source.read(name)))
    return target


def test_tensors_of_every_kind_are_read():
    wanted = {
        "float": COUNT,
        "bfloat": COUNT.astype(jnp.bfloat16),
        "half": COUNT.astype(np.float16),
        "parameter": COUNT,
        "transposed": COUNT.T,
        "part": COUNT[1:3, 2:],
        "scalar": np.float32(7),
        "empty": np.zeros((0, 3), np.float32),
    }
    found = read_all(SAVED)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        np.testing.assert_array_equal(found[key], tensor)


def test_rows_are_those_of_the_whole_tensor_and_a_detour_is_reported(caplog):
    wanted = read_all(SAVED)
    with torch_files.open_file(SAVED) as reader:
        for key, tensor in wanted.items():
            for rows in (slice(0, 2), slice(1, 2), slice(2, 4)) if tensor.shape else ():
                np.testing.assert_array_equal(reader.read(key, rows), tensor[rows], err_msg=key)
        assert reader.read("scalar", slice(0, 1)) == 7
    assert sorted(message.split()[1] for message in caplog.messages) == ["part", "transposed"]


def test_damage_is_found_by_the_first_reading_of_rows(tmp_path):
    content = bytearray(SAVED.read_bytes())
    content[content.find(COUNT.tobytes()) + 60] ^= 1  # in the third row
    (tmp_path / "flipped.pth").write_bytes(content)
    with torch_files.open_file(tmp_path / "flipped.pth") as reader:
        with pytest.raises(ValueError, match="the file is damaged"):
            reader.read("float", slice(0, 1))


def test_what_is_no_float_tensor_is_there_but_cannot_be_read():
    with torch_files.open_file(SAVED) as reader:
        for key in ("layers.0._extra_state", "integers", "eight_bits"):
            assert reader.shapes[key] == () and reader.dtypes[key].kind == "O"
            with pytest.raises(ValueError, match=f"{key} is no tensor of FloatStorage"):
                reader.read(key)


class Malicious:
    """Unpickling this runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_run(tmp_path):
    trace = tmp_path / "trace"
    evil = pickle.dumps({"weight": Malicious(f"touch {trace}")}, protocol=2)
    pickle.loads(evil)
    assert trace.exists(), "the test's own attack must work"
    trace.unlink()
    with torch_files.open_file(rewrite(tmp_path / "evil.pth", {"data.pkl": evil})) as reader:
        assert reader.shapes == {"weight": ()}
    assert not trace.exists()


def test_damage_is_found(tmp_path):
    content = bytearray(SAVED.read_bytes())
    place = content.find(COUNT.tobytes())
    content[place + 5] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(ValueError, match="the file is damaged"):
        read_all(tmp_path / "flipped.pth")
    with pytest.raises(ValueError, match="data.pkl.*the file is damaged"):
        read_all(rewrite(tmp_path / "pickle.pth", {"data.pkl": b"nonsense"}))
    short = {f"data/{i}": b"12345678" for i in range(10)}
    with pytest.raises(ValueError, match="reaches beyond its storage"):
        read_all(rewrite(tmp_path / "short.pth", short))


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="no file of torch.save .*save its tensors as old.safetensors"):
        read_all(tmp_path / "old.pth")
    with pytest.raises(ValueError, match="holds a list; wanted a dict"):
        read_all(rewrite(tmp_path / "list.pth", {"data.pkl": pickle.dumps([1])}))
    with pytest.raises(ValueError, match="big-endian"):
        read_all(rewrite(tmp_path / "big.pth", {"byteorder": b"big"}))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("a/data.txt", "")
    (tmp_path / "zip.pth").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="a/data.pkl"):
        read_all(tmp_path / "zip.pth")
