"""Meta's checkpoints of Llama 4 to our model, and our model under the names of Meta's modules, bit for bit.

A folder holds params.json and consolidated.00, consolidated.01, ..., one file a tensor-parallel shard: `torch.save`
files (.pth, read without torch) or safetensors files of the same names. `layouts.META_FILES` and `META_MODULES` say
what goes where and along which axis shards are joined.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator

from jax.sharding import Mesh

from llama4_jax.checkpoint import assembly, layouts, leaves, mapping, meta_config, positions, tensors, torch_files
from llama4_jax.config import Llama4Config
from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import Placement
from llama4_jax.model import Llama4

PARAMS = "params.json"
EXTRAS = "llama4_jax.json"  # token ids and context length, of which params.json says nothing
WEIGHTS = "consolidated.{shard:02d}"
WRITTEN = WEIGHTS.format(shard=0) + ".safetensors"  # all weights in one file
OPENERS = {".pth": torch_files.open_file, ".safetensors": tensors.open_file}


def load_meta(
    folder,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    *,
    placement: Placement = partitioning.TRAIN,
    scan: bool = True,
) -> Llama4:
    """The model in `folder`, with weights converted to `dtype` ("float32", "bfloat16", "float16"; None: as stored).

    Names of modules and of released files are both understood. Weights are read one parameter at a time: the peak is
    the model plus its largest parameter. `mesh` and `placement` as in `load_hf`, `scan` as in `Llama4`. States of the training framework are dropped; tensors
    that every shard holds whole are taken from the first, with a warning if another differs.
    Raises FileNotFoundError for missing files, ValueError for a configuration or weights that lack, exceed or misshape
    anything (all of it in one message), NotImplementedError for what the model cannot express.
    """
    with opened(folder) as (config, layout, readers):
        return assembly.assemble(
            config,
            layout,
            readers,
            dtype=dtype,
            scan=scan,
            source=f"checkpoint {folder}",
            mesh=mesh,
            placement=placement,
        )


@contextlib.contextmanager
def opened(folder) -> Iterator[tuple[Llama4Config, mapping.Layout, dict[str, leaves.Reader]]]:
    """The configuration of the checkpoint in `folder`, the layout seen from its names, and its shards in order."""
    folder = pathlib.Path(folder)
    config = read_params(folder)
    with contextlib.ExitStack() as files:
        readers = {
            path.name: positions.Resampled(files.enter_context(OPENERS[path.suffix](path))) for path in _shards(folder)
        }
        names = set().union(*(reader.shapes for reader in readers.values()))
        yield config, layouts.meta_layout(names), readers


def save_meta(model: Llama4, folder) -> None:
    """Writes `model` to `folder` under the names of Meta's modules, in the dtype of its weights.

    The files are params.json, consolidated.00.safetensors (what `Transformer.load_state_dict` takes) and
    llama4_jax.json. All or nothing: they are written beside `folder` and renamed into place when complete. A checkpoint
    already there is replaced, other files in the folder (a tokenizer) are kept.
    Raises NotImplementedError for a model that the format cannot express, before anything is written.
    """
    source = leaves.ModelLeaves(model)
    contents = documents(source)
    named = assembly.Tensors(source, layouts.META_MODULES)
    with tensors.replaced_folder(folder, is_ours) as staged:
        for name, document in contents.items():
            (staged / name).write_text(json.dumps(document, indent=2) + "\n")
        tensors.write_file(staged / WRITTEN, named.specs, named.make)


def documents(source: leaves.Leaves) -> dict[str, dict]:
    """The JSON files of a checkpoint beside its weights, by name.

    Raises NotImplementedError naming every field that Meta's model cannot express, and for weights in few bits.
    """
    if source.held:
        raise NotImplementedError(
            f"{next(iter(source.held))} is in few bits, which Meta's layouts are not; dequantise it"
        )
    return dict(zip((PARAMS, EXTRAS), meta_config.to_params(source.config)))


def read_params(folder) -> Llama4Config:
    """The configuration of the checkpoint in `folder`, without its weights."""
    folder = pathlib.Path(folder)
    if not (folder / PARAMS).is_file():
        raise FileNotFoundError(f"{folder / PARAMS} is missing; a folder of Meta's weights has one")
    extras = folder / EXTRAS
    return meta_config.from_params(
        json.loads((folder / PARAMS).read_text()), json.loads(extras.read_text()) if extras.is_file() else None
    )


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights, first shard to last."""
    found = sorted(path for path in folder.glob("consolidated.*") if path.suffix in OPENERS)
    suffixes = {path.suffix for path in found}
    if len(suffixes) != 1:
        seen = [path.name for path in found]
        raise FileNotFoundError(
            f"{folder}: wanted consolidated.00.pth, ... or consolidated.00.safetensors, ...; got {seen}"
        )
    (suffix,) = suffixes
    if [path.name for path in found] == [f"consolidated{suffix}"]:
        return found
    wanted = [WEIGHTS.format(shard=shard) + suffix for shard in range(len(found))]
    if [path.name for path in found] != wanted:
        missing = sorted(set(wanted) - {path.name for path in found})
        raise FileNotFoundError(f"{folder}: shards are not numbered from 0 without a gap; missing {missing}")
    return found


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file belongs to a checkpoint of this kind, and so goes when that is replaced."""
    return path.name in (PARAMS, EXTRAS) or (path.name.startswith("consolidated.") and path.suffix in OPENERS)
