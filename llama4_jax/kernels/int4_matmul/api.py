"""Products of rows with weights in few bits: `QuantizedArray`s of int4, int8 or float8, which kernels read as they lie.

Decoding takes as long as reading the weights takes, so four bits instead of sixteen are worth up to four times the speed,
provided that no float copy of them is ever written to memory.

An implementation is a module with `matmul` and `grouped` of the signatures in `reference`; it joins `IMPLEMENTATIONS`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama4_jax.core import partitioning
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.kernels.int4_matmul import operands, reference, tpu, triton, xla

IMPLEMENTATIONS = {"reference": reference, "xla": xla, "pallas_tpu": tpu, "triton": triton}
KERNELS = {"tpu": "pallas_tpu"}  # by platform

_logger = logging.getLogger(__name__)


def matmul(
    x: jax.Array, weight: QuantizedArray, *, dtype=None, over: Sequence[str] = (), implementation: str | None = None
) -> jax.Array:
    """`x @ weight`: `[m n..]`, summed in float32. Rows are rounded first if `weight.activations` says to what.

    Differentiable in x, in reverse mode; rounding passes the gradient straight through. Weights of integers or float8 are
    constants. While they are trained their values are wider floats (`quant.fake`), and get gradients too.

    Args:
        x: [m k], bfloat16 or float32.
        weight: [k n..], with one axis or more after k.
        dtype: of the result, by default that of x.
        over: mesh axes whose devices hold parts of k, inside `jax.shard_map`: rows are rounded with the scale of the whole row.
        implementation: a name in `IMPLEMENTATIONS`, or None to choose by platform.

    Raises:
        ValueError: for an unknown implementation, or shapes or dtypes that do not belong together.
        NotImplementedError: for what a named implementation cannot do.
    """
    _check(x, weight, leading=0)
    name = _named(implementation, x, weight, 0)
    if x.shape[0] == 0:
        return jnp.zeros((0, *weight.shape[1:]), dtype or x.dtype)
    how = How(name, jnp.dtype(dtype or x.dtype).name, tuple(over))
    with jax.named_scope("int4_matmul"):
        return (how.product if _trained(weight) else functools.partial(_constant_weight, how))(x, weight)


def grouped(
    x: jax.Array,
    weight: QuantizedArray,
    group_sizes: jax.Array,
    *,
    over: Sequence[str] = (),
    implementation: str | None = None,
) -> jax.Array:
    """`out[i] = x[i] @ weight[g]` for each row i of group g: `[m n..]`; rows past the last group give 0.

    As `matmul` for each group, with the conventions of `kernels.grouped_matmul`.

    Args:
        x: [m k], rows sorted by group, bfloat16 or float32.
        weight: [e k n..], with one axis or more after k.
        group_sizes: [e] int32, not negative, with a sum of at most m; may be 0.
        over, implementation: as for `matmul`.
    """
    _check(x, weight, leading=1)
    if group_sizes.shape != weight.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be integers [e={weight.shape[0]}], one for each matrix; got "
            f"{group_sizes.dtype}{list(group_sizes.shape)}; count rows with zeros(e, int32).at[experts].add(1)"
        )
    name = _named(implementation, x, weight, 1)
    if x.shape[0] == 0:
        return jnp.zeros((0, *weight.shape[2:]), x.dtype)
    how = How(name, x.dtype.name, tuple(over))
    with jax.named_scope("int4_grouped"):
        return (how.product if _trained(weight) else functools.partial(_constant_weight, how))(x, weight, group_sizes)


class How(NamedTuple):
    """By which implementation, to a result of which dtype, and over which mesh axes the inputs are divided."""

    name: str
    dtype: str
    over: tuple[str, ...]

    def product(self, x: jax.Array, weight: QuantizedArray, *group_sizes: jax.Array) -> jax.Array:
        implementation = IMPLEMENTATIONS[self.name]
        call = implementation.grouped if group_sizes else implementation.matmul
        return call(x, weight, *group_sizes, dtype=self.dtype, over=self.over)


@functools.cache
def choose(platform: str, limit: str | None) -> str:
    """The implementation for a platform ("cpu", "gpu", "tpu"), logged once for each reason.

    limit: what of the product the kernels cannot do, see `operands.refusal`.
    """
    name, reason = "xla", f"there is no kernel for {platform}"
    if platform in KERNELS:
        name, reason = (KERNELS[platform], "it reads few bits") if limit is None else (name, f"no kernel does {limit}")
    _logger.info("products with few-bit weights on %s run as %r: %s", platform, name, reason)
    return name


def _named(implementation: str | None, x: jax.Array, weight: QuantizedArray, leading: int) -> str:
    if implementation is None:
        limit = operands.refusal(x.dtype, weight, leading)
        return "xla" if _trained(weight) else choose(partitioning.platform(), limit)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {sorted(IMPLEMENTATIONS)}")
    return implementation


def _trained(weight: QuantizedArray) -> bool:
    """Whether the values are of a wide float dtype, as they are while they are trained."""
    return jnp.issubdtype(weight.values.dtype, jnp.floating) and weight.values.dtype.itemsize > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _constant_weight(how: How, x: jax.Array, weight: QuantizedArray, *group_sizes: jax.Array) -> jax.Array:
    return how.product(x, weight, *group_sizes)


def _forward(how, x, weight, *group_sizes):
    nothing = jnp.zeros((0,), x.dtype)  # the dtype of x, and not x: what is linear in x needs no x
    return how.product(x, weight, *group_sizes), (nothing, weight, group_sizes)


def _backward(how, saved, cotangent):
    nothing, weight, group_sizes = saved
    anywhere = jnp.zeros((cotangent.shape[0], weight.shape[len(group_sizes)]), nothing.dtype)
    (d_x,) = jax.vjp(lambda x: how._replace(name="xla").product(x, weight, *group_sizes), anywhere)[1](cotangent)
    return d_x, *[None] * (1 + len(group_sizes))


_constant_weight.defvjp(_forward, _backward)


def _check(x: jax.Array, weight: QuantizedArray, leading: int) -> None:
    wanted = "[e k n..]" if leading else "[k n..]"
    if not isinstance(weight, QuantizedArray):
        raise ValueError(f"wanted a QuantizedArray {wanted}, got {type(weight).__name__}; use a plain product")
    if x.ndim != 2 or weight.ndim < 2 + leading or x.shape[1] != weight.shape[leading]:
        raise ValueError(
            f"wanted x [m k] and weight {wanted}; got x {list(x.shape)} and weight {list(weight.shape)}; "
            "flatten tokens to rows, and check that k agrees"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}; wanted bfloat16 or float32, in which sums of few-bit weights are returned")
