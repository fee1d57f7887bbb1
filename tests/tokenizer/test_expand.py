"""Expansion of a tokenizer: old ids, the refinement of old encodings, what is learnt, the file, and refusals."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama4_jax import tokenizer
from llama4_jax.tokenizer import bpe
from llama4_jax.tokenizer.expand import _Words, parts

NEW = 40
MORE = [
    "def subtract(left, right):\n    return left - right  # the difference\n" * 30,
    "Lorem ipsum über Äpfel; Быстрая собака прыгает. 赤リンゴと青リンゴ を食べる。aaaaaaa " * 30,
]
# Text that resembles what was learnt, so that new tokens, and halves of them, occur in it.
RESEMBLING = st.lists(
    st.sampled_from(
        ["subtract", "differ", "ence", " left", " right", "ipsum", " прыг", "リンゴ", "\n    ", "a", " ", "é"]
    )
).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("expanded") / "tokenizer.model"


@pytest.fixture(scope="module")
def new(tok, path):
    return tokenizer.expand(tok, MORE, NEW, path)


def borders(pieces: list[bytes]) -> set[int]:
    return set(itertools.accumulate(map(len, pieces)))


@settings(max_examples=300, deadline=None)
@given(text=st.text() | RESEMBLING)
@example(text="".join(MORE))
def test_any_text_survives_and_its_old_encoding_only_cuts_the_new_one_further(tok, new, text):
    assert new.decode(new.encode(text)) == text
    assert borders(new.pieces(text)) <= borders(tok.pieces(text))


def test_old_ids_keep_their_meaning_and_new_ones_follow_the_special_ones(tok, new):
    assert new.special == tok.special
    assert (new.vocab_size, new.stop, new.bos, new.pad) == (tok.vocab_size + NEW, tok.stop, tok.bos, tok.pad)
    assert all(new.decode([token]) == tok.decode([token]) for token in range(tok.vocab_size))
    added = sorted(new.ranks.items() - tok.ranks.items(), key=lambda item: item[1])
    assert [rank for _, rank in added] == list(range(tok.vocab_size, new.vocab_size))


def test_new_tokens_shorten_what_they_were_learnt_from(tok, new):
    for text, share in zip(MORE, (0.6, 0.8)):
        assert len(new.encode(text)) < share * len(tok.encode(text))


def learnt(text: str, count: int, folder) -> list[str]:
    """The first tokens that are learnt from `text` on top of the 256 bytes."""
    bpe.save({bytes([byte]): byte for byte in range(256)}, folder / "bytes.model")
    old = tokenizer.load(folder / "bytes.model")
    new = tokenizer.expand(old, [text], count, folder / "new.model")
    return [new.decode([token]) for token in range(old.vocab_size, new.vocab_size)]


def test_the_most_frequent_pair_is_learnt_first_and_the_next_is_built_on_it(tmp_path):
    # "ab" is there 5 times; then " ab" and "abc" 3 times, the lower bytes first; then " abd", " x", "abc" and "xy" twice.
    assert learnt("abc abc abd abd xyabc xy", 4, tmp_path) == ["ab", " ab", " abd", " x"]


def test_a_pair_counts_as_often_as_its_word_occurs(tmp_path):
    # "pq" is in more words, "xy" in more places.
    assert learnt("xy xy xy xy pq rpq spq", 1, tmp_path) == ["xy"]


@settings(max_examples=100, deadline=None)
@given(
    old=st.lists(st.text("ab", min_size=2, max_size=4), unique=True, max_size=6),
    words=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=6),
)
@example(old=["ba", "ab", "abab"], words=["aaab", "baab", "abab"])
@example(old=["bcd", "abc"], words=["abcd", "xbc", "ybc"])  # once bc is learnt, bcd comes before abc
def test_words_are_cut_in_learning_as_the_vocabulary_so_far_cuts_them(old, words):
    """Also where old tokens are out of reach of old merges, which these tokens in any order often are."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + number for number, token in enumerate(old)}
    first = tokenizer.Tokenizer(ranks)
    learning = _Words(first, words)
    spelled = [b"".join(tokens) for tokens in learning._tokens]
    for added in range(8):
        token = learning.most_frequent(1)
        if token is None:
            break
        ranks[token] = first.vocab_size + added
        learning.merge(token, ranks)
        so_far, bytes_of = tokenizer.Tokenizer(ranks), {rank: token for token, rank in ranks.items()}
        assert learning._tokens == [[bytes_of[i] for i in so_far.parts(word)] for word in spelled]


def test_an_old_token_that_was_out_of_reach_is_merged_once_new_ones_lead_to_it(tmp_path):
    """ "abcd" is a token of ab + cd, but in "abcd" bc merges first; with a + bc learnt, abc + d is that old token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"bc": 256, b"ab": 257, b"cd": 258, b"abcd": 259}
    bpe.save(ranks, tmp_path / "old.model")
    old = tokenizer.load(tmp_path / "old.model")
    assert old.pieces("xabcd") == [b"x", b"a", b"bc", b"d"]
    new = tokenizer.expand(old, ["xabcd yabc zabc"], 1, tmp_path / "new.model")
    assert new.ranks.keys() - old.ranks.keys() == {b"abc"}
    assert new.pieces("xabcd") == [b"x", b"abcd"]


def test_special_tokens_are_neither_learnt_nor_lost(tok, tmp_path):
    new = tokenizer.expand(tok, ["<|eot|> <|eot|> " * 50], 5, tmp_path / "tokenizer.model")
    assert new.special["eot"] not in new.encode("<|eot|>")
    assert new.encode("<|eot|>", allow_special=True) == [tok.special["eot"]]


def test_the_file_is_read_again_and_can_be_expanded_once_more(new, path, tmp_path):
    text = "".join(MORE)
    assert tokenizer.load(path).encode(text) == new.encode(text)
    again = tokenizer.expand(new, MORE, 3, tmp_path / "again.model")
    assert again.vocab_size == new.vocab_size + 3 and again.special == new.special
    assert again.decode(again.encode(text)) == text


def test_the_same_texts_give_the_same_file(tok, path, new, tmp_path):
    tokenizer.expand(tok, MORE, NEW, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()


def test_the_published_vocabulary_keeps_its_ids_from_0_to_202047(llama4, tmp_path):
    new = tokenizer.expand(llama4, MORE, 10, tmp_path / "tokenizer.model")
    assert new.vocab_size == 202_058 and new.special == llama4.special
    text = "".join(MORE)
    assert max(new.encode(text)) >= 202_048
    assert new.decode(new.encode(text)) == text
    assert borders(new.pieces(text)) < borders(llama4.pieces(text))


def test_parts_are_the_old_tokens_of_the_new_ones_bytes(tok, new):
    bytes_of = {rank: token for token, rank in tok.ranks.items()}
    added = sorted(new.ranks.items() - tok.ranks.items(), key=lambda item: item[1])
    found = parts(tok, new)
    assert [b"".join(bytes_of[i] for i in part) for part in found] == [token for token, _ in added]
    assert all(len(part) > 1 for part in found)


def test_parts_of_an_unrelated_tokenizer_are_refused(tok, new, texts, tmp_path):
    other = tokenizer.train(texts + MORE, 400, tmp_path / "other.model")
    with pytest.raises(ValueError, match="440 ids is no expansion of this one of 400"):
        parts(other, new)
    with pytest.raises(ValueError, match="no expansion"):
        parts(new, tok)


def test_too_little_text_says_how_many_tokens_it_yields_and_writes_nothing(tok, tmp_path):
    with pytest.raises(ValueError, match=r"yield \d+ new tokens that occur 2 times, wanted 500; .* num_new <= \d"):
        tokenizer.expand(tok, ["qx qx wv wv"], 500, tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="num_new=0"):
        tokenizer.expand(tok, MORE, 0, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_a_file_whose_gap_is_not_that_of_the_special_tokens_is_refused(tok, path, new, tmp_path):
    wrong = {token: rank - (rank >= tok.vocab_size) for token, rank in new.ranks.items()}
    bpe.save(wrong, tmp_path / "wrong.model")
    with pytest.raises(ValueError, match="leave out the special ids behind the first 387, 387 to 399"):
        tokenizer.load(tmp_path / "wrong.model")
