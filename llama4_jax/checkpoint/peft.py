"""Adapters in the files of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

The table of names follows from that of the weights (`layouts.HF_FUSED`), one rule for each of two cases:

* A linear layer (`target_modules`) has lora_A [r in] and lora_B [out r]. Gate and up are two such layers.
* The experts of a layer are parameters (`target_parameters`), [e in out] each. PEFT takes any such stack for
  [e out in], so its lora_A [(e r) out] is what multiplies our output and its lora_B [in (r e)] our input; gate and up,
  one parameter, share their factors. Of two parameters on one module the first, gate_up_proj, is wrapped first, and is
  found under `base_layer`.

What PEFT can hold and this refuses: variants that compute something else (DoRA and others), other ranks for some layers
(`rank_pattern`, `alpha_pattern`), trained biases and whole modules, adapters outside the decoder, or on one of gate
and up, and routed experts saved by PEFT before 0.20, which had the two factors the other way round.

Source: `LoraConfig`, `LoraLayer` and `ParamWrapper` of peft 0.21.2.
"""

from __future__ import annotations

import json
import logging
import pathlib
import re
from collections.abc import Collection, Mapping

import jax
import numpy as np

from llama4_jax.checkpoint import layouts, mapping, tensors
from llama4_jax.config.lora import LoraConfig
from llama4_jax.core import names
from llama4_jax.model import Llama4, lora
from llama4_jax.nn.lora import form_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
OLDEST = (0, 20)  # version of PEFT whose routed experts this reads

# Fields of adapter_config.json that change nothing of what a trained adapter computes. Others must be off.
_HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "megatron_core", "qalora_group_size", "layers_pattern", "ensure_weight_tying", "eva_config"),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_lora_weights"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
}
# Ways to start that leave the base as it is; the others, such as "pissa", take something out of it.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_logger = logging.getLogger(__name__)


def save_peft(model: Llama4, folder, *, base_model: str | None = None) -> None:
    """Writes the adapters of `model` to `folder`, as `PeftModel.from_pretrained` loads them.

    `base_model` is the name or folder of the model that they belong to. All or nothing: files are written beside
    `folder` and renamed into place; adapters already there are replaced, other files are kept. Raises ValueError for a
    model without adapters.
    """
    found = lora.deltas(model)
    if not found:
        raise ValueError("the model has no adapters to save; `lora.attach` some, or `checkpoint.save_hf` the model")
    leaves = lora.split(model)[1]
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    table = {entry.key: entry for entry in _table(model, found)}
    stored = {key: entry.file_shape(shapes[entry.path]) for key, entry in table.items()}
    mapping.account(table.values(), {"": stored}, shapes, "the mapping (PEFT)")
    specs = {key: (shape, np.dtype(leaves[table[key].path].dtype)) for key, shape in stored.items()}
    document = _document(next(iter(found.values())).config, _targets(model, found), base_model)
    with tensors.replaced_folder(folder, lambda path: path.name in (CONFIG, WEIGHTS)) as staged:
        (staged / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        tensors.write_file(staged / WEIGHTS, specs, lambda key: table[key].to_file(np.asarray(leaves[table[key].path])))


def load_peft(model: Llama4, folder) -> Llama4:
    """`model` with the adapters in `folder`, which may be of this or of PEFT; in float32.

    Adapters on some layers only need a model whose layers stand alone (`load_hf(..., scan=False)`). Dropout, which PEFT
    applies in training, is not taken over. Raises FileNotFoundError for missing files, NotImplementedError for what
    the top of this file refuses, and ValueError listing every tensor missing, unexpected or misshapen.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; PEFT's save_pretrained and save_peft write it")
    document = json.loads((folder / CONFIG).read_text())
    _check(document, folder)
    with tensors.open_file(folder / WEIGHTS) as reader:
        adapted = _adapted(model, document, reader.shapes)
        config = LoraConfig(
            rank=document["r"],
            alpha=float(document["lora_alpha"]),
            targets=tuple(sorted(adapted)),
            rank_stabilised=bool(document.get("use_rslora")),
        )
        abstract = jax.eval_shape(lambda model: lora.attach(model, config), model)
        structure, wanted, _ = lora.split(abstract)
        table = list(_table(model, adapted, reader.shapes))
        shapes = {name: leaf.shape for name, leaf in wanted.items()}
        mapping.account(table, {"": reader.shapes}, shapes, f"adapters {folder}")
        filled = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        for entry in table:
            entry.fill(filled[entry.path], reader.read(entry.key))
    return structure.merge(names.split(model)[1] | jax.tree.map(jax.numpy.asarray, filled))


def _table(model: Llama4, adapted: Collection[str], stored: Collection[str] = ()) -> list[mapping.Entry]:
    """Each tensor of the adapters on the parameters `adapted`; `stored`, names in a file, decide the text prefix."""
    return [half for entry in _weights(model, stored) if entry.path in adapted for half in _factors(entry, adapted)]


def _weights(model: Llama4, stored: Collection[str] = ()) -> list[mapping.Entry]:
    """The table of the weights that can have adapters."""
    text_only = stored and not any(key.startswith(PREFIX + layouts.HF_FUSED.text_prefix) for key in stored)
    table = mapping.entries(
        model.config,
        layouts.HF_FUSED,
        stacked=bool(model.decoder.periods),
        text_prefix="" if text_only else None,
    )
    return [entry for entry in table if form_of(entry.path)]


def _factors(entry: mapping.Entry, adapted: Collection[str]) -> list[mapping.Entry]:
    """lora_A and lora_B of one weight of the table."""
    file_side = re.findall(r"\(.*?\)|\w+", entry.pattern.split(" -> ")[0])
    *experts, first, second = file_side
    letters = {group: group.strip("()") for group in file_side}
    module, path = PREFIX + _module(entry), entry.path + "_delta."
    if experts:
        if entry.path.endswith("gate_up") and entry.path.removesuffix("gate_up") + "down" in adapted:
            module += ".base_layer"
        return [
            mapping.Entry(
                f"{module}.lora_A.weight", path + "lora_b", entry.index, f"(e r) {second} -> e r {letters[second]}"
            ),
            mapping.Entry(
                f"{module}.lora_B.weight", path + "lora_a", entry.index, f"{first} (r e) -> e {letters[first]} r"
            ),
        ]
    places = tuple(part for part in entry.index if part != mapping.ALL)  # gate or up comes first in the second factor
    return [
        mapping.Entry(f"{module}.lora_A.weight", path + "lora_a", entry.index, f"r {second} -> {letters[second]} r"),
        mapping.Entry(f"{module}.lora_B.weight", path + "lora_b", places, f"{first} r -> r {letters[first]}"),
    ]


def _module(entry: mapping.Entry) -> str:
    """The module that owns a weight: of `x.weight` and of the experts' `x.gate_up_proj` it is x."""
    return entry.key.rpartition(".")[0]


def _is_module(entry: mapping.Entry) -> bool:
    return entry.key.endswith(".weight")


def _targets(model: Llama4, adapted: Collection[str]) -> dict[str, list[str]]:
    """The adapted weights in full, so that they match nothing else, the vision tower included."""
    table = [entry for entry in _weights(model) if entry.path in adapted]
    return {
        "target_modules": sorted({_module(entry) for entry in table if _is_module(entry)}),
        "target_parameters": sorted({entry.key for entry in table if not _is_module(entry)}),
    }


def _adapted(model: Llama4, document: Mapping, stored: Collection[str]) -> set[str]:
    """The parameters that have adapters in a file: those that it has a tensor of, and those that its targets name."""
    table = _weights(model, stored)
    some_layers = document.get("layers_to_transform") is not None or document.get("exclude_modules")
    modules, parameters = document.get("target_modules") or [], document.get("target_parameters") or []
    named = {entry.path for entry in table if not _is_module(entry) and _is_target(entry.key, parameters)}
    found = set()
    for entry in table:
        if _is_module(entry):
            present = any(half.key in stored for half in _factors(entry, named))
            if present or (not some_layers and _is_target(_module(entry), modules)):
                found.add(entry.path)
    return found | named


def _is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's own rule: a regular expression for the whole name, or a list of ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _document(config: LoraConfig, targets: Mapping[str, list[str]], base_model: str | None) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": "0.21.2",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,  # PEFT declares an int
        "use_rslora": config.rank_stabilised,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": targets["target_modules"],
        "target_parameters": targets["target_parameters"] or None,
    }


def _check(document: Mapping, folder: pathlib.Path) -> None:
    """Raises for a configuration of something that these modules do not compute."""
    lacking = [name for name in ("peft_type", "r", "lora_alpha") if name not in document]
    if lacking:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(lacking)}; is it PEFT's?")
    wanted = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _STARTS}
    for name, values in wanted.items():
        if document.get(name, values[0]) not in values:
            raise NotImplementedError(f"{folder / CONFIG}: {name}={document[name]!r}; this reads {values}")
    on = {name: value for name, value in document.items() if value and name not in _HARMLESS}
    if on:
        raise NotImplementedError(
            f"{folder / CONFIG}: {on} is more than plain LoRA, which is all that this reads; merge the adapter with PEFT "
            "(merge_and_unload), save the model, and load that with load_hf"
        )
    version = str(document.get("peft_version") or "0.0").split(".")
    if document.get("target_parameters") and tuple(map(int, version[:2])) < OLDEST:
        raise NotImplementedError(
            f"{folder / CONFIG}: target_parameters by PEFT {'.'.join(version)}; before 0.20 it swapped the factors of "
            "routed experts. Load and save the adapter with a newer PEFT"
        )
    if document.get("lora_dropout"):
        _logger.info("%s: lora_dropout=%s is of training and is not taken over", folder, document["lora_dropout"])
