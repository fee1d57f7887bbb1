"""Bytes of HBM of single instructions, on programs whose numbers are known by hand."""

import pytest

from llama4_jax.plan import count, hlo

# A cache of 8 slots of 128 numbers, of which one is written: by a scatter or by a slice's update, alone and in a fusion.
PROGRAM = """HloModule cache

{before}
ENTRY %main (cache: bf16[8,128], index: s32[1], new: bf16[1,128]) -> bf16[8,128] {{
  %cache = bf16[8,128]{{1,0}} parameter(0)
  %index = s32[1]{{0}} parameter(1)
  %new = bf16[1,128]{{1,0}} parameter(2)
  ROOT %written = bf16[8,128]{{1,0}} {root}
}}
"""
FUSED = """%fused (a: bf16[8,128], b: s32[1], c: bf16[1,128]) -> bf16[8,128] {{
  %a = bf16[8,128]{{1,0}} parameter(0)
  %b = s32[1]{{0}} parameter(1)
  %c = bf16[1,128]{{1,0}} parameter(2)
  ROOT %inside = bf16[8,128]{{1,0}} {root}
}}
"""
ALONE = {"scatter": "scatter(%cache, %index, %new)", "update": "dynamic-update-slice(%cache, %new, %index)"}
INSIDE = {"scatter": "scatter(%a, %b, %c)", "update": "dynamic-update-slice(%a, %c, %b)"}
SLOT = 128 * 2


@pytest.mark.parametrize("kind", ALONE)
def test_one_slot_of_a_cache_is_written_in_place_and_the_rest_is_not_touched(kind):
    alone = PROGRAM.format(before="", root=ALONE[kind])
    call = "fusion(%cache, %index, %new), kind=kLoop, calls=%fused"
    fused = PROGRAM.format(before=FUSED.format(root=INSIDE[kind]), root=call)
    read_and_written = [count.count(hlo.parse(text), {"data": 1}).hbm_bytes for text in (alone, fused)]
    assert read_and_written == [2 * SLOT, 2 * SLOT + 4]  # the fusion's four bytes are the index


PASSED_ON = """HloModule product

%inner (x: bf16[8,128]) -> bf16[128,8] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %view = bf16[128,8]{0,1} bitcast(%x)
}

%outer (a: bf16[8,128], b: bf16[8,4]) -> bf16[128,4] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %passed = bf16[128,8]{0,1} fusion(%a), kind=kLoop, calls=%inner
  ROOT %dot = bf16[128,4]{1,0} dot(%passed, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (keys: bf16[8,128], queries: bf16[8,4]) -> bf16[128,4] {
  %keys = bf16[8,128]{1,0} parameter(0)
  %queries = bf16[8,4]{1,0} parameter(1)
  ROOT %scores = bf16[128,4]{1,0} fusion(%keys, %queries), kind=kOutput, calls=%outer
}
"""


def test_what_a_fusion_in_a_fusion_only_passes_on_is_read_where_it_is_used():
    found = count.count(hlo.parse(PASSED_ON), {"data": 1}).hbm_bytes
    assert found == 2 * (8 * 128 + 8 * 4 + 128 * 4)


SLICED = """HloModule slices

ENTRY %main (weights: s4[16,128]) -> s4[4,128] {
  %weights = s4[16,128]{1,0} parameter(0)
  %early = s4[4,128]{1,0} slice(%weights), slice={[0:4], [0:128]}
  %start = (s4[16,128]{1,0}, s4[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%weights), slice={[4:8], [0:128]}
  %done = s4[4,128]{1,0:S(1)} slice-done(%start)
  ROOT %copy = s4[4,128]{1,0} copy(%done)
}
"""


def test_of_what_is_sliced_only_the_slice_is_read_and_on_the_chip_nothing_is_written():
    piece = 4 * 128 / 2
    found = count.count(hlo.parse(SLICED), {"data": 1}).hbm_bytes
    assert found == 2 * piece + piece + piece  # the first is written to HBM, the second by the copy at the end


KERNEL = """HloModule kernel

ENTRY %main (rows: bf16[8,128], weight: s4[16,128,256]) -> bf16[8,256] {{
  %rows = bf16[8,128]{{1,0}} parameter(0)
  %weight = s4[16,128,256]{{2,1,0}} parameter(1)
  ROOT %product = bf16[8,256]{{1,0}} custom-call(%rows, %weight), custom_call_target="tpu_custom_call"{cost}
}}
"""


def test_a_kernel_moves_what_it_says_where_that_is_less_than_its_operands_and_result():
    whole = 2 * 8 * 128 + 16 * 128 * 256 // 2 + 2 * 8 * 256

    def moved(stated):
        cost = f', backend_config={{"cost_estimate":{{"flops":"7","bytes_accessed":"{stated}"}}}}' if stated else ""
        return count.count(hlo.parse(KERNEL.format(cost=cost)), {"data": 1}).hbm_bytes

    assert [moved(None), moved(1000), moved(10**9)] == [whole, 1000, whole]
