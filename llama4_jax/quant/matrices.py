"""The parameters of a module by dotted name, and a module with some of them replaced.

Here a parameter is whatever its `nnx.Param` holds, so that a quantised one is one leaf under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from llama4_jax.core import names
from llama4_jax.core.quantized import QuantizedArray

Leaf = jax.Array | QuantizedArray


def replaced(module: nnx.Module, leaves: Mapping[str, Leaf]) -> nnx.Module:
    """`module` with these in place of its parameters of the same names; what else a parameter says of itself is kept.

    Raises ValueError for a name that the module does not have.
    """
    unknown = sorted(set(leaves) - set(names.held(module)))
    if unknown:
        raise ValueError(f"the module has no parameter {', '.join(unknown)}; it has {', '.join(names.held(module))}")

    def place(path, parameter: nnx.Param) -> nnx.Param:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return parameter.replace(leaves[name]) if name in leaves else parameter

    return jax.tree.map_with_path(place, module, is_leaf=lambda node: isinstance(node, nnx.Param))


def quantised(module: nnx.Module) -> dict[str, QuantizedArray]:
    """Those of its parameters that are held in few bits."""
    return {name: leaf for name, leaf in names.held(module).items() if isinstance(leaf, QuantizedArray)}
