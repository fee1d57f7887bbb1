"""Hugging Face checkpoints of Llama 4 to our model and back, bit for bit.

A folder holds config.json, generation_config.json and safetensors weights in the fused-experts layout, text only
(`Llama4ForCausalLM`) or multimodal (`Llama4ForConditionalGeneration`). `mapping.HF_FUSED` says what goes where.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.checkpoint import hf_config, mapping, tensors
from llama4_jax.config import Llama4Config
from llama4_jax.model import Llama4

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5_000_000_000


def load_hf(folder, dtype: str | None = "float32", mesh=None, *, scan: bool = True) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    Weights are read one parameter at a time: the peak is the model plus its largest parameter. `scan` as in `Llama4`.
    Raises FileNotFoundError for missing files, ValueError for a configuration or weights that lack, exceed or misshape
    anything (all of it in one message), NotImplementedError for what the model cannot express.
    """
    if mesh is not None:
        raise NotImplementedError(f"load_hf(mesh={mesh!r}): loading onto a mesh is not supported; pass None")
    folder = pathlib.Path(folder)
    config = read_config(folder)
    with tensors.open_folder(folder) as reader:
        return _assemble(config, reader, dtype, scan, f"checkpoint {folder}")


def save_hf(model: Llama4, folder, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model` to `folder` as Hugging Face transformers loads it, in the dtype of its weights.

    All or nothing: files are written beside `folder` and renamed into place when complete. A checkpoint already there
    is replaced, other files in the folder (a tokenizer) are kept. Above `max_shard_bytes` weights are sharded.
    Raises NotImplementedError for a model that the format cannot express, before anything is written.
    """
    folder = pathlib.Path(folder).absolute()
    leaves = _leaves(model)
    documents = {
        "config.json": hf_config.to_hf(model.config, _main_dtype(leaves)),
        "generation_config.json": hf_config.generation_to_hf(model.config),
    }
    entries = {entry.key: entry for entry in _table(model)}
    sizes = {
        key: math.prod(entry.file_shape(leaves[entry.path].shape)) * leaves[entry.path].dtype.itemsize
        for key, entry in entries.items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        staged = pathlib.Path(scratch) / "new"
        staged.mkdir()
        for name, document in documents.items():
            (staged / name).write_text(json.dumps(document, indent=2) + "\n")
        tensors.write_folder(
            staged, sizes, lambda key: entries[key].to_file(np.asarray(leaves[entries[key].path])), max_shard_bytes
        )
        _publish(staged, folder, pathlib.Path(scratch) / "old")


def read_config(folder) -> Llama4Config:
    """The configuration of the checkpoint in `folder`, without its weights."""
    folder = pathlib.Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing; a Hugging Face checkpoint folder has one")
    generation = folder / "generation_config.json"
    return hf_config.from_hf(
        json.loads((folder / "config.json").read_text()),
        json.loads(generation.read_text()) if generation.is_file() else None,
    )


def from_tensors(
    config: Llama4Config, named: Mapping[str, np.ndarray], dtype: str | None = None, *, scan: bool = True
) -> Llama4:
    """A model of `config` from tensors in memory, under Hugging Face's names; as strict as `load_hf`."""
    return _assemble(config, _InMemory(named), dtype, scan, "the given tensors")


def to_tensors(model: Llama4) -> dict[str, np.ndarray]:
    """The model's weights under Hugging Face's names and in its layout."""
    leaves = _leaves(model)
    return {entry.key: entry.to_file(np.asarray(leaves[entry.path])) for entry in _table(model)}


def tensor_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of `config`; nothing is allocated."""
    abstract = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0)))
    leaves = _leaves(abstract)
    return {entry.key: entry.file_shape(leaves[entry.path].shape) for entry in _table(abstract)}


class _InMemory:
    """Tensors of a dict, with the interface of `tensors.Reader`."""

    def __init__(self, named: Mapping[str, np.ndarray]):
        self.shapes = {key: tensor.shape for key, tensor in named.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in named.items()}
        self.read: Callable[[str], np.ndarray] = named.__getitem__


def _assemble(config: Llama4Config, reader, dtype: str | None, scan: bool, source: str) -> Llama4:
    if dtype is not None and str(dtype) not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; wanted one of {', '.join(DTYPES)}, or None to keep what is stored")
    abstract = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan=scan))
    graph, state = nnx.split(abstract)
    parameters = {_dotted(path): parameter for path, parameter in nnx.to_flat_state(state)}
    table = mapping.entries(config, stacked=scan, text_prefix=_text_prefix(config, reader.shapes))
    mapping.account(table, reader.shapes, {path: p.shape for path, p in parameters.items()}, source)
    sources: dict[str, list[mapping.Entry]] = {path: [] for path in parameters}
    for entry in table:
        sources[entry.path].append(entry)
    filled = [
        (path, parameter.replace(_fill(sources[_dotted(path)], parameter.shape, reader, dtype)))
        for path, parameter in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _fill(sources: list[mapping.Entry], shape: tuple[int, ...], reader, dtype: str | None) -> jax.Array:
    """One parameter, from the tensors that make it up."""
    stored = {reader.dtypes[entry.key] for entry in sources}
    if dtype is None and len(stored) > 1:
        names = [f"{entry.key}: {reader.dtypes[entry.key]}" for entry in sources]
        raise ValueError(f"dtype=None, but one parameter is stored in several dtypes ({names}); name a dtype")
    leaf = np.empty(shape, jnp.dtype(dtype) if dtype else stored.pop())
    for entry in sources:
        leaf[entry.index] = entry.to_leaf(reader.read(entry.key), shape)
    return jnp.asarray(leaf)


def _text_prefix(config: Llama4Config, names) -> str | None:
    """Text-only weights are also found under the multimodal prefix, when they were cut out of a multimodal file."""
    prefix = mapping.HF_FUSED.text_prefix
    return prefix if config.vision is None and names and all(name.startswith(prefix) for name in names) else None


def _leaves(model: Llama4) -> dict[str, nnx.Param]:
    return {_dotted(path): parameter for path, parameter in nnx.to_flat_state(nnx.state(model))}


def _table(model: Llama4) -> list[mapping.Entry]:
    """The entries of `model`, checked to cover it exactly."""
    leaves = {path: leaf.shape for path, leaf in _leaves(model).items()}
    table = mapping.entries(model.config, stacked=any(path.startswith("decoder.period.") for path in leaves))
    promised = {entry.key: entry.file_shape(leaves[entry.path]) for entry in table if entry.path in leaves}
    mapping.account(table, promised, leaves, "the model's mapping")
    return table


def _main_dtype(leaves: Mapping[str, nnx.Param]) -> str:
    """What config.json names: the dtype of most weights. Others (an fp32 router) are stored as they are all the same."""
    sizes = Counter()
    for leaf in leaves.values():
        sizes[str(leaf.dtype)] += leaf.size
    return sizes.most_common(1)[0][0]


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _publish(staged: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
    """Puts `staged` in the place of `folder`, keeping the files in it that belong to no checkpoint."""
    for path in _foreign(folder):
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, staged / path.name)
    if folder.exists():
        os.rename(folder, old)
    os.rename(staged, folder)


def _foreign(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    ours = ("config.json", "generation_config.json", tensors.INDEX)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in ours and path.suffix != ".safetensors":
            yield path
