"""A model's weights as matrices that are read as they lie, on one accelerator or on the mesh in use; see `nn.matrices`."""

from __future__ import annotations

import functools
import logging

import jax

from llama4_jax.core import partitioning
from llama4_jax.kernels import few_rows
from llama4_jax.model import Llama4
from llama4_jax.nn.linear import Linear, MatrixLinear
from llama4_jax.nn.moe import Experts, MatrixExperts

logger = logging.getLogger(__name__)


def laid_out(model: Llama4) -> Llama4:
    """`model` with matrices in place of the decoder's and the unembedding's weights; all else is as it was.

    On GPUs only of weights of few bits: others lie there in the order of their axes, which is a matrix's. On a mesh only in the placement of serving, and only where groups of inputs divide as inputs do: the log says where not.
    """
    if partitioning.mesh_in_use() and partitioning.placement_in_use().table != partitioning.SERVE.table:
        return model
    floats_too = partitioning.platform() != "gpu"

    def of(path, node):
        made = {Linear: MatrixLinear, Experts: MatrixExperts}.get(type(node))
        if made is None or path[0].name == "vision" or not (_few_bits(node) or floats_too):
            return node
        try:
            return made(node)
        except ValueError as error:
            _report(type(node).__name__, str(error))
            return node

    return jax.tree.map_with_path(of, model, is_leaf=lambda node: type(node) in (Linear, Experts))


def _few_bits(node: Linear | Experts) -> bool:
    kernels = (node.kernel,) if type(node) is Linear else (node.gate_up, node.down)
    return all(few_rows.can_pack(kernel[...]) for kernel in kernels)


@functools.cache
def _report(name: str, reason: str) -> None:
    logger.warning("weights of few bits of a %s become floats at each step: %s", name, reason)
