"""A recipe on a model's parameters: which spec each gets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import jax

from llama4_jax.config.lora import matches
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import quantized
from llama4_jax.quant import forms


def specs(params: Mapping[str, jax.Array], recipe: QuantRecipe) -> dict[str, QuantSpec]:
    """The spec of each parameter that `recipe` quantises, by dotted name; arrays may be abstract.

    Raises ValueError for a pattern that no parameter has, and, listing all of them, for parameters that a rule names but that
    cannot be quantised: those in no product, and those whose inputs the group does not divide. Nothing is left out silently.
    """
    found, problems = {}, []
    for pattern, spec in recipe.rules:
        if spec is not None and not any(matches(name, pattern) for name in params):
            problems.append(f"{pattern}: no parameter has such a name{_close(pattern, params)}")
    for name, array in params.items():
        spec = next((spec for pattern, spec in recipe.rules if matches(name, pattern)), None)
        if spec is None:
            continue
        inputs = forms.inputs_of(name, array.ndim)
        try:
            if inputs is None:
                raise ValueError("it is in no product; name it in a rule with None")
            quantized.scales_shape(array.shape, inputs, spec.group)
            found[name] = spec
        except ValueError as error:
            problems.append(f"{name} {tuple(array.shape)}: {error}")
    if problems:
        raise ValueError(f"recipe {recipe.name!r} cannot be followed:\n  " + "\n  ".join(problems))
    return found


def _close(pattern: str, params: Mapping[str, jax.Array]) -> str:
    close = difflib.get_close_matches(pattern, params, 1, 0.3)
    return f"; did you mean {close[0]}?" if close else ""
