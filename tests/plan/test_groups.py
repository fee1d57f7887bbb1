"""Replica groups in all the ways they are written, on a mesh of eight chips numbered by hand."""

import numpy as np
import pytest

from llama4_jax.plan import groups, hlo

MESH = {"data": 2, "fsdp": 2, "tensor": 2}  # chip 5 is data 1, fsdp 0, tensor 1


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor", 2)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data", 2)),
        ("[4,2]<=[8]", ("tensor", 2)),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp", 2)),
        ("[2,4]<=[2,4]", ("fsdp+tensor", 4)),
        ("[2,4]<=[4,2]T(1,0)", ("data+fsdp", 4)),
        ("{}", ("data+fsdp+tensor", 8)),
        ("mesh['axis_0'=8] {'axis_0'}", ("data+fsdp+tensor", 8)),
        ("mesh['a'=2,'b'=4] {'a'}", ("data", 2)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp", 2)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor", 2)),
    ],
)
def test_a_group_names_the_axes_along_which_its_chips_differ(text, wanted):
    (instruction,) = hlo.parse(
        f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, "
        f"replica_groups={text}, use_global_device_ids=true, to_apply=%add\n}}"
    ).computations["main"]
    assert groups.of_groups(instruction, MESH) == wanted


def test_pairs_name_the_axis_they_step_along_and_stay_at_home_where_they_do_not():
    assert groups.of_pairs("{0,1},{1,0},{2,3},{3,2}", MESH) == ("tensor", 2)
    assert groups.of_pairs("{0,2},{2,0},{4,4}", MESH) == ("fsdp", 2)
    assert groups.of_pairs("{0,0},{1,1}", MESH) == ("", 1)


def test_reshaped_and_transposed_numbers_are_read_as_written():
    np.testing.assert_array_equal(groups.read("[2,4]<=[4,2]T(1,0)", 8), [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_a_spelling_that_is_none_of_the_four_is_refused():
    with pytest.raises(ValueError, match="four spellings"):
        groups.read("everybody", 8)
    with pytest.raises(ValueError, match="unequal"):
        groups.read("{{0,1,2},{3,4}}", 8)
