"""Where the pieces of a row lie, what chunked layers pass on between them, and what a batch must promise for less."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.core import partitioning
from llama4_jax.core.partitioning import LONG, TRAIN, TimeOrder
from llama4_jax.kernels.attention import Layout, lay_out, neighbours, ring
from llama4_jax.kernels.attention.blocks import Blocking
from llama4_jax.kernels.attention.layout import Exchange, Send


def mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in partitioning.MESH_AXES)
    return AbstractMesh(shape, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


ZIGZAG = Layout(devices=3, order=TimeOrder.ZIGZAG)


def batch(documents, length=16):
    """One row of documents of these lengths, then padding."""
    positions = np.concatenate([*map(np.arange, documents), np.zeros(length - sum(documents), int)])
    segments = np.repeat([*range(1, len(documents) + 1), 0], [*documents, length - sum(documents)])
    return {"tokens": np.arange(length)[None], "positions": positions[None], "segments": segments[None]}


def test_a_device_holds_one_piece_or_an_early_and_a_late_one():
    assert [Layout(devices=3).holder(piece) for piece in range(3)] == [(0, 0), (1, 0), (2, 0)]
    assert [ZIGZAG.holder(piece) for piece in range(6)] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]


def test_tokens_go_to_their_places_and_back():
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(ZIGZAG.place(tokens), tokens[:, ring.order(12, 3)])
    np.testing.assert_array_equal(ZIGZAG.row(ZIGZAG.place(tokens)), tokens)
    assert Layout(devices=3).place(tokens) is tokens


def test_each_piece_gets_the_end_of_the_one_before_and_the_first_gets_nothing():
    assert Layout(devices=3).exchanges(8, 5) == [Exchange(4, (Send(0, ((0, 1), (1, 2))),))]


def test_in_zigzag_order_late_pieces_get_theirs_from_the_next_device():
    """Piece 3 follows piece 2 on one device, which needs no exchange for it."""
    early, late = (Send(0, ((0, 1), (1, 2))),), (Send(1, ((2, 1), (1, 0))),)
    assert ZIGZAG.exchanges(8, 5) == [Exchange(4, early), Exchange(4, late)]


def test_a_chunk_longer_than_a_piece_comes_from_several():
    found = Layout(devices=4).exchanges(4, 10)  # 9 tokens before: two pieces and a token
    assert [each.tokens for each in found] == [4, 4, 1]
    assert [each.sends[0].pairs for each in found] == [((0, 1), (1, 2), (2, 3)), ((0, 2), (1, 3)), ((0, 3),)]


def test_aligned_documents_need_nothing_for_whole_chunks_and_else_only_the_pieces_of_their_chunk():
    for layout in (Layout(devices=4), Layout(devices=4, order=TimeOrder.ZIGZAG)):
        assert not dataclasses.replace(layout, aligned=True).exchanges(8, 4)
        assert layout.exchanges(8, 4)
    # Pieces 0 and 1 share a chunk, and so do 2 and 3.
    (shared,) = Layout(devices=4, aligned=True).exchanges(8, 16)
    assert shared.sends == (Send(0, ((0, 1), (2, 3))),)


def test_a_batch_is_laid_out_by_the_devices_that_share_its_rows():
    images = np.zeros((1, 16, 16, 3))
    laid_out = lay_out(batch([16]) | {"images": images}, LONG, mesh(expert=2, context=2))
    assert laid_out["tokens"].tolist() == [[0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]]
    assert laid_out["positions"].tolist() == laid_out["tokens"].tolist()
    assert laid_out["images"] is images
    for placement, where in ((TRAIN, mesh(context=4)), (LONG, mesh(data=4))):
        assert lay_out(batch([16]), placement, where)["tokens"].tolist() == [[*range(16)]]


def test_microbatches_are_laid_out_alike():
    stacked = {name: np.stack([array, array]) for name, array in batch([16]).items()}
    laid_out = lay_out(stacked, LONG, mesh(context=2))
    assert laid_out["tokens"].tolist() == [[[0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]]] * 2


def test_zigzag_order_wants_positions_and_a_length_that_can_be_cut():
    tokens = {"tokens": np.ones((1, 16), int)}
    with pytest.raises(ValueError, match="zigzag order over 2 devices, so positions cannot be counted; give positions"):
        lay_out(tokens, LONG, mesh(context=2))
    with pytest.raises(ValueError, match="length=16 does not cut into 2 . 3 equal pieces; pad it to 18"):
        lay_out(batch([16]), LONG, mesh(context=3))


@pytest.mark.parametrize("documents", [[16], [7, 9], [3, 3, 8]], ids=str)
def test_a_batch_is_laid_out_once(documents):
    once = lay_out(batch(documents), LONG, mesh(context=2))
    with pytest.raises(ValueError, match="row 0 holds a document in parts or out of order; lay_out wants tokens"):
        lay_out(once, LONG, mesh(context=2))


ALIGNED = dataclasses.replace(TRAIN, aligned=True)


@pytest.mark.parametrize("documents", [[16], [4, 2, 2, 8], [8, 1, 2], [3, 1, 9, 2]], ids=str)
def test_documents_that_start_with_a_chunk_or_fit_into_one_keep_the_promise(documents):
    lay_out(batch(documents), ALIGNED, mesh(context=2), chunk_size=4)


def test_a_chunk_that_crosses_a_border_is_named():
    with pytest.raises(ValueError, match="a chunk of 4 positions crosses token 12 of row 0, but"):
        lay_out(batch([4, 7, 5]), ALIGNED, mesh(context=2), chunk_size=4)
    assert lay_out(batch([4, 7, 5]), ALIGNED, mesh(data=2))  # whole rows need no promise


def test_a_promise_cannot_be_checked_without_the_chunk_size():
    with pytest.raises(ValueError, match="placement 'train' promises aligned documents; give chunk_size"):
        lay_out(batch([16]), ALIGNED, mesh(context=2))


def test_work_of_a_chunked_layer_is_that_of_its_chunks():
    """Blocks of 4 tokens, chunks of 16: a triangle of 4 * 5 / 2 pairs each; half of one is left of a shorter piece."""
    blocking = Blocking(queries=4, keys=4, chunk_size=16)
    for layout in (Layout(devices=4, aligned=True), Layout(devices=2, order=TimeOrder.ZIGZAG, aligned=True)):
        rows = [layout.place(array) for array in (np.arange(64)[None], np.ones((1, 64), int))]
        assert neighbours.work(*rows, layout, blocking).tolist() == [40 // layout.devices] * layout.devices
    # Pieces of 8: the second of a chunk meets its own 3 pairs and 4 with the first, of which it has the last 7 tokens
    # in 2 blocks.
    layout = Layout(devices=8, aligned=True)
    rows = [np.arange(64)[None], np.ones((1, 64), int)]
    assert neighbours.work(*rows, layout, blocking).tolist() == [3, 7] * 4
