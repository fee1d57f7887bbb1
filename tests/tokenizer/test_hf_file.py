"""A `tokenizer.json` that says what a tiktoken-format file would, and every way in which one may say something else."""

import copy
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax import tokenizer
from llama4_jax.tokenizer import bpe, hf_file, special


def document(tok: bpe.Tokenizer) -> dict:
    """`tok` as Hugging Face's converter writes it: every pair that joins to a token is a merge, in order of the ids."""
    letter = {byte: letter for letter, byte in hf_file.byte_alphabet().items()}
    spell = lambda token: "".join(letter[byte] for byte in token)  # noqa: E731
    merges = [
        [spell(token[:cut]), spell(token[cut:])]
        for token in sorted(tok.ranks, key=tok.ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in tok.ranks and token[cut:] in tok.ranks
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": special.spelling(name)} | flags for name, i in tok.special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": bpe.SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): rank for token, rank in tok.ranks.items()},
            "merges": merges,
        },
    }


@pytest.fixture(scope="module")
def written(tok) -> dict:
    return document(tok)


@pytest.fixture(scope="module")
def path(written, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    path.write_text(json.dumps(written))
    return path


@pytest.fixture(scope="module")
def read(path):
    return tokenizer.load(path)


@pytest.fixture(scope="module")
def theirs(path):
    return tokenizers.Tokenizer.from_file(str(path))


def test_the_same_vocabulary_comes_out_of_both_kinds_of_file(tok, read):
    assert (read.ranks, read.special, read.vocab_size) == (tok.ranks, tok.special, tok.vocab_size)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(["left", " right", "  ", "\n", "42", "isn't", "リンゴ"])).map("".join))
def test_ids_are_those_of_the_library_whose_file_it_is(read, theirs, text):
    if "<|" not in text:  # the library looks for special tokens in every text
        assert read.encode(text) == theirs.encode(text).ids


def test_merges_written_as_texts_and_a_model_without_lookup_are_read_too(tok, written, tmp_path):
    other = copy.deepcopy(written)
    other["model"]["merges"] = [" ".join(pair) for pair in other["model"]["merges"]]
    other["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    assert tokenizer.load(tmp_path / "tokenizer.json").ranks == tok.ranks


def test_an_expanded_vocabulary_is_read_with_its_gap(tok, tmp_path):
    new = tokenizer.expand(tok, ["subtract the difference " * 50], 10, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document(new)))
    found = tokenizer.load(tmp_path / "tokenizer.json")
    assert (found.ranks, found.special) == (new.ranks, tok.special)


def set_in(path: str, value):
    """A change of one place in the document, by its path."""

    def change(document: dict) -> None:
        *folders, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        for folder in folders:
            document = document[folder]
        document[last] = value

    return change


def drop_last_merge(document: dict) -> None:
    document["model"]["merges"].pop()


def swap_merges(document: dict) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def out_of_reach(document: dict) -> None:
    """A token of which no two parts are tokens, and nothing that looks it up."""
    taken = document["model"]["vocab"]
    last = max(taken, key=taken.get)
    taken["zqjx"] = taken.pop(last)
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if "".join(pair) != last]
    document["model"]["ignore_merges"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("model/type", "Unigram"), "model.type is 'Unigram'"),
        (set_in("model/dropout", 0.1), "model.dropout is '0.1'"),
        (set_in("model/unk_token", "<unk>"), "model.unk_token is '<unk>'"),
        (set_in("model/byte_fallback", True), "model.byte_fallback is 'True'"),
        (set_in("model/end_of_word_suffix", "</w>"), "end_of_word_suffix is '</w>'"),
        (set_in("model/continuing_subword_prefix", "##"), "continuing_subword_prefix is '##'"),
        (set_in("normalizer", {"type": "NFC"}), "normalizer is .*NFC"),
        (set_in("truncation", {"max_length": 8}), "truncation is .*8"),
        (set_in("padding", {"length": 8}), "padding is .*8"),
        (set_in("pre_tokenizer", None), r"pre_tokenizer is '\[\]'"),
        (set_in("pre_tokenizer/pretokenizers/0/pattern/Regex", r"\w+"), r"pattern is '\\\\w\+'"),
        (set_in("pre_tokenizer/pretokenizers/0/behavior", "MergedWithNext"), "behavior and invert is .*MergedWithNext"),
        (set_in("pre_tokenizer/pretokenizers/1/add_prefix_space", True), "add_prefix_space is 'True'"),
        (set_in("pre_tokenizer/pretokenizers/1/use_regex", True), "use_regex is 'True'"),
        (set_in("added_tokens/0/id", 3), r"1 special tokens .* '<\|begin_of_text\|>' has id 3, wanted 387"),
        (set_in("added_tokens/1/content", "</s>"), r"2 special tokens .* '<\|end_of_text\|>' has id None, wanted 388"),
        (set_in("added_tokens/2/lstrip", True), "header_start.* has lstrip=true"),
        (set_in("model/vocab/▁", 900), "'▁' has '▁', which stands for no byte"),
        (drop_last_merge, "are tokens that join to a token, but have no merge"),
        (swap_merges, "is not in the order of the ids"),
        (out_of_reach, "no merges lead to the token 'zqjx'"),
    ],
)
def test_what_would_make_another_tokenizer_is_refused_by_name(written, tmp_path, change, message):
    other = copy.deepcopy(written)
    change(other)
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(NotImplementedError, match=message):
        tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="wanted a tokenizer.json with a model and its vocab"):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_a_vocabulary_with_a_hole_is_refused(written, tmp_path):
    other = copy.deepcopy(written)
    del other["model"]["vocab"]["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(NotImplementedError, match="special tokens are not those behind"):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_a_vocabulary_without_one_of_the_bytes_is_refused(written, tmp_path):
    other = copy.deepcopy(written)
    vocabulary = other["model"]["vocab"]
    vocabulary["ZZZ"] = vocabulary.pop("A")
    other["model"]["merges"] = [pair for pair in other["model"]["merges"] if "A" not in pair]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="1 of the 256 single bytes have no rank, first 0x41"):
        tokenizer.load(tmp_path / "tokenizer.json")
