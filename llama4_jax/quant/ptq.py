"""A trained model in, the same model in few bits out: no training, and for the better methods some text.

    model = ptq.quantise(model, quant.int4_all(group=128))                                      # rounded to nearest
    model = ptq.quantise(model, quant.int4_all(group=128), method="clip")                       # ranges clipped
    model, coverage = ptq.calibrated(model, quant.int4_all(group=128), batches)                 # GPTQ, on text

Modules stay what they are: a `QuantizedArray` takes the array's place inside its `nnx.Param`. What does not fit in memory is
rounded tensor by tensor (`quantise_tensor`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.config.quant import QuantRecipe, QuantSpec
from llama4_jax.core import names, quantized
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import Llama4
from llama4_jax.quant import calibrate, forms, gptq, matrices, recipe, rounding

METHODS = ("rtn", "clip", "gptq")  # to nearest; to nearest in the best part of each range; with error feedback
PIECE = 1 << 26  # weights rounded at once, at most: what is computed on the way is a few times as many floats

_nearest = jax.jit(rounding.nearest, static_argnames=("spec", "inputs", "clips"))


def quantise(
    model: nnx.Module,
    rules: QuantRecipe,
    *,
    method: str = "rtn",
    calibration: Iterable[Mapping[str, np.ndarray]] | None = None,
    extra_tokens: int = 0,
) -> nnx.Module:
    """`model` with the parameters that `rules` name in few bits; every other parameter is the same array as before.

    method: one of METHODS. calibration: batches of text as loaders make them. "gptq" wants it, "clip" weighs errors by the inputs
    of each weight where it is given. extra_tokens: see `calibrated`, which also tells how many tokens each expert saw.
    Raises ValueError for rules that cannot be followed (`recipe.specs`) and for a method without, or with useless, text.
    """
    _check_method(method)
    if calibration is not None:
        return calibrated(model, rules, calibration, method=method, extra_tokens=extra_tokens)[0]
    if method == "gptq":
        raise ValueError("method='gptq' wants calibration=batches of text; use method='clip' without")
    leaves = names.held(model)
    chosen = recipe.specs(leaves, rules)
    rounded = {name: quantise_tensor(name, leaves[name], spec, method=method) for name, spec in chosen.items()}
    return _checked(matrices.replaced(model, rounded), chosen)


def calibrated(
    model: Llama4,
    rules: QuantRecipe,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    method: str = "gptq",
    extra_tokens: int = 0,
) -> tuple[Llama4, calibrate.Coverage]:
    """`quantise` on text, and how many of its tokens each expert saw; see `calibrate.walk`."""
    _check_method(method)
    if method == "rtn":
        raise ValueError("method='rtn' uses no calibration; leave it out, or use 'clip' or 'gptq'")
    chosen = recipe.specs(names.held(model), rules)
    round_matrix = {"gptq": gptq.gptq, "clip": _clipped}[method]
    model, coverage = calibrate.walk(model, batches, calibrate.Task(chosen, round_matrix, extra_tokens))
    return _checked(model, chosen), coverage


def quantise_tensor(
    name: str, array: jax.Array | np.ndarray, spec: QuantSpec, *, method: str = "rtn"
) -> QuantizedArray:
    """One parameter, by its dotted name, rounded without text; numpy in, numpy out.

    Beside the tensor this needs what comes out, twice at most, and a few times PIECE float32 numbers.
    Raises ValueError for a parameter that is in no product, and for a group that does not divide its inputs.
    """
    _check_method(method)
    inputs = forms.inputs_of(name, array.ndim)
    if method == "gptq" or inputs is None:
        raise ValueError(f"{name}: " + ("it is in no product" if inputs is None else "'gptq' wants text; use 'clip'"))
    quantized.scales_shape(array.shape, inputs, spec.group)
    clips = rounding.CLIPS if method == "clip" else rounding.WHOLE
    numpy = isinstance(array, np.ndarray)

    def rounded(piece: jax.Array | np.ndarray) -> QuantizedArray:
        held = _nearest(jnp.asarray(piece), spec=spec, inputs=inputs, clips=clips)
        return jax.tree.map(np.asarray, held) if numpy else held

    axis, step = _pieces(array.shape, inputs)
    index = [slice(None)] * axis
    starts = range(0, array.shape[axis], step)
    pieces = [rounded(array[(*index, slice(start, start + step))]) for start in starts]
    join = np.concatenate if numpy else jnp.concatenate
    return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *parts: join(parts, axis), *pieces)


def _pieces(shape: Sequence[int], inputs: Sequence[int]) -> tuple[int, int]:
    """An axis that no scale goes across, and how much of it is about PIECE weights: the outermost that is long enough."""
    size, outputs = int(np.prod(shape)), [axis for axis in range(len(shape)) if axis not in inputs]
    axis = next((axis for axis in outputs if size // shape[axis] <= PIECE), max(outputs, key=lambda axis: shape[axis]))
    return axis, max(PIECE * shape[axis] // size, 1)


def _clipped(weight: jax.Array, moments: jax.Array, spec: QuantSpec, inputs: tuple[int, ...]) -> QuantizedArray:
    shape = [size if axis in inputs else 1 for axis, size in enumerate(weight.shape)]
    importance = jnp.diagonal(moments).reshape(shape)
    return _nearest(weight, spec=spec, inputs=inputs, clips=rounding.CLIPS, importance=importance)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {METHODS}")


def _checked(model: nnx.Module, chosen: Mapping[str, QuantSpec]) -> nnx.Module:
    """`model`, once it is seen that each matrix that was to be rounded is, and to what it was to be."""
    held = {name: (leaf.values.dtype.name, leaf.activations) for name, leaf in matrices.quantised(model).items()}
    wanted = {name: (spec.values, spec.activations) for name, spec in chosen.items()}
    wrong = [name for name in wanted if held.get(name) != wanted[name]]
    if wrong:
        raise RuntimeError(
            f"not as the recipe says: {', '.join(f'{n}: wanted {wanted.get(n)}, got {held.get(n)}' for n in wrong)}"
        )
    return model
