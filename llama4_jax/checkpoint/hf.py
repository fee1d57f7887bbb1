"""Hugging Face checkpoints of Llama 4 to our model and back, bit for bit.

A folder holds config.json, generation_config.json and safetensors weights, text only (`Llama4ForCausalLM`) or
multimodal (`Llama4ForConditionalGeneration`), with the experts of a layer in one tensor or one linear layer an expert,
which may be in few bits with scales, as compressed-tensors stores them (`quantised`). `layouts` says what goes where.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama4_jax.checkpoint import assembly, compressed, hf_config, layouts, leaves, mapping, quantised, tensors
from llama4_jax.config import Llama4Config
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.model import Llama4

SHARD_BYTES = 5_000_000_000


def load_hf(
    folder,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    *,
    placement: Placement = partitioning.TRAIN,
    scan: bool = True,
    keep_quantised: bool = False,
) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    Whether experts are fused is seen from the names of the tensors. Quantised weights are multiplied by their scales; None
    then means the scales' dtype. With `keep_quantised` they stay in few bits, as `core.quantized.QuantizedArray`s that stand
    for arrays of `dtype`, with inputs rounded as config.json says. Weights are read one parameter at a time: the peak is the
    model plus its largest parameter. With a `mesh` each goes straight into the shards that `placement` gives it, and this
    process holds one parameter whole at a time. `scan` as in `Llama4`.
    Raises FileNotFoundError for missing files, ValueError for a configuration or weights that lack, exceed or misshape
    anything (all of it in one message), NotImplementedError for what the model cannot express.
    """
    with opened(folder, keep_quantised=keep_quantised) as (config, layout, readers):
        return assembly.assemble(
            config,
            layout,
            readers,
            dtype=dtype,
            scan=scan,
            source=f"checkpoint {folder}",
            mesh=mesh,
            placement=placement,
            quantised=quantised.specs(readers),
        )


@contextlib.contextmanager
def opened(
    folder, *, keep_quantised: bool = False
) -> Iterator[tuple[Llama4Config, mapping.Layout, dict[str, leaves.Reader]]]:
    """The configuration of the checkpoint in `folder`, the layout seen from its names, and its tensors."""
    folder = pathlib.Path(folder)
    config = read_config(folder)
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    with tensors.open_folder(folder) as stored:
        reader = (quantised.Kept if keep_quantised else quantised.Dequantised)(stored, quantization)
        yield config, layouts.hf_layout(reader.shapes), {folder.name: reader}


def save_hf(model: Llama4, folder, *, layout: mapping.Layout | None = None, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model` to `folder`, in the dtype of its weights, as Hugging Face transformers loads it.

    `layout=layouts.HF_UNFUSED` writes one linear layer an expert instead of `HF_FUSED`: what quantisers start from and
    `load_hf` reads, but transformers itself does not. A model with weights in few bits is written so, and packed as
    compressed-tensors does it: with that library, transformers loads it too.
    All or nothing: files are written beside `folder` and renamed into place when complete. A checkpoint already there
    is replaced, other files in the folder (a tokenizer) are kept. Above `max_shard_bytes` weights are sharded.
    Raises NotImplementedError for a model that the format cannot express, before anything is written.
    """
    source = leaves.ModelLeaves(model)
    contents = documents(source)
    named = named_tensors(source, layout)
    with tensors.replaced_folder(folder, is_ours) as staged:
        for name, document in contents.items():
            (staged / name).write_text(json.dumps(document, indent=2) + "\n")
        tensors.write_folder(staged, named.specs, named.make, max_shard_bytes)


def named_tensors(
    source: leaves.Leaves, layout: mapping.Layout | None = None
) -> assembly.Tensors | compressed.Compressed:
    """The tensors of a checkpoint of `source`; layout: as in `save_hf`.

    Raises NotImplementedError for weights in few bits in a layout that has none.
    """
    if not source.held:
        return assembly.Tensors(source, layout or layouts.HF_FUSED)
    if layout not in (None, layouts.HF_UNFUSED):
        raise NotImplementedError(
            f"weights in few bits in the layout {layout.name!r}; wanted {layouts.HF_UNFUSED.name!r} ('hf_unfused')"
        )
    return compressed.Compressed(assembly.Tensors(source, layouts.HF_UNFUSED))


def documents(source: leaves.Leaves) -> dict[str, dict]:
    """The JSON files of a checkpoint beside its weights, by name.

    Raises NotImplementedError for a model that the format cannot express.
    """
    config = hf_config.to_hf(source.config, assembly.main_dtype(source))
    if source.held:
        config["quantization_config"] = named_tensors(source).quantization_config
    return {"config.json": config, "generation_config.json": hf_config.generation_to_hf(source.config)}


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
    readers = {"tensors": quantised.Dequantised(assembly.InMemory(named))}
    return assembly.assemble(
        config, layouts.hf_layout(named), readers, dtype=dtype, scan=scan, source="the given tensors"
    )


def to_tensors(model: Llama4, layout: mapping.Layout | None = None) -> dict[str, np.ndarray]:
    """The model's weights under the names of `layout`, and as it shapes them; layout: as in `save_hf`."""
    named = named_tensors(leaves.ModelLeaves(model), layout)
    return {key: named.make(key) for key in named.specs}


def tensor_shapes(config: Llama4Config, layout: mapping.Layout = layouts.HF_FUSED) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of `config`; nothing is allocated."""
    model = jax.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0)))
    return assembly.Tensors(leaves.ModelLeaves(model), layout).shapes


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file belongs to a checkpoint of this kind, and so goes when that is replaced."""
    return path.name in ("config.json", "generation_config.json", tensors.INDEX) or path.suffix == ".safetensors"
