"""Duplicates: the search agrees with exhaustive comparison, keeps the first, and signatures estimate similarity."""

import numpy as np
import pytest

from llama4_jax.data.preparation import dedup, truth, words
from llama4_jax.data.preparation.dedup import Likeness

LIKENESS = Likeness()


def search(texts, likeness=LIKENESS):
    sets = [words.shingles(words.hashes(text), likeness.shingle_words) for text in texts]
    signatures = np.stack([dedup.signature(row, likeness) for row in sets])
    return (
        dedup.search([dedup.digest(text) for text in texts], signatures, sets.__getitem__, likeness),
        sets,
        signatures,
    )


def families(seed, count=60):
    """Texts in families whose members differ in from none to a tenth of their words."""
    draw = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        base = draw.integers(0, 500, 150)
        for rate in draw.choice([0.0, 0.01, 0.02, 0.03, 0.05, 0.1], 4):
            changed = np.where(draw.random(150) < rate, draw.integers(0, 500, 150), base)
            texts.append(" ".join(f"w{number}" for number in changed))
    return [texts[i] for i in draw.permutation(len(texts))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_removes_what_exhaustive_comparison_removes(seed):
    texts = families(seed)
    found, sets, _ = search(texts)
    pairs, similarities = truth.similar_pairs(sets, LIKENESS.threshold)
    expected = truth.duplicates(len(texts), pairs)
    assert 50 < expected.sum() < 200
    assert (~found.kept == expected).all()
    assert found.similar <= found.compared <= found.candidates
    for document in np.flatnonzero(found.near_of >= 0):
        kept = found.near_of[document]
        assert kept < document and found.kept[kept]
        assert dedup.jaccard(sets[document], sets[kept]) >= LIKENESS.threshold


def test_similar_pairs_are_those_of_plain_sets():
    texts = families(5, count=10)
    sets = [words.shingles(words.hashes(text), 5) for text in texts]
    plain = [set(row.tolist()) for row in sets]
    expected = {
        (i, j): len(plain[i] & plain[j]) / len(plain[i] | plain[j])
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if len(plain[i] & plain[j]) / len(plain[i] | plain[j]) >= 0.4
    }
    pairs, similarities = truth.similar_pairs(sets, 0.4)
    assert dict(zip(map(tuple, pairs.tolist()), similarities.tolist())) == pytest.approx(expected)
    assert len(expected) > 10


def test_the_first_is_kept_and_a_chain_is_not_followed():
    """b is near a and near c; a and c are apart: b goes for a, and c stays, as nothing kept is near it."""
    a = [f"w{i}" for i in range(200)]
    b, c = a[:186] + [f"x{i}" for i in range(14)], a[:172] + [f"x{i}" for i in range(28)]
    c[186:] = b[186:]
    texts = [" ".join(row) for row in (a, b, c)]
    found, sets, _ = search(texts, Likeness(threshold=0.85))
    assert dedup.jaccard(sets[0], sets[1]) > 0.85 < dedup.jaccard(sets[1], sets[2])
    assert dedup.jaccard(sets[0], sets[2]) < 0.85
    assert found.near_of.tolist() == [-1, 0, -1]


def test_texts_that_differ_in_spacing_alone_are_exact_duplicates():
    text = " ".join(f"w{i}" for i in range(50))
    found, _, _ = search([text, text.replace(" ", "\r\n "), text.upper()])
    assert found.exact_of.tolist() == [-1, 0, -1]
    assert found.near_of.tolist() == [-1, -1, 0]  # in words they are equal


def test_an_exact_duplicate_of_a_removed_document_names_the_kept_one():
    a = " ".join(f"w{i}" for i in range(200))
    b = a + " and one more"
    found, _, _ = search([a, b, b + "\n"])
    assert found.near_of.tolist() == [-1, 0, -1] and found.exact_of.tolist() == [-1, -1, 0]


def test_signatures_estimate_the_similarity_without_bias():
    draw = np.random.default_rng(0)
    errors = []
    for seed in range(40):
        shared, one, other = (draw.integers(0, 2**63, size, np.uint64) for size in (600, 200, 200))
        likeness = Likeness(seed=seed)
        left, right = (dedup.signature(np.unique(np.append(shared, own)), likeness) for own in (one, other))
        errors.append(np.mean(left == right) - 0.6)
    # Each is the mean of 128 coins of 0.6: its deviation is 0.043, and that of the mean of 40 is 0.0069.
    assert abs(np.mean(errors)) < 4 * 0.0069
    assert 0.025 < np.std(errors) < 0.065


def test_the_chance_of_a_candidate_is_as_documented():
    assert LIKENESS.chance(0.7) == pytest.approx(0.99985, abs=1e-5)
    assert LIKENESS.hashes == 128


def test_signatures_alone_would_remove_pairs_that_are_not_near():
    texts = families(3)
    _, sets, signatures = search(texts)
    pairs, similarities = truth.similar_pairs(sets, 0.4)
    false, called = truth.unverified(signatures, pairs, similarities, LIKENESS)
    assert 0 < false < called


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(ValueError, match="is a similarity, above 0 and at most 1"):
        Likeness(threshold=threshold)


def test_no_documents_are_no_problem():
    found = dedup.search([], np.zeros((0, 128), np.uint32), lambda _: None, LIKENESS)
    assert len(found.kept) == 0
