"""Runs a model on text layer by layer, and has each matrix rounded with the second moments of what it multiplies.

A layer sees what the layers before it, rounded already, make of the text, and within a layer each matrix sees what those before
it make. So errors are made good further on, and no more is held than the text's hidden states and one layer's inputs:
tokens x width numbers, a few times.

A routed expert multiplies the tokens that the router sends it, each times its score: they are what it is calibrated on, and
`Coverage` says how many they were. Nothing in the modules is changed for this. What an attention's last matrix multiplies is
that attention's own result with the identity as the matrix.

Source: the order is that of Frantar et al. 2022, arXiv:2210.17323, section 4, and within layers "true sequential" of its code.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama4_jax.config import FeedForward
from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import names, partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.model import Llama4
from llama4_jax.nn.attention import Context
from llama4_jax.nn.mlp import swiglu
from llama4_jax.quant import forms, matrices, moments
from llama4_jax.quant.coverage import Coverage
from llama4_jax.quant.matrices import Leaf

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """What to round and how.

    specs: by the name of a parameter, or of a stack of layers' parameters. round: a matrix, the second moments of its inputs
    [i i], its spec and the axes of its inputs -> it in few bits. extra_tokens: see `moments.of_experts`.
    """

    specs: Mapping[str, QuantSpec]
    round: Callable[[jax.Array, jax.Array, QuantSpec, tuple[int, ...]], QuantizedArray]
    extra_tokens: int = 0

    def rounded(self, name: str, matrix: jax.Array, seen: jax.Array) -> QuantizedArray:
        """The matrix of parameter `name`, whose inputs have second moments `seen`."""
        return self.round(matrix, seen, self.specs[name], forms.inputs_of(name, matrix.ndim))


@dataclasses.dataclass(frozen=True)
class _Text:
    """All batches on their way. xs: [b t d] each; contexts: where their tokens stand."""

    xs: list[jax.Array]
    contexts: list[Context]

    def rows(self, arrays: Sequence[jax.Array]) -> np.ndarray:
        """Arrays [b t ..], one a batch, as rows [r i] of the tokens there are."""
        return moments.present(arrays, [context.segments for context in self.contexts])

    def plus(self, arrays: Sequence[jax.Array]) -> _Text:
        return dataclasses.replace(self, xs=[x + array for x, array in zip(self.xs, arrays)])


def walk(model: Llama4, batches: Iterable[Mapping[str, np.ndarray]], task: Task) -> tuple[Llama4, Coverage]:
    """`model` with the matrices of `task` rounded, and how many tokens each expert saw.

    batches: tokens [b t] int32 and, optionally, positions, segments (0: padding, which is left out) and images.
    Raises NotImplementedError for matrices outside of the decoder and the unembedding, on a mesh, and with adapters; ValueError
    without any text.
    """
    _check(model, task)
    text = _embedded(model, batches)
    made: dict[str, list[dict[str, QuantizedArray]]] = {}  # what a layer's names begin with -> its layers' matrices
    chosen, used = {}, {}
    for layer in range(model.config.text.num_layers):
        prefix, block = _place(model, layer)
        block, text = _attention(task, prefix, block, text)
        block, text, tokens = _feed_forward(task, prefix, block, text)
        if tokens:
            chosen[layer], used[layer] = tokens
        made.setdefault(prefix, []).append(matrices.quantised(block))
        logger.info("layer %d of %d is rounded", layer + 1, model.config.text.num_layers)
    leaves = {prefix + name: leaf for prefix, layers in made.items() for name, leaf in _joined(prefix, layers).items()}
    if "head.kernel" in task.specs:
        rows = text.rows([_call(model.norm, x) for x in text.xs])
        leaves["head.kernel"] = task.rounded("head.kernel", model.head.kernel[...], moments.second_moments(rows))
    coverage = Coverage(chosen, used)
    coverage.warn()
    return matrices.replaced(model, leaves), coverage


def _embedded(model: Llama4, batches: Iterable[Mapping[str, np.ndarray]]) -> _Text:
    text = _Text([], [])
    embed = jax.jit(lambda model, tokens, images: model.embedded(tokens, images))
    for batch in batches:
        text.xs.append(embed(model, batch["tokens"], batch.get("images")))
        text.contexts.append(model.context(batch["tokens"].shape, batch.get("positions"), batch.get("segments")))
    if not text.xs:
        raise ValueError("there is no text to calibrate with; give one batch or more")
    return text


def _attention(task: Task, prefix: str, block, text: _Text):
    """The block with its attention's matrices rounded, and the text after it."""
    normed = [_call(block.attention_norm, x) for x in text.xs]
    projections = [f"attention.{name}.kernel" for name in ("query", "key", "value")]
    block = _settled(task, prefix, block, projections, text.rows(normed))
    attended = [_attended(block.attention, x, context) for x, context in zip(normed, text.contexts)]  # [b t n h]
    block = _settled(task, prefix, block, ["attention.output.kernel"], text.rows(attended))
    return block, text.plus([_call(block.attention.output, x) for x in attended])


def _feed_forward(task: Task, prefix: str, block, text: _Text):
    """The block with its feed-forward's matrices rounded, the text after it, and its experts' tokens if it has experts."""
    normed, tokens = [_call(block.feed_forward_norm, x) for x in text.xs], None
    if block.kind.feed_forward is FeedForward.DENSE:
        block = _mlp(task, prefix, block, "feed_forward", text, normed)
        return block, text.plus([_call(block.feed_forward, x) for x in normed]), tokens
    block = _settled(task, prefix, block, ["feed_forward.router.kernel"], text.rows(normed))
    block, tokens = _experts(task, prefix, block, text.rows(normed))
    block = _mlp(task, prefix, block, "feed_forward.shared", text, normed)
    fed = [_call(block.feed_forward, x, context.segments != 0)[0] for x, context in zip(normed, text.contexts)]
    return block, text.plus(fed), tokens


def _mlp(task: Task, prefix: str, block, path: str, text: _Text, normed: Sequence[jax.Array]):
    """The block with the two matrices of the feed-forward at `path` rounded, which is given `normed`."""
    block = _settled(task, prefix, block, [f"{path}.gate_up.kernel"], text.rows(normed))
    gate_up = operator.attrgetter(path)(block).gate_up
    return _settled(task, prefix, block, [f"{path}.down.kernel"], text.rows([_hidden(gate_up, x) for x in normed]))


def _settled(task: Task, prefix: str, block, multiplied: Sequence[str], rows: np.ndarray):
    """The block with those of its matrices rounded that the task names; `multiplied` by name, each by `rows` [r i]."""
    chosen = [name for name in multiplied if prefix + name in task.specs]
    if not chosen:
        return block
    seen, leaves = moments.second_moments(rows), names.held(block)
    return matrices.replaced(block, {name: task.rounded(prefix + name, leaves[name], seen) for name in chosen})


def _experts(task: Task, prefix: str, block, rows: np.ndarray):
    """The block with its routed experts rounded one by one; tokens [e] that were chosen, and that were used."""
    experts, path = block.feed_forward.experts, "feed_forward.experts."
    made: dict[str, list[QuantizedArray]] = {"gate_up": [], "down": []}
    chosen, used = [], []

    def settle(name: str, matrix: jax.Array, inputs: np.ndarray) -> Leaf:
        if prefix + path + name not in task.specs:
            return matrix
        made[name].append(task.rounded(prefix + path + name, matrix, moments.second_moments(inputs)))
        return made[name][-1]

    for e, (inputs, number) in enumerate(moments.of_experts(block.feed_forward.router, rows, task.extra_tokens)):
        gate_up = settle("gate_up", experts.gate_up[...][e], inputs)
        settle("down", experts.down[...][e], moments.hidden(inputs, gate_up))
        chosen.append(number)
        used.append(len(inputs))
    leaves = {path + name: _stacked(arrays) for name, arrays in made.items() if arrays}
    return matrices.replaced(block, leaves), (np.array(chosen), np.array(used))


def _place(model: Llama4, layer: int) -> tuple[str, nnx.Module]:
    """What the names of a layer's parameters begin with, and the layer as a block of its own."""
    decoder = model.decoder
    scanned = decoder.periods * len(decoder.period)
    if layer >= scanned:
        return f"decoder.tail.{layer - scanned}.", decoder.tail[layer - scanned]
    repetition, member = divmod(layer, len(decoder.period))
    return f"decoder.period.{member}.", jax.tree.map(lambda leaf: leaf[repetition], decoder.period[member])


def _joined(prefix: str, layers: list[dict[str, QuantizedArray]]) -> dict[str, QuantizedArray]:
    """The rounded matrices of layers that share a name, as the model holds them."""
    if prefix.startswith("decoder.tail."):
        return layers[0]
    return {name: _stacked([layer[name] for layer in layers]) for name in layers[0]}


def _stacked(arrays: Sequence[QuantizedArray]) -> QuantizedArray:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)


@jax.jit
def _call(module: nnx.Module, *arguments):
    return module(*arguments)


@jax.jit
def _attended(attention: nnx.Module, x: jax.Array, context: Context) -> jax.Array:
    """What the output projection of an attention multiplies, [b t n h]."""
    leaves = names.held(attention)
    n, h = leaves["output.kernel"].shape[:2]
    same = {"output.kernel": jnp.eye(n * h, dtype=x.dtype).reshape(n, h, n, h)}
    if "output.bias" in leaves:
        same["output.bias"] = jnp.zeros((n, h), x.dtype)
    return matrices.replaced(attention, same)(x, context)[0]


@jax.jit
def _hidden(gate_up: nnx.Module, x: jax.Array) -> jax.Array:
    """What the second matrix of a feed-forward multiplies, [b t f]."""
    return swiglu(gate_up(x))


def _check(model: Llama4, task: Task) -> None:
    if partitioning.mesh_in_use() is not None:
        raise NotImplementedError("calibration runs on one device; quantise before the model is spread over a mesh")
    outside = [name for name in task.specs if not name.startswith("decoder.") and name != "head.kernel"]
    if outside:
        raise NotImplementedError(
            f"there are no calibration inputs for {', '.join(outside)}: text passes the decoder and the unembedding; keep them "
            "by a rule with None, or round them without text (method='clip')"
        )
    if any(name.endswith("lora_a") for name in names.held(model)):
        raise NotImplementedError("the model has adapters; merge them first (model.lora.merge)")
