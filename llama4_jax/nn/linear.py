"""A linear map between named axes, and the token embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from llama4_jax.core import parameter, partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels import few_rows
from llama4_jax.nn import matrices, products, spread


class Linear(nnx.Module):
    """Contracts the trailing axes of its input with the leading axes of `kernel`, then adds `bias` if there is one.

    `kernel` has shape `inputs + outputs`: [d n h] projects an embedding to heads, [n h d] projects heads back.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        axes: Sequence[str],
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        gain: float = 1.0,
        dtype=jnp.float32,
    ):
        self.num_inputs = len(inputs)
        self.kernel = parameter.kernel(
            rngs, (*inputs, *outputs), axes, fan_in=math.prod(inputs), gain=gain, dtype=dtype
        )
        self.bias = parameter.constant(0.0, outputs, axes[len(inputs) :], dtype=dtype) if bias else None

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        """The result is of `dtype`, by default that of x."""
        mesh = spread.mesh_of(self.kernel)
        if mesh is not None:
            (y,) = spread.products(mesh, x, [self.kernel], self.num_inputs)
        else:
            y = products.dense(x, self.kernel[...], self.num_inputs, dtype)
        return self.completed(y, x, dtype)

    def completed(self, y: jax.Array, x: jax.Array, dtype=None) -> jax.Array:
        """The result for x, of which y is the product with `kernel`."""
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(dtype or x.dtype)


def together(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """`linear(x)` of each. On a mesh their gradients in x are added up before devices exchange them, and then once."""
    mesh = spread.mesh_of(linears[0].kernel) if all(type(linear) is Linear for linear in linears) else None
    if mesh is None:
        return [linear(x) for linear in linears]
    products = spread.products(mesh, x, [linear.kernel for linear in linears], linears[0].num_inputs)
    return [linear.completed(product, x) for linear, product in zip(linears, products)]


class MatrixLinear(nnx.Module):
    """A `Linear` for decoding, its kernel a matrix; see `matrices`."""

    def __init__(self, linear: Linear):
        self.num_inputs = linear.num_inputs
        self.kernel, self.outputs = matrices.lay_out(linear.kernel, linear.num_inputs)
        self.bias = linear.bias

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        dtype = dtype or x.dtype
        y = matrices.multiply(x, self.kernel, self.outputs, self.num_inputs, dtype)
        return (y if self.bias is None else y + self.bias[...]).astype(dtype)


class TransposedLinear(nnx.Module):
    """One `Linear`, or several side by side along their first output axis, held as one matrix [outputs inputs].

    For decoding on a CPU, see `kernels.few_rows`, which also says how matrices of few bits are packed. Several must be `alike`.
    """

    def __init__(self, *linears: Linear):
        split = linears[0].num_inputs
        kernels = [linear.kernel[...] for linear in linears]
        self.inputs, (_, *rest) = kernels[0].shape[:split], kernels[0].shape[split:]
        self.outputs = (sum(kernel.shape[split] for kernel in kernels), *rest)
        self.activations = products.activations(kernels[0])
        if few_rows.can_pack(kernels[0]):
            matrix = few_rows.join([few_rows.pack(kernel, split) for kernel in kernels])
        else:
            kernel = jnp.concatenate([products.floats(kernel, kernel.dtype) for kernel in kernels], axis=split)
            matrix = kernel.reshape(math.prod(self.inputs), -1).T
        self.kernel = nnx.Param(matrix)
        biases = [linear.bias[...] for linear in linears if linear.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases)) if biases else None

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        leading = x.shape[: x.ndim - len(self.inputs)]
        y = few_rows.multiply(x.reshape(-1, math.prod(self.inputs)), self.kernel[...], self.activations)
        y = y.reshape(*leading, *self.outputs)
        y = y if self.bias is None else y + self.bias[...]
        return y.astype(dtype or x.dtype)


def alike(*linears: Linear) -> bool:
    """Whether their weights can be one matrix: floats all, or few bits of one kind, with scales for the same groups."""

    def form(linear: Linear):
        weight, split = linear.kernel[...], linear.num_inputs
        groups = weight.scales.shape[:split] if few_rows.can_pack(weight) else None
        kind = (weight.values.dtype, weight.offsets is None) if few_rows.can_pack(weight) else None
        return products.activations(weight), kind, groups

    return len({form(linear) for linear in linears}) == 1


class Embedding(nnx.Module):
    """A table with one row of width d for each of v tokens."""

    def __init__(self, vocab_size: int, embed_dim: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.table = parameter.kernel(rngs, (vocab_size, embed_dim), ("vocab", "embed"), fan_in=embed_dim, dtype=dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The rows of tokens [b t]: [b t d]."""
        mesh = partitioning.mesh_in_use()
        if mesh is None or tokens.shape[1] == 1:  # a token a row, as in decoding, is not worth an exchange
            return _rows(self.table[...], tokens)
        try:
            places = partitioning.spec(partitioning.BATCH_AXES, tokens.shape, partitioning.placement_in_use(), mesh)
        except ValueError:  # prompts of any size
            return _rows(self.table[...], tokens)
        return _look_up(products.floats(self.table[...], self.table.dtype), tokens, places, mesh)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits [.. v], float32 at least, of x [.. d]: products with every row."""
        table, rows = self.table[...], x.reshape(-1, x.shape[-1])
        if isinstance(table, QuantizedArray):
            return products.dense(x, jax.tree.map(jnp.transpose, table), dtype=jnp.float32)
        return few_rows.multiply(rows, table, products.activations(table)).reshape(*x.shape[:-1], -1)


def packed(embedding: Embedding) -> Embedding:
    """The same with a table of few bits laid out for decoding on a CPU; itself if it is of floats."""
    table = embedding.table[...]
    if not few_rows.can_pack(table):
        return embedding
    rows = few_rows.pack(jax.tree.map(jnp.transpose, table), 1)
    return jax.tree.map(lambda p: p.replace(rows), embedding, is_leaf=lambda node: isinstance(node, nnx.Param))


def _rows(table: jax.Array | QuantizedArray | few_rows.Packed, tokens: jax.Array) -> jax.Array:
    """The rows of a table [v d]; of few bits no others become floats."""
    if isinstance(table, few_rows.Packed):
        return table[tokens].unpack().astype(table.dtype)
    if isinstance(table, QuantizedArray) and table.scales.shape[0] == table.shape[0]:
        return jax.tree.map(lambda part: part[tokens], table).dequantize()
    return table[tokens]


def _look_up(table: jax.Array, tokens: jax.Array, places: PartitionSpec, mesh: AbstractMesh) -> jax.Array:
    """`table[tokens]`, for a table split over columns by the devices that split the tokens, of which it never moves a row.

    Token ids travel instead: each device looks up its own columns for all, and an all-to-all turns columns of all tokens
    into all columns of its own.
    """
    split = partitioning.spec(("vocab", "embed"), table.shape, partitioning.TRAIN, mesh)
    (rows,), columns = partitioning.TRAIN.table["vocab"], partitioning.TRAIN.table["embed"]

    def local(table, tokens):
        ids = lax.all_gather(tokens.reshape(-1), columns, tiled=True) - lax.axis_index(rows) * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        found = jnp.where(here[:, None], table[jnp.where(here, ids, 0)], 0)  # [all tokens, own columns]
        found = lax.all_to_all(found, columns, split_axis=0, concat_axis=1, tiled=True)
        return found.reshape(1, *tokens.shape, -1)

    # What the parts of the vocabulary find is added up outside, where the sum's gradient is a copy and not a sum; in its own
    # dtype, for only one has found anything.
    found = PartitionSpec(rows, *places, None)
    call = jax.shard_map(local, mesh=mesh, in_specs=(split, places), out_specs=found, check_vma=False)
    return lax.reduce_sum(call(table, tokens), axes=(0,))
