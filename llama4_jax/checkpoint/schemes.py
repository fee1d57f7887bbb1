"""How a Hugging Face checkpoint says which of its weights are quantised, and how: `quantization_config` of config.json.

Groups of modules, named by patterns, have a scheme each: bits, symmetry, what shares a scale, and what inputs are rounded to.

Source: `QuantizationConfig`, `QuantizationScheme` and `match_named_modules` of compressed-tensors 0.20.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from llama4_jax.config.quant import QuantSpec

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
VALUES = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
ACTIVATIONS = {("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
ANY = "Linear"  # as a target: every linear layer


class Schemes:
    """The specs that a `quantization_config` gives to modules.

    Raises NotImplementedError, with what was seen, for a description of weights that are not read here.
    """

    def __init__(self, quantization: Mapping[str, Any]):
        groups = quantization.get("config_groups") or {}
        self._groups = [(tuple(group.get("targets") or (ANY,)), _spec(group)) for group in groups.values()]
        known = quantization.get("quant_method") == METHOD and quantization.get("format", FORMATS[0]) in FORMATS
        if not known or not groups or any(spec is None for _, spec in self._groups):
            raise NotImplementedError(
                f"config.json: quantization_config={dict(quantization)}; wanted quant_method {METHOD!r} with 4- or 8-bit "
                "integer weights or symmetric 8-bit float weights, one scale a group, a channel or a tensor, in the order "
                f"of their columns, in one of the formats {', '.join(FORMATS)}; save the model unquantised elsewhere first"
            )

    def of(self, module: str) -> QuantSpec | None:
        """The spec of a module that is quantised: by its name, else by its class."""
        named = (spec for targets, spec in self._groups if any(_names(target, module) for target in targets))
        return next(named, next((spec for targets, spec in self._groups if ANY in targets), None))


def document(quantised: Mapping[str, QuantSpec], modules: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are `modules`, of which those in `quantised` are."""
    schemes: dict[str, list[str]] = {}
    for module, spec in quantised.items():
        schemes.setdefault(json.dumps(_scheme(spec)), []).append(module)
    groups = {
        f"group_{i}": {"targets": _targets(members, set(modules) - set(members)), **json.loads(scheme)}
        for i, (scheme, members) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def _spec(group: Mapping[str, Any]) -> QuantSpec | None:
    """The spec that a group means; None if it is none of ours."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    values = VALUES.get((weights.get("type", "int"), weights.get("num_bits", 8)))
    size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    readable = strategy in ("channel", "tensor", "group") and (symmetric or values != "float8_e4m3fn")
    if not weights or values is None or not readable or weights.get("actorder") in (True, "group", "dynamic"):
        return None
    activations = ACTIVATIONS.get((inputs.get("type", "int"), inputs.get("num_bits", 8))) if inputs else None
    group_size = size if strategy == "group" else None
    return QuantSpec(values=values, group=group_size, symmetric=symmetric, activations=activations)


def _scheme(spec: QuantSpec) -> dict[str, Any]:
    """The scheme that a spec is; the dtype of scales is that of their tensor."""
    kinds = {values: kind for (kind, _), values in VALUES.items()}
    weights = {"num_bits": spec.bits, "type": kinds[spec.values], "symmetric": spec.symmetric, "dynamic": False}
    shared = {"strategy": "group", "group_size": spec.group} if spec.group else {"strategy": "channel"}
    inputs = spec.activations and {
        "num_bits": 8,
        "type": kinds[spec.activations],
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    form = "float-quantized" if kinds[spec.values] == "float" else "pack-quantized"
    return {"weights": weights | shared, "input_activations": inputs, "format": form}


def _targets(members: Collection[str], others: Collection[str]) -> list[str]:
    """Patterns, of any layer and any expert, that `members` have and `others` have not; where there is none, names."""
    patterns: dict[str, list[str]] = {}
    for module in members:
        patterns.setdefault(_pattern(module), []).append(module)
    shared = {_pattern(module) for module in others}
    return [
        target for pattern, names in patterns.items() for target in (names if pattern in shared else [f"re:{pattern}"])
    ]


def _pattern(module: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split(".")) + "$"


def _names(target: str, module: str) -> bool:
    return bool(re.match(target.removeprefix("re:"), module)) if target.startswith("re:") else target == module
