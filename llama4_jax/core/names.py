"""A module's parameters as one flat dict from dotted names to arrays, and back.

`split(model)` gives `("decoder.period.0.attention.query.kernel" -> array)` and the structure that puts them together
again. A flat dict flattens in microseconds where a module of hundreds of leaves takes milliseconds: training state and
checkpoints hold the dict, and merge inside the traced function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from llama4_jax.core.quantized import QuantizedArray


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a module is apart from its arrays. Invariant: `names[i]` is the name of leaf i of `treedef`."""

    treedef: Any  # jax.tree_util.PyTreeDef
    names: tuple[str, ...]

    def merge(self, params: Mapping[str, jax.Array]) -> nnx.Module:
        """The module with these parameters; raises ValueError when a name is missing or unknown."""
        missing = sorted(set(self.names) - set(params))
        unknown = sorted(set(params) - set(self.names))
        if missing or unknown:
            raise ValueError(
                f"parameters do not fit the model: missing {missing or 'none'}, unknown {unknown or 'none'}; "
                "were they split from a model of another configuration?"
            )
        return jax.tree.unflatten(self.treedef, [params[name] for name in self.names])


def split(model: nnx.Module) -> tuple[Structure, dict[str, jax.Array]]:
    """The structure of `model` and its parameters by dotted name. Works on abstract modules (`jax.eval_shape`) too."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    names = tuple(_name(path) for path, _ in leaves)
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two parameters share a name: {repeated}")
    return Structure(treedef, names), dict(zip(names, (leaf for _, leaf in leaves)))


def held(model: nnx.Module) -> dict[str, jax.Array | QuantizedArray]:
    """What each parameter holds, by the names that `split` gives a model of plain arrays: a `QuantizedArray` is one of them.

    `Structure.merge` of such a model takes it.
    """
    leaves = jax.tree.leaves_with_path(model, is_leaf=lambda node: isinstance(node, QuantizedArray))
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    keys = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    # The array inside an nnx.Param is its attribute `value`, which says nothing.
    return ".".join(keys[:-1] if keys[-1] == "value" else keys)
