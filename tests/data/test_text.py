"""Running text: sources, splits, streams that lose nothing, and exact shares."""

import pytest

from llama4_jax.data import text
from llama4_jax.data.draws import shuffled
from llama4_jax.data.mixture import Mixture, TextStream


def _sources(*documents):
    return [text.Source(f"document {number}", lambda d=document: d) for number, document in enumerate(documents)]


@pytest.mark.parametrize("kind", text.KINDS)
def test_training_and_held_out_text_share_no_document(kind):
    train, heldout = (text.sources(kind, split) for split in text.SPLITS)
    names = [source.name for source in train + heldout]
    assert len(set(names)) == len(names) > 300
    assert 0.01 < len(heldout) / len(names) < 0.1
    assert [source.name for source in train] == [source.name for source in text.sources(kind, "train")]


def test_documentation_is_docstrings_and_code_is_source():
    code, documentation = (
        next(source for source in text.sources(kind, "train") if source.name == "heapq.py").read()
        for kind in ("code", "documentation")
    )
    assert "def heappush(heap, item):" in code
    assert "Push item onto heap, maintaining the heap invariant." in documentation
    assert "def heappush" not in documentation


def test_an_unknown_kind_or_split_is_refused():
    with pytest.raises(ValueError, match="got 'poems' and 'train'"):
        text.sources("poems", "train")


def test_shuffling_visits_every_item_once_an_epoch_in_a_new_order():
    orders = [[shuffled(position, 10, seed=4)[1] for position in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [shuffled(position, 10, seed=4)[0] for position in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_pieces_of_a_stream_join_to_its_documents_whatever_their_lengths(tok):
    documents = ["one two three " * 9, "", "x", "naïve Ünïcode " * 5]
    stream = TextStream(_sources(*documents), tok, seed=1)
    pieces, found = [], []
    for room in [1, 2, 3, 50, 7, 1000, 1, 1, 1000, 1000]:
        piece = stream.take(room)
        assert 1 <= len(piece) <= room
        if pieces and piece.inputs[0] != tok.bos:
            assert piece.inputs[0] == pieces[-1].targets[-1]  # continues where the last one stopped
        pieces.append(piece)
        assert list(piece.inputs[1:]) == list(piece.targets[:-1])
        found += [tok.bos] * int(piece.inputs[0] == tok.bos) + [int(token) for token in piece.targets]
    epoch = tok.decode(found).split("<|begin_of_text|>")[1:4]
    assert sorted(epoch) == sorted(document + "<|end_of_text|>" for document in documents if document)


def test_a_source_of_empty_documents_is_refused_instead_of_searched_for_ever(tok):
    with pytest.raises(ValueError, match="all 2 documents are empty"):
        TextStream(_sources("", ""), tok, seed=0).take(5)


@pytest.mark.parametrize("shares", [{"a": 1.0, "b": 3.0}, {"a": 0.9, "b": 0.1}])
def test_shares_of_tokens_are_exact_to_within_one_piece_after_every_piece(tok, shares):
    streams = {
        "a": TextStream(_sources("short.", "texts."), tok, seed=0),
        "b": TextStream(_sources("long texts " * 100), tok, seed=0),
    }
    mixture, longest, total = Mixture(streams, shares), 0, 0
    for room in [40, 7, 13, 64] * 60:
        piece = mixture.take(room)
        longest, total = max(longest, len(piece)), total + len(piece)
        for name, share in shares.items():
            assert abs(mixture.served[name] - total * share / sum(shares.values())) <= longest
    assert sum(mixture.served.values()) == total > 1000


def test_a_share_of_zero_is_refused(tok):
    with pytest.raises(ValueError, match="wanted a positive share for each of"):
        Mixture({"a": TextStream(_sources("x"), tok, seed=0)}, {"a": 0.0})
