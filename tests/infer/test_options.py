"""Options for the compiler of decoding: one that it does not know costs speed, and says so, but no answer."""

import logging

import pytest

from llama4_jax.infer import options


@pytest.fixture(autouse=True)
def asked_anew():
    options.known.cache_clear()
    yield
    options.known.cache_clear()


def test_an_option_that_the_compiler_does_not_know_is_left_out_with_a_word(monkeypatch, caplog):
    monkeypatch.setitem(options.DECODING, "cpu", {"xla_of_another_version": "1.0"})
    with caplog.at_level(logging.WARNING):
        assert options.known("cpu") is None
        assert options.known("cpu") is None
    assert [record.message for record in caplog.records if "xla_of_another_version" in record.message] == [
        caplog.messages[0]
    ]


def test_an_option_that_it_knows_is_kept(monkeypatch):
    monkeypatch.setitem(options.DECODING, "cpu", {"xla_embed_ir_in_executable": True})
    assert options.known("cpu") == {"xla_embed_ir_in_executable": True}
    assert options.known("gpu") is None
