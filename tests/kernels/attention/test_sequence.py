"""A whole sequence to itself: its runs, its chunks as rows, and which kernel it is given to."""

import collections
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from llama4_jax.config.train import REMAT
from llama4_jax.kernels.attention import chunks, cudnn, mask, runs, sequence, splash, triton, workloads
from llama4_jax.kernels.attention.sequence import Rows

LONG, LONG_KEYS = (1, 2048, 8, 64), (1, 2048, 2, 64)


def test_a_run_is_a_chunk_of_a_document_and_padding_has_none():
    positions = jnp.array([[-1, -1, 0, 1, 2, 3, 4, 0, 1, -1]])
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 0]])
    chunked, whole = (runs.number(positions, segments, chunk_size) for chunk_size in (2, None))
    np.testing.assert_array_equal(chunked != 0, segments != 0)
    first = [0, 0, 1, 1, 2, 2, 3, 4, 4, 0]
    np.testing.assert_array_equal(np.unique(chunked, return_inverse=True)[1].ravel(), first)
    np.testing.assert_array_equal(np.unique(whole, return_inverse=True)[1].ravel(), [0, 0, 1, 1, 1, 1, 1, 2, 2, 0])


@pytest.mark.parametrize("name", ["packed", "packed_global", "left_padded", "several_blocks", "chunk_divides_no_block"])
def test_runs_and_places_say_what_the_mask_says(name):
    workload = (workloads.SMALL | workloads.SEQUENCES)[name]
    tokens = {k: jnp.asarray(v) for k, v in workload.tokens().items()}
    numbers = runs.number(tokens["query_positions"], tokens["query_segments"], workload.chunk_size)
    place = np.arange(workload.query_length)
    seen = (numbers[:, :, None] == numbers[:, None, :]) & (numbers != 0)[:, :, None] & (place[:, None] >= place)
    np.testing.assert_array_equal(seen, mask.visible(*tokens.values(), workload.chunk_size))


def test_an_early_and_a_late_piece_of_whole_chunks_are_a_sequence_too():
    """What a device holds in zig-zag order; one document, and padding at the end of the late piece."""
    positions = jnp.array([[*range(8), *range(24, 30), -1, -1]])
    segments = jnp.where(positions >= 0, 1, 0)
    numbers = runs.number(positions, segments, 4)[0]
    place = np.arange(16)
    seen = (numbers[:, None] == numbers) & (numbers != 0) & (place[:, None] >= place)
    np.testing.assert_array_equal(seen, mask.visible(positions, positions, segments, segments, 4)[0])


def test_a_row_cut_into_chunks_is_filled_with_padding_and_joined_again():
    def attend(query, key, value, *, segments, chunk_size):
        assert query.shape == (6, 4, 1, 1) and segments.shape == (6, 4) and chunk_size == 4
        return jnp.where((segments != 0)[..., None, None], query + 0 * key + value, -1)

    array = jnp.arange(20.0).reshape(2, 10, 1, 1)
    out = chunks.apart(attend)(array, array, array, segments=jnp.ones((2, 10), jnp.int32), chunk_size=4)
    np.testing.assert_array_equal(out, 2 * array)


def test_each_platform_has_its_kernel_and_few_scores_have_none():
    assert sequence.choose("cpu", LONG, LONG_KEYS, jnp.float32) == "blockwise"
    assert sequence.choose("tpu", LONG, LONG_KEYS, jnp.float32) == "splash"
    assert sequence.choose("gpu", LONG, LONG_KEYS, jnp.bfloat16) == "triton"
    assert sequence.choose("gpu", LONG, LONG_KEYS, jnp.bfloat16, Rows.PLAIN) == "cudnn"
    assert sequence.choose("gpu", LONG, LONG_KEYS, jnp.float32, Rows.PLAIN) == "triton"
    assert sequence.choose("tpu", (1, 64, 8, 64), (1, 64, 2, 64), jnp.float32) == "reference"
    assert sequence.choose("tpu", LONG, LONG_KEYS, jnp.float16) == "blockwise"


def test_choice_and_what_was_refused_are_logged_once(caplog):
    shapes = (1, 1999, 8, 64), (1, 1999, 2, 64)
    with caplog.at_level(logging.INFO, logger=sequence.__name__):
        for _ in range(3):
            sequence.choose("gpu", *shapes, jnp.dtype("bfloat16"))
            sequence.choose("tpu", *shapes, jnp.dtype("float16"))
    call = "8 x 1999 x 1999 (batch and heads, queries, keys): scores are more than 262144"
    assert [record.getMessage() for record in caplog.records] == [
        f"attention uses triton for {call}, and cudnn does not do rows that may be packed or padded, on a gpu",
        f"attention uses blockwise for {call}, and splash does not do float16, only bfloat16 and float32",
    ]


@pytest.mark.parametrize(
    "kernel, shape, key_shape, dtype, message",
    [
        (splash, (1, 8, 2, 8), (1, 9, 2, 8), "float32", "8 queries to 9 keys, only a sequence to itself"),
        (splash, (1, 8, 2, 8), (1, 8, 2, 8), "float16", "float16, only bfloat16 and float32"),
        (splash, (1, 40_000, 1, 8), (1, 40_000, 1, 8), "float32", "length=40000, at most 32768 on a device"),
        (triton, (1, 8, 2, 512), (1, 8, 2, 512), "float32", "head_dim=512, at most 256"),
        (cudnn, (1, 8, 2, 12), (1, 8, 2, 12), "bfloat16", "head_dim=12, only multiples of 8 up to 128"),
        (cudnn, (1, 8, 2, 8), (1, 8, 2, 8), "float32", "float32, only bfloat16 and float16"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_by_name(kernel, shape, key_shape, dtype, message):
    key = jnp.zeros(key_shape, dtype)
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    tokens = dict.fromkeys(names, jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(NotImplementedError, match=message):
        kernel.attend(jnp.zeros(shape, dtype), key, key, **tokens, chunk_size=None)


def test_rows_longer_than_a_chunk_are_not_for_cudnn_uncut():
    array, tokens = jnp.zeros((1, 8, 2, 8), jnp.bfloat16), jnp.zeros((1, 8), jnp.int32)
    names = ("query_positions", "key_positions", "query_segments", "key_segments")
    with pytest.raises(NotImplementedError, match=r"rows of 8 tokens in chunks of 4; cut them with chunks\.apart"):
        cudnn.attend(array, array, array, **dict.fromkeys(names, tokens), chunk_size=4)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_what_padding_is_given_goes_nowhere(kernel):
    """Rows and columns of padding: zeros out, zero gradients in, whatever its keys and values are."""
    attend = {"splash": splash.attend, "triton": triton.attend}[kernel]
    workload = workloads.SMALL["left_padded"]
    arrays, tokens = workload.arrays(), {k: jnp.asarray(v) for k, v in workload.tokens().items()}
    padded = np.asarray(tokens["query_segments"] == 0)
    loud = {k: jnp.where(padded[..., None, None], 1e4, v) for k, v in arrays.items()}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def output_and_gradients(arrays):
        call = functools.partial(attend, **tokens, chunk_size=workload.chunk_size, interpret=True)
        out, pullback = jax.vjp(lambda arrays: call(**arrays), arrays)
        return out, *pullback(jnp.ones_like(out))[0].values()

    for got, quiet in zip(output_and_gradients(loud), output_and_gradients(arrays)):
        np.testing.assert_array_equal(got, quiet)
        assert np.asarray(got).any() and not np.asarray(got)[padded].any()


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_rematerialisation_may_keep_the_output_and_its_log_sum_exp(kernel, capsys):
    """By the name that the policy "attention" of config.train.REMAT has for them."""
    attend = {"splash": splash.attend, "triton": triton.attend}[kernel]
    workload = workloads.SMALL["packed"]
    tokens = {k: jnp.asarray(v) for k, v in workload.tokens().items()}
    call = functools.partial(attend, **tokens, chunk_size=workload.chunk_size, interpret=True)
    kept = {}
    for name in ("attention", "block"):
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[name])
        print_saved_residuals(jax.checkpoint(call, policy=policy), *workload.arrays().values())
        kept[name] = collections.Counter(line.split()[0] for line in capsys.readouterr().out.splitlines())
    more = {"splash": ["f32[2,4,128,8]", "f32[2,4,128]"], "triton": ["f32[2,64,4,16]", "f32[2,4,64]"]}[kernel]  # filled
    assert kept["attention"] - kept["block"] == collections.Counter(more)
