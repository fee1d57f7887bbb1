"""Multiply-adds of the two instructions that run in matrix units: products, and the convolutions that TPUs make of them.

Source: the rules of XLA's `HloCostAnalysis`.
"""

from __future__ import annotations

import math
import re

import numpy as np

from llama4_jax.plan.hlo import Computation, Instruction


def flops(computation: Computation, product: Instruction) -> float:
    """2 for each multiply-add of an instruction that `is_product`; of a ragged one over all rows of its buffer."""
    kinds = {"dot": dot_flops, "convolution": convolution_flops, "custom-call": ragged_flops}
    return kinds[product.opcode](computation, product)


def is_product(instruction: Instruction) -> bool:
    return instruction.opcode in ("dot", "convolution") or (
        instruction.opcode == "custom-call" and re.match(r"ragged-dot-(?!metadata)|tgmm", instruction.name) is not None
    )


def is_ragged(instruction: Instruction) -> bool:
    """Whether this is a product of `jax.lax.ragged_dot`, whose last rows may belong to no group and cost nothing."""
    return re.search(r"ragged[-_]dot", instruction.scope) is not None


def ragged_flops(computation: Computation, call: Instruction) -> float:
    """Of kernels over groups of rows: rows [m k] by matrices [e k n], or, summed over rows (`tgmm`), [m k] by [m n]."""
    left, _ = (operand.shape[0].sizes for operand in computation.operands(call) if len(operand.shape[0].sizes) > 1)
    out = call.shape[0].sizes
    return 2.0 * left[0] * math.prod(out[1:]) if len(out) == 3 else 2.0 * math.prod(out) * left[1]


def dot_flops(computation: Computation, dot: Instruction) -> float:
    """2 for each multiply-add: the result's size times that of the axes that are summed over."""
    left = computation.operands(dot)[0].shape[0].sizes
    return 2.0 * dot.shape[0].size * math.prod(left[axis] for axis in dot.integers("lhs_contracting_dims"))


def convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """2 for each multiply-add that falls on a number and not on padding or between dilated ones.

    A ragged product is a convolution over all pairs of rows and groups, of which a mask leaves each row its own group: the
    pairs are divided by the groups.
    """
    left, right = (operand.shape[0].sizes for operand in computation.operands(convolution))
    labels = re.match(r"(\w+)_(\w+)->(\w+)", convolution.attribute("dim_labels"))
    ins, kernels, outs = labels.groups()
    window = _window(convolution.attribute("window") or "")
    spatial = [label for label in outs if label.isdigit()]
    pairs = 1.0
    for position, label in enumerate(spatial):
        sizes = left[ins.index(label)], right[kernels.index(label)], convolution.shape[0].sizes[outs.index(label)]
        pairs *= _valid_pairs(*sizes, **{name: values[position] for name, values in window.items()})
    rest = [convolution.shape[0].sizes[outs.index(label)] for label in "bf"]
    flops = 2.0 * pairs * math.prod(rest) * right[kernels.index("i")] / _batch_groups(convolution)
    if is_ragged(convolution) and spatial:
        flops /= convolution.shape[0].sizes[outs.index(spatial[0])]
    return flops


def _batch_groups(convolution: Instruction) -> int:
    return (convolution.integers("batch_group_count") or (1,))[0]


def _window(text: str) -> dict[str, list]:
    """The fields of a window such as `size=4x3 stride=3x1 pad=0_0x1_1 lhs_dilate=4x1`, by spatial axis."""
    fields = dict(part.split("=") for part in text.split())
    names = {"stride": "stride", "lhs_dilate": "left_dilation", "rhs_dilate": "right_dilation"}
    window = {names[name]: [int(n) for n in fields[name].split("x")] for name in names if name in fields}
    if "pad" in fields:
        window["padding"] = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")]
    return window


def _valid_pairs(left, right, out, stride=1, padding=0, left_dilation=1, right_dilation=1) -> int:
    """Pairs (place in the kernel, place in the result) along one axis that meet a number of the left operand.

    They meet position `place * stride + offset` of the dilated operand, which has a number at multiples of its dilation.
    """
    offsets = np.arange(right) * right_dilation - padding
    end = (left - 1) * left_dilation + 1
    low = np.maximum(-(offsets // stride), 0)  # the first place at or after position 0
    high = np.minimum((end - 1 - offsets) // stride, out - 1)
    common = math.gcd(stride, left_dilation)
    period = left_dilation // common  # a number is met every so many places, or never
    first = (-offsets // common) * pow(stride // common, -1, period) % period
    met = np.where(offsets % common == 0, (high - first) // period - (low - 1 - first) // period, 0)
    return int(np.where(high >= low, met, 0).sum())
