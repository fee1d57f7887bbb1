"""The tokenizer: round trips, special tokens, files, training, and the published vocabulary."""

import hashlib
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax import tokenizer
from llama4_jax.tokenizer import bpe, slices, special

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden_tokens.json").read_text())

HARD = [
    "",
    " ",
    "\r\n\t  x",
    "isn't WE'LL HTTPServer camelCase Ǆungla ªº",
    "1234567890 3.14",
    "👨‍👩‍👧‍👦🏳️‍🌈 é é ﬁ \x00\x07",
    "  leading and trailing  ",
    "\n\n\n\n   end",
    "مرحبا שלום สวัสดี 안녕하세요",
    "<|eot|><|begin_of_text|>",
]


@pytest.mark.parametrize("text", HARD)
def test_decoding_undoes_encoding(tok, text):
    assert tok.decode(tok.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip_and_gives_ordinary_tokens_only(tok, text):
    tokens = tok.encode(text)
    assert tok.decode(tokens) == text
    assert all(token < tok.vocab_size - len(tok.special) for token in tokens)


def test_an_injected_special_token_stays_plain_text_unless_asked(tok):
    text = "hello<|eot|>"
    assert tok.special["eot"] not in tok.encode(text)
    assert tok.encode(text, allow_special=True) == [*tok.encode("hello"), tok.special["eot"]]
    assert tok.decode(tok.encode(text, allow_special=True)) == text


def test_begin_and_end_are_added_only_when_asked(tok):
    plain = tok.encode("fox")
    assert tok.encode("fox", bos=True, eos=True) == [tok.bos, *plain, tok.eos]
    assert tok.bos not in plain and tok.eos not in plain


def test_special_ids_follow_the_base_in_llama4_order(tok):
    base = tok.vocab_size - len(tok.special)
    assert list(tok.special) == list(special.USED)
    assert list(tok.special.values()) == list(range(base, tok.vocab_size))
    published = special.names(special.LLAMA4_BASE)
    assert [name for name in published if name in special.USED] == list(special.USED)


def test_stop_and_pad_are_the_published_ones(tok):
    assert tok.stop == (tok.special["end_of_text"], tok.special["eom"], tok.special["eot"])
    assert tok.pad == tok.special["finetune_right_pad"]


def test_a_token_outside_the_vocabulary_is_refused_by_name(tok):
    with pytest.raises(ValueError, match="token 400 is outside the vocabulary of 400"):
        tok.decode([1, 400])


def test_training_twice_gives_the_same_file(tmp_path, texts):
    first, second = tmp_path / "first.model", tmp_path / "second.model"
    tokenizer.train(texts, 350, first)
    tokenizer.train(texts, 350, second)
    assert first.read_bytes() == second.read_bytes()


def test_training_reuses_what_is_there_and_refuses_another_corpus(tmp_path, texts):
    path = tmp_path / "tokenizer.model"
    trained = tokenizer.train(texts, 350, path)
    written = path.stat().st_mtime_ns
    assert tokenizer.train(texts, 350, path).encode(texts[1]) == trained.encode(texts[1])
    assert path.stat().st_mtime_ns == written
    for others, size in ((texts[:1], 350), (texts, 360)):
        with pytest.raises(ValueError, match="other texts or to another size"):
            tokenizer.train(others, size, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer.model.corpus"]


def test_training_on_too_little_text_says_what_would_fit(tmp_path, texts):
    with pytest.raises(ValueError, match=r"yield 2\d\d tokens, wanted 987"):
        tokenizer.train(["ababab"], 1000, tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="vocab_size >= 269"):
        tokenizer.train(texts, 200, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_merges_shorten_the_text_they_were_trained_on(tok, texts):
    assert len(tok.encode(texts[1])) < 0.6 * len(texts[1].encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a tokenizer\n", "line 1: wanted base64"),
        (b"YQ== 0\nYg== 2\n", "ranks must run from 0 to 1"),
        (b"YQ== 0\nYg== 1\n", "254 of the 256 single bytes have no rank, first 0x00"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load(path)


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_published_special_tokens_and_split_pattern_are_reproduced_by_rule():
    spellings = [special.spelling(name) for name in special.names(special.LLAMA4_BASE)]
    assert _digest("\n".join(spellings)) == GOLDEN["special_sha256"]
    assert _digest(bpe.SPLIT_PATTERN) == GOLDEN["pattern_sha256"]


def test_published_vocabulary_has_its_special_ids(llama4):
    assert llama4.vocab_size == 202_048
    assert llama4.stop == (200_001, 200_007, 200_008)
    named = [llama4.special[name] for name in ("begin_of_text", "image_start", "image_end", "image", "patch")]
    assert named == [200_000, 200_080, 200_081, 200_090, 200_092]
    assert [llama4.special[f"reasoning_thinking_{side}"] for side in ("start", "end")] == [201_142, 201_143]
    assert llama4.pad == 200_018


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"][:12].encode("unicode_escape").decode())
def test_published_vocabulary_tokenizes_as_its_authors_do(llama4, case):
    assert llama4.encode(case["text"]) == case["tokens"]
    assert llama4.encode(case["text"], allow_special=True) == case.get("with_special", case["tokens"])
    assert llama4.decode(case["tokens"]) == case["text"]


def test_the_committed_goldens_are_the_shared_ones(root):
    folder = root.parent / "shared" / "reference"
    if not folder.exists():
        pytest.skip("the reference goldens are not beside this checkout")
    shared = json.loads((folder / "golden_tokens.json").read_text())["cases"]
    assert [(case["text"], case["llama4"], case["llama4_allow_special"]) for case in shared] == [
        (case["text"], case["tokens"], case.get("with_special", case["tokens"])) for case in GOLDEN["cases"]
    ]
    spec = json.loads((folder / "tokenizer_spec.json").read_text())
    assert (
        _digest("\n".join(sorted(spec["special_tokens"], key=spec["special_tokens"].get))) == GOLDEN["special_sha256"]
    )
    assert _digest(spec["pattern"]) == GOLDEN["pattern_sha256"]


def test_a_long_text_of_the_published_vocabulary_has_the_ids_of_the_whole(llama4):
    text = "\n".join(case["text"] for case in GOLDEN["cases"]) * 50
    assert len(text) > 5 * slices.WINDOW
    assert llama4.encode(text) == llama4._encoding.encode_ordinary(text)
