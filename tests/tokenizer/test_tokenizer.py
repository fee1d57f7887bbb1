"""The tokenizer: round trips, special tokens, files, training, and the published vocabulary."""

import importlib.util
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax import tokenizer
from llama4_jax.tokenizer import bpe, special

TEXTS = [
    "def add(left, right):\n    return left + right  # the sum\n" * 20,
    "The quick brown fox isn't lazy; it's jumping over 12345 dogs. " * 20,
    "Быстрая лиса прыгает через собаку. Älteres Gemüse, señor. 赤リンゴ りんご " * 20,
]
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


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.train(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


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


def test_training_twice_gives_the_same_file(tmp_path):
    first, second = tmp_path / "first.model", tmp_path / "second.model"
    tokenizer.train(TEXTS, 350, first)
    tokenizer.train(TEXTS, 350, second)
    assert first.read_bytes() == second.read_bytes()


def test_training_reuses_what_is_there_and_refuses_another_corpus(tmp_path):
    path = tmp_path / "tokenizer.model"
    trained = tokenizer.train(TEXTS, 350, path)
    written = path.stat().st_mtime_ns
    assert tokenizer.train(TEXTS, 350, path).encode(TEXTS[1]) == trained.encode(TEXTS[1])
    assert path.stat().st_mtime_ns == written
    for texts, size in ((TEXTS[:1], 350), (TEXTS, 360)):
        with pytest.raises(ValueError, match="other texts or to another size"):
            tokenizer.train(texts, size, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer.model.corpus"]


def test_training_on_too_little_text_says_what_would_fit(tmp_path):
    with pytest.raises(ValueError, match=r"yield 2\d\d tokens, wanted 987"):
        tokenizer.train(["ababab"], 1000, tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="vocab_size >= 269"):
        tokenizer.train(TEXTS, 200, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_merges_shorten_the_text_they_were_trained_on(tok):
    assert len(tok.encode(TEXTS[1])) < 0.6 * len(TEXTS[1].encode())


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


def _reference(root, name):
    path = root.parent / "shared" / "reference" / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return json.loads(path.read_text())


def test_published_special_tokens_and_split_pattern_are_reproduced_by_rule(root):
    published = _reference(root, "tokenizer_spec.json")
    names = special.names(special.LLAMA4_BASE)
    ids = {special.spelling(name): special.LLAMA4_BASE + place for place, name in enumerate(names)}
    assert ids == published["special_tokens"]
    assert published["pattern"] == bpe.SPLIT_PATTERN


@pytest.fixture(scope="module")
def llama4():
    """The published vocabulary, from the wheel `llama-models` (pip install llama-models)."""
    found = importlib.util.find_spec("llama_models")
    if found is None:
        pytest.skip("the wheel llama-models, which ships the published vocabulary, is not installed")
    return tokenizer.load(pathlib.Path(found.origin).parent / "llama4" / "tokenizer.model")


def test_published_vocabulary_has_its_special_ids(llama4):
    assert llama4.vocab_size == 202_048
    assert llama4.stop == (200_001, 200_007, 200_008)
    named = [llama4.special[name] for name in ("begin_of_text", "image_start", "image_end", "image", "patch")]
    assert named == [200_000, 200_080, 200_081, 200_090, 200_092]
    assert llama4.pad == 200_018


def test_published_vocabulary_tokenizes_as_its_authors_do(llama4, root):
    golden = _reference(root, "golden_tokens.json")
    for case in golden["cases"]:
        assert llama4.encode(case["text"]) == case["llama4"], case["text"]
        assert llama4.encode(case["text"], allow_special=True) == case["llama4_allow_special"], case["text"]
        assert llama4.decode(case["llama4"]) == case["text"]
