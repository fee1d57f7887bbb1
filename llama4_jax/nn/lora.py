"""Low-rank adapters: a frozen kernel W and a trained product beside it, x W + scale (x A) B.

A starts random and B at zero, so that a new adapter changes nothing. Modules with adapters are subclasses of the plain
ones: every name of a parameter stays, and the adapter of parameter P is P_delta.lora_a and P_delta.lora_b.

Source: Hu et al. 2021, arXiv:2106.09685. PEFT's `LoraConfig` draws A from a uniform distribution of the same order;
here it is the truncated normal of every other kernel.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config.lora import LoraConfig
from llama4_jax.core import parameter
from llama4_jax.kernels.grouped_matmul import grouped_matmul
from llama4_jax.nn import products
from llama4_jax.nn.linear import Linear
from llama4_jax.nn.mlp import swiglu
from llama4_jax.nn.moe import Experts


@dataclasses.dataclass(frozen=True)
class Form:
    """The axes of a kernel and of its two factors, as letters; r is the rank.

    Invariant: a has the kernel's inputs, b its outputs; a letter in both, besides r, has a factor for each index.
    """

    kernel: str
    a: str
    b: str

    @property
    def inputs(self) -> str:
        return "".join(letter for letter in self.a if letter not in self.b)

    @property
    def low(self) -> str:
        """What is left of a row between the factors."""
        return "".join(letter for letter in self.a if letter in self.b)

    @property
    def outputs(self) -> str:
        return "".join(letter for letter in self.b if letter != "r")


# By the end of a parameter's name. Gate and up have factors of their own in a `Linear`, because they are two linear
# layers to others; in `Experts` they share theirs, because they are one parameter to others (see `checkpoint.peft`).
FORMS = {
    "attention.query.kernel": Form("dnh", "dr", "rnh"),
    "attention.key.kernel": Form("dkh", "dr", "rkh"),
    "attention.value.kernel": Form("dkh", "dr", "rkh"),
    "attention.output.kernel": Form("nhd", "nhr", "rd"),
    "experts.gate_up": Form("edgf", "edr", "ergf"),
    "experts.down": Form("efd", "efr", "erd"),
    "gate_up.kernel": Form("dgf", "dgr", "grf"),
    "down.kernel": Form("fd", "fr", "rd"),
}


def form_of(name: str) -> Form | None:
    """The form of the parameter with this dotted name; None if it has no adapters (all outside the decoder)."""
    if not name.startswith("decoder."):
        return None
    return next((form for end, form in FORMS.items() if name.endswith("." + end)), None)


class LowRank(nnx.Module):
    """The factors of one kernel's change, in float32: what a step moves may be less than bfloat16 resolves.

    `lora_a` and `lora_b` have the axes that `form` says, after a leading axis of layers where the kernel is stacked.
    """

    def __init__(self, kernel: nnx.Param, form: Form, config: LoraConfig, *, rngs: nnx.Rngs):
        self.form, self.config = form, config
        stacked = kernel.ndim - len(form.kernel)
        sizes = dict(zip(form.kernel, kernel.shape[stacked:])) | {"r": config.rank}
        named = dict(zip(form.kernel, kernel.axes[-len(form.kernel) :])) | {"r": "rank"}
        shapes = [(*kernel.shape[:stacked], *(sizes[letter] for letter in letters)) for letters in (form.a, form.b)]
        axes = [("layers",) * stacked + tuple(named[letter] for letter in letters) for letters in (form.a, form.b)]
        fan_in = math.prod(sizes[letter] for letter in form.inputs)
        self.lora_a = parameter.kernel(rngs, shapes[0], axes[0], fan_in=fan_in)
        self.lora_b = parameter.constant(0.0, shapes[1], axes[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """What is added to x [.. inputs] times the kernel: [.. outputs] float32, from products in x's dtype."""
        form, wide = self.form, jnp.float32
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        low = jnp.einsum(f"...{form.inputs},{form.a}->...{form.low}", x, a, preferred_element_type=wide)
        low = (self.config.scale * low).astype(x.dtype)
        return jnp.einsum(f"...{form.low},{form.b}->...{form.outputs}", low, b, preferred_element_type=wide)

    def grouped(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """The same for rows [m inputs] sorted by expert, in their dtype; the cost follows the number of rows."""
        low = grouped_matmul(rows, self.lora_a[...].astype(rows.dtype), group_sizes)  # [m r]
        return grouped_matmul(self.config.scale * low, self.lora_b[...].astype(rows.dtype), group_sizes)

    def matrix(self) -> jax.Array:
        """The change of the whole kernel, [kernel] or [layers kernel], in float32."""
        form = self.form
        # Without "highest" an accelerator would multiply float32 in fewer bits.
        product = jnp.einsum(
            f"...{form.a},...{form.b}->...{form.kernel}",
            self.lora_a[...].astype(jnp.float32),
            self.lora_b[...].astype(jnp.float32),
            precision="highest",
        )
        return self.config.scale * product


class LoraLinear(Linear):
    """A `Linear` with an adapter."""

    def __init__(self, base: Linear, delta: LowRank):
        self.num_inputs, self.kernel, self.bias = base.num_inputs, base.kernel, base.bias
        self.kernel_delta = delta

    def completed(self, y: jax.Array, x: jax.Array, dtype=None) -> jax.Array:
        y = super().completed(y, x, jnp.float32) + self.kernel_delta(x)
        return y.astype(dtype or x.dtype)


class LoraExperts(Experts):
    """`Experts` with an adapter for `gate_up`, for `down`, or for both; None for one that has none."""

    def __init__(self, base: Experts, gate_up_delta: LowRank | None, down_delta: LowRank | None):
        self.gate_up, self.down = base.gate_up, base.down
        self.gate_up_delta, self.down_delta = gate_up_delta, down_delta

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        hidden = swiglu(_product(rows, self.gate_up, self.gate_up_delta, group_sizes))  # [m 2 f] to [m f]
        return _product(hidden, self.down, self.down_delta, group_sizes)


def _product(rows: jax.Array, kernel: nnx.Param, delta: LowRank | None, group_sizes: jax.Array) -> jax.Array:
    out = products.grouped(rows, kernel, group_sizes)
    return out if delta is None else out + delta.grouped(rows, group_sizes)
