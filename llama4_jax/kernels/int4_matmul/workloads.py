"""Named products with few-bit weights, shared by tests (the small ones) and benchmarks (the layers of Scout)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.quant import QuantSpec
from llama4_jax.core import quantized
from llama4_jax.core.quantized import QuantizedArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One product `x [m k] @ weight [k n]`, or of rows sorted by group with `weight [e k n]`.

    `group_sizes` sum to at most `rows`; None is a product with a single matrix.
    """

    rows: int  # m
    inputs: int  # k
    outputs: int  # n
    spec: QuantSpec = QuantSpec()
    group_sizes: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.group_sizes is not None and sum(self.group_sizes) > self.rows:
            raise ValueError(f"group_sizes={self.group_sizes} sum to more than rows={self.rows}")

    @property
    def experts(self) -> tuple[int, ...]:
        """The weight's leading axis, where it has one."""
        return () if self.group_sizes is None else (len(self.group_sizes),)

    def shapes(self, dtype=jnp.bfloat16) -> tuple:
        """What `arrays` returns as shapes and dtypes alone."""
        return jax.eval_shape(lambda: self._made(jax.random.key(0), dtype))

    def arrays(self, seed: int, dtype=jnp.float32) -> tuple:
        """x, weight and, where there are groups, their sizes: the arguments of `api.matmul` or `api.grouped`."""
        return self._made(jax.random.key(seed), dtype)

    def _made(self, key: jax.Array, dtype) -> tuple[jax.Array | QuantizedArray, ...]:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (self.rows, self.inputs), dtype)
        # One-sided, so that offsets matter, and each output of a size of its own, so that scales do.
        weight = jax.random.normal(keys[1], (*self.experts, self.inputs, self.outputs)) + 0.5
        weight = (weight * jnp.linspace(0.5, 2.0, self.outputs)).astype(dtype)
        weight = quantized.quantize(weight, self.spec, (len(self.experts),))
        if self.group_sizes is None:
            return x, weight
        return x, weight, jnp.asarray(np.array(self.group_sizes), jnp.int32)


INT8 = QuantSpec(values="int8", group=None)
W4A8 = QuantSpec(activations="int8")
OFFSETS = QuantSpec(symmetric=False)

# Rows, inputs and outputs that fill no tile; odd numbers of groups of inputs.
_ODD = Workload(rows=5, inputs=384, outputs=200)
SMALL = {
    "one row": Workload(rows=1, inputs=128, outputs=128),
    "odd groups, ragged outputs": _ODD,
    "offsets": dataclasses.replace(_ODD, spec=OFFSETS),
    "a scale an output": dataclasses.replace(_ODD, rows=40, inputs=640, spec=QuantSpec(group=None)),
    "large groups": dataclasses.replace(_ODD, inputs=512, spec=QuantSpec(group=256)),
    "small groups": dataclasses.replace(_ODD, inputs=192, spec=QuantSpec(group=32)),
    "int8": dataclasses.replace(_ODD, spec=INT8),
    "rounded rows": dataclasses.replace(_ODD, spec=W4A8),
    "rounded rows, offsets": dataclasses.replace(_ODD, spec=QuantSpec(activations="int8", symmetric=False)),
    "rounded rows, small groups": dataclasses.replace(
        _ODD, inputs=192, spec=QuantSpec(group=32, activations="int8", symmetric=False)
    ),
}
_GROUPS = Workload(rows=50, inputs=128, outputs=200, group_sizes=(20, 3, 27))
SMALL_GROUPED = {
    "uneven": _GROUPS,
    "empty groups": Workload(rows=9, inputs=384, outputs=128, group_sizes=(0, 4, 0, 0, 5, 0)),
    "all in the last": dataclasses.replace(_GROUPS, group_sizes=(0, 0, 50)),
    "rows of no group": dataclasses.replace(_GROUPS, group_sizes=(10, 0, 33), spec=OFFSETS),
    "no groups' rows": dataclasses.replace(_GROUPS, group_sizes=(0, 0, 0)),
    "one row": dataclasses.replace(_GROUPS, rows=1, group_sizes=(0, 1, 0), spec=W4A8),
    "one group": Workload(rows=19, inputs=128, outputs=128, group_sizes=(19,), spec=INT8),
}

EMBED, MLP, EXPERTS = 5120, 8192, 16  # Scout's


def layers(rows: int, spec: QuantSpec) -> dict[str, Workload]:
    """The products of one layer of Scout, for `rows` tokens in all."""
    shapes = {
        "query": (EMBED, EMBED),
        "key": (EMBED, 1024),
        "output": (EMBED, EMBED),
        "half of gate_up": (EMBED, MLP),  # what targets are stated for
        "down": (MLP, EMBED),
    }
    return {
        name: Workload(rows=rows, inputs=inputs, outputs=outputs, spec=spec)
        for name, (inputs, outputs) in shapes.items()
    }


def experts(rows: int, spec: QuantSpec) -> Workload:
    """The first product of Scout's routed experts, a choice a token, tokens as even as they may be."""
    sizes = tuple(rows // EXPERTS + (i < rows % EXPERTS) for i in range(EXPERTS))
    return Workload(rows=rows, inputs=EMBED, outputs=2 * MLP, spec=spec, group_sizes=sizes)
