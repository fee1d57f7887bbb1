"""A recipe on a model's parameters: which spec each gets."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import jax

from llama4_jax.config.lora import matches
from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import forms


def specs(params: Mapping[str, jax.Array], recipe: QuantRecipe) -> dict[str, QuantSpec]:
    """The spec of each parameter that `recipe` quantises, by dotted name; arrays may be abstract.

    A rule may name a matrix that models of other configurations have (`head.kernel` where embeddings are tied, `experts.down`
    where no layer is a mixture), provided that this model has none of that kind at all.

    Raises ValueError for any other pattern that no parameter has, for a recipe that comes to nothing, and, listing all of them,
    for parameters that a rule names but that cannot be quantised: those in no product, those that are quantised already, and
    those whose inputs the group does not divide. Nothing is left out silently.
    """
    found, problems = {}, []
    for pattern, spec in recipe.rules:
        if spec is not None and not any(matches(name, pattern) for name in params) and not _of_others(pattern, params):
            problems.append(f"{pattern}: no parameter has such a name{_close(pattern, params)}")
    for name, array in params.items():
        spec = next((spec for pattern, spec in recipe.rules if matches(name, pattern)), None)
        if spec is None:
            continue
        try:
            _check(name, array, spec)
            found[name] = spec
        except ValueError as error:
            problems.append(f"{name} {tuple(array.shape)}: {error}")
    if not found and not problems:
        problems.append("it names nothing that this model has")
    if problems:
        raise ValueError(f"recipe {recipe.name!r} cannot be followed:\n  " + "\n  ".join(problems))
    return found


def _check(name: str, array: jax.Array, spec: QuantSpec) -> None:
    inputs = forms.inputs_of(name, array.ndim)
    if inputs is None:
        raise ValueError("it is in no product; name it in a rule with None")
    if isinstance(array, QuantizedArray):
        raise ValueError("it is quantised already; start from the floats, or name it in a rule with None")
    quantized.scales_shape(array.shape, inputs, spec.group)


def _of_others(pattern: str, params: Iterable[str]) -> bool:
    """Whether a pattern ends in the name of a matrix of which these parameters have none."""
    ends = [end for end in forms.INPUTS if matches(pattern, end)]
    return bool(ends) and not any(matches(name, end) for name in params for end in ends)


def _close(pattern: str, params: Mapping[str, jax.Array]) -> str:
    close = difflib.get_close_matches(pattern, params, 1, 0.3)
    return f"; did you mean {close[0]}?" if close else ""
