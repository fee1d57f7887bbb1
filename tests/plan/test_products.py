"""Multiply-adds of convolutions, which TPUs make of products, against going through every pair."""

import itertools

from llama4_jax.plan import hlo, products

CONVOLUTION = """HloModule one

ENTRY %main (left: f32[3,{left},5], right: f32[{right},5,7]) -> f32[3,{out},7] {{
  %left = f32[3,{left},5]{{2,1,0}} parameter(0)
  %right = f32[{right},5,7]{{2,1,0}} parameter(1)
  ROOT %product = f32[3,{out},7]{{2,1,0}} convolution(%left, %right), window={{{window}}}, dim_labels=b0f_0io->b0f
}}
"""


def pairs(left, right, out, stride=1, before=0, left_dilation=1, right_dilation=1) -> float:
    """Pairs of a place in the kernel and one in the result that meet a number, as the program's FLOPs have them."""
    window = f"size={right} stride={stride} pad={before}_0 lhs_dilate={left_dilation} rhs_dilate={right_dilation}"
    text = CONVOLUTION.format(left=left, right=right, out=out, window=window)
    computation = hlo.parse(text).computations["main"]
    return products.flops(computation, computation.root) / (2 * 3 * 5 * 7)


def met(left, right, out, stride, before, left_dilation, right_dilation) -> int:
    """The same, pair by pair."""
    numbers = {place * left_dilation for place in range(left)}
    places = itertools.product(range(out), range(right))
    return sum(place * stride + k * right_dilation - before in numbers for place, k in places)


def test_a_convolution_counts_the_pairs_that_meet_a_number():
    sizes = itertools.product((1, 4), (1, 3), (1, 6), (1, 2, 3), (0, 2), (1, 2, 5), (1, 3))
    cases = list(sizes)
    assert [pairs(*case) for case in cases] == [met(*case) for case in cases]


def test_a_kernel_as_long_as_a_row_of_65536_tokens_is_counted_without_going_through_it():
    n = 65_536
    assert pairs(n, n, 2 * n - 1, before=n - 1) == n * n  # each number of one meets each of the other
