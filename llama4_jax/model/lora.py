"""Low-rank adapters on a model: attach them, train them alone, merge them into the weights and take them out again.

    model = lora.attach(model, LoraConfig(rank=16, targets=ATTENTION + SHARED_EXPERTS))
    structure, adapters, base = lora.split(model)       # loss(adapters) = ... structure.merge(adapters | base) ...
    plain = lora.merge(structure.merge(adapters | base))

A model with adapters is a `Llama4` like any other, scanned or not. Nothing here changes an array: the model that went in
keeps its weights, bit for bit.

Source: Hu et al. 2021, arXiv:2106.09685; the modules are in `nn.lora`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.config.lora import LoraConfig, matches
from llama4_jax.core import names
from llama4_jax.core.names import Structure
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model.llama4 import Llama4
from llama4_jax.nn import products
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.lora import LoraExperts, LoraLinear, LowRank, form_of
from llama4_jax.nn.moe import Experts

Params = dict[str, jax.Array | QuantizedArray]
_FACTORS = ("_delta.lora_a", "_delta.lora_b")


def attach(model: Llama4, config: LoraConfig, seed: int = 0) -> Llama4:
    """The same model with a new adapter on each parameter that `config.targets` describe; its logits are the same.

    What an adapter starts from depends on `seed` and on its parameter's name. Raises ValueError if the model has
    adapters already, and for a pattern that describes nothing.
    """
    if deltas(model):
        raise ValueError("the model has adapters already; `merge` or `detach` them first")
    chosen = _chosen(config, [name for _, node in _adaptable(model) for name in node])
    key = jax.random.key(seed)

    def low_rank(name: str, kernel: nnx.Param) -> LowRank | None:
        rngs = nnx.Rngs(jax.random.fold_in(key, zlib.crc32(name.encode())))
        return LowRank(kernel, form_of(name), config, rngs=rngs) if name in chosen else None

    def wrap(path, node):
        made = [low_rank(name, kernel) for name, kernel in _kernels(path, node).items()]
        if all(delta is None for delta in made):
            return node
        return LoraLinear(node, *made) if type(node) is Linear else LoraExperts(node, *made)

    return jax.tree.map_with_path(wrap, model, is_leaf=_can_wrap)


def deltas(model: Llama4) -> dict[str, LowRank]:
    """The adapters of a model, by the dotted name of the parameter that each belongs to."""
    is_low_rank = lambda node: isinstance(node, LowRank)  # noqa: E731
    leaves = jax.tree.leaves_with_path(model, is_leaf=is_low_rank)
    return {_dotted(path).removesuffix("_delta"): leaf for path, leaf in leaves if is_low_rank(leaf)}


def split(model: Llama4) -> tuple[Structure, Params, Params]:
    """Structure, adapters and base, with `structure.merge(adapters | base)` the model again.

    A loss of `adapters` alone, with `base` a second argument, has no gradient for the base and no memory for one.
    """
    structure, params = names.split(model)
    adapters = {name: leaf for name, leaf in params.items() if name.endswith(_FACTORS)}
    return structure, adapters, {name: leaf for name, leaf in params.items() if name not in adapters}


def detach(model: Llama4) -> Llama4:
    """The plain model under the adapters, with the very arrays that it had before `attach`."""
    return _plain(model, _base(model))


def merge(model: Llama4) -> Llama4:
    """A plain model with the adapters in its weights; a model without adapters is returned as it is.

    Sums are made in float32 and rounded once to the dtype of the weight, one layer at a time. A weight in few bits becomes one
    of floats; rows that it rounds are rounded still.
    """
    found = deltas(model)
    if not found:
        return model
    base = _base(model)
    return _plain(model, base | {name: _moved(base[name], delta, 1.0) for name, delta in found.items()})


def unmerge(merged: Llama4, model: Llama4) -> Llama4:
    """The plain model that `merged` was before `merge(model)` made it, bit for bit.

    A sum that was rounded cannot be undone exactly, so this gives back the weights that `model` has kept. Raises
    ValueError where `merged` is not what `merge(model)` gives: it was trained since, or made from something else.
    """
    wanted, got = (names.split(plain)[1] for plain in (merge(model), merged))
    differ = sorted(name for name in wanted.keys() | got.keys() if not _same_bits(wanted.get(name), got.get(name)))
    if differ:
        raise ValueError(
            f"{len(differ)} parameters of the merged model are not those of merge(model), {differ[0]} among them; if "
            "its base is lost, attach the adapters to the merged model and `subtract` them"
        )
    return detach(model)


def subtract(model: Llama4) -> Llama4:
    """The inverse of `merge` where the base is lost: `model` is a merged one to which its own adapters are attached.

    Returns the model with W' = W_merged - delta in place of W_merged, adapters attached. With u the unit roundoff of the
    weights' dtype, |W' - W| <= (u + 2^-23) (|W_merged| + |W'|) up to terms in u^2: merging rounded W_merged, this W',
    and each sum was rounded in float32 before.
    """
    structure, adapters, base = split(model)
    restored = {name: _moved(base[name], delta, -1.0) for name, delta in deltas(model).items()}
    return structure.merge(adapters | base | restored)


@functools.partial(jax.jit, static_argnums=2)
def _moved(kernel: jax.Array | QuantizedArray, delta: LowRank, sign: float) -> jax.Array | QuantizedArray:
    def layer(kernel, delta):
        moved = products.floats(kernel, jnp.float32).astype(jnp.float32) + sign * delta.matrix()
        return products.like(kernel, moved.astype(kernel.dtype))

    if kernel.ndim == len(delta.form.kernel):
        return layer(kernel, delta)
    # A float32 copy of a whole stack would be twice the size of its bfloat16 weights.
    return jax.lax.map(lambda pair: layer(*pair), (kernel, delta))


def _base(model: Llama4) -> Params:
    """All but the adapters, a weight in few bits as one."""
    return {name: leaf for name, leaf in names.held(model).items() if not name.endswith(_FACTORS)}


def _plain(model: Llama4, params: Params) -> Llama4:
    scan = bool(model.decoder.periods)
    plain = jax.eval_shape(lambda: Llama4(model.config, rngs=nnx.Rngs(0), scan=scan))
    return names.split(plain)[0].merge(params)


def _can_wrap(node) -> bool:
    return type(node) in (Linear, Experts)  # and no subclass: one for decoding, say, has its weights elsewhere


def _kernels(path, node) -> dict[str, nnx.Param]:
    """The parameters of a module that can have adapters, by dotted name, in the order of its adapters."""
    if not _can_wrap(node):
        return {}
    fields = ("kernel",) if type(node) is Linear else ("gate_up", "down")
    named = {f"{_dotted(path)}.{field}": getattr(node, field) for field in fields}
    return {name: kernel for name, kernel in named.items() if form_of(name)}


def _adaptable(model: Llama4) -> list[tuple]:
    leaves = jax.tree.leaves_with_path(model, is_leaf=_can_wrap)
    return [(path, kernels) for path, node in leaves if (kernels := _kernels(path, node))]


def _chosen(config: LoraConfig, adaptable: Collection[str]) -> set[str]:
    for pattern in config.targets:
        if not any(matches(name, pattern) for name in adaptable):
            raise ValueError(
                f"target {pattern!r} describes no parameter that can have an adapter; this model has "
                f"{', '.join(adaptable) or 'none, is it laid out for decoding?'}"
            )
    return {name for name in adaptable if any(matches(name, pattern) for pattern in config.targets)}


def _dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _same_bits(a: jax.Array | None, b: jax.Array | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
