"""The operations of tensorflow-text, on batches of documents: repair, NFC, scripts, shapes of words, sentences.

This is the one file that imports TensorFlow: the import takes 5 s and 760 MB. Everything here takes and gives bytes,
numpy arrays and dictionaries.

Source: tensorflow_text `coerce_to_structurally_valid_utf8`, `normalize_utf8`, `normalize_utf8_with_offsets_map`,
`UnicodeScriptTokenizer`, `wordshape`, `StateBasedSentenceBreaker`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from llama4_jax.data.preparation import scripts
from llama4_jax.data.preparation.offsets import Offsets, repaired_spans

# Ratios over the words of a document: how many have this shape, of all of them.
SHAPES = {
    "digits": tf_text.WordShape.HAS_ONLY_DIGITS,
    "punctuation": tf_text.WordShape.IS_PUNCT_OR_SYMBOL,
    "upper_case": tf_text.WordShape.IS_UPPERCASE,
    "lower_case": tf_text.WordShape.IS_LOWERCASE,
    "title_case": tf_text.WordShape.HAS_TITLE_CASE,
    "emoji": tf_text.WordShape.HAS_EMOJI,
    "currency": tf_text.WordShape.HAS_CURRENCY_SYMBOL,
    "mathematics": tf_text.WordShape.HAS_MATH_SYMBOL,
}


class Normal(NamedTuple):
    """A document as valid UTF-8 in NFC.

    text: its bytes. offsets: from positions in `text` to positions in the source. repaired: bytes of the source that
    were no UTF-8; each maximal ill-formed run became one U+FFFD.
    """

    text: bytes
    offsets: Offsets
    repaired: int


class Makeup(NamedTuple):
    """What a document is made of.

    words: runs of one script, punctuation apart. scripts: characters in letters of each script, by name.
    shapes: share of the words with each of SHAPES.
    """

    words: int
    scripts: Mapping[str, int]
    shapes: Mapping[str, float]


def one_thread() -> None:
    """One thread for TensorFlow in this process: there is a process for each core. Call it before anything else."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def normalise(documents: Sequence[bytes]) -> list[Normal]:
    """Repairs and composes each document; most need neither, and only the others pay for a map of offsets."""
    valid = tf_text.coerce_to_structurally_valid_utf8(tf.constant(list(documents), tf.string))
    composed = tf_text.normalize_utf8(valid, "NFC").numpy()
    return [_normal(*triple) for triple in zip(documents, valid.numpy(), composed)]


def _normal(source: bytes, valid: bytes, composed: bytes) -> Normal:
    offsets, repaired = Offsets.identity(), 0
    if valid != source:
        spans = repaired_spans(source)
        offsets, repaired = Offsets.of_repairs(spans), sum(end - start for start, end in spans)
    if composed != valid:
        # A map made for a batch speaks of all of it, hence a batch of one.
        _, mapping = tf_text.normalize_utf8_with_offsets_map(tf.constant([valid]), "NFC")
        positions = np.arange(len(composed) + 1)
        found = tf_text.find_source_offsets(mapping, tf.constant(positions[None], tf.int64)).numpy()[0]
        offsets = Offsets.of_positions(offsets.to_source(found))
    return Normal(composed, offsets, repaired)


def makeup(texts: Sequence[bytes]) -> list[Makeup]:
    """Scripts and shapes of words of each text, which is valid UTF-8."""
    tokens = tf_text.UnicodeScriptTokenizer().tokenize(tf.constant(list(texts), tf.string))
    words, splits = tokens.values, tokens.row_splits.numpy()
    if not len(words):
        return [Makeup(0, {}, dict.fromkeys(SHAPES, 0.0)) for _ in texts]
    written = _scripts_of(words)  # [words], an index into the names of scripts
    lengths = tf.strings.length(words, "UTF8_CHAR").numpy()  # [words]
    shapes = {name: tf_text.wordshape(words, shape).numpy() for name, shape in SHAPES.items()}  # each [words]
    found = []
    for first, last in zip(splits[:-1], splits[1:]):
        lettered = written[first:last] >= 0
        sizes = np.bincount(written[first:last][lettered], lengths[first:last][lettered], minlength=len(scripts.NAMES))
        found.append(
            Makeup(
                int(last - first),
                {name: int(size) for name, size in zip(scripts.NAMES, sizes) if size},
                {name: float(np.mean(shape[first:last])) if last > first else 0.0 for name, shape in shapes.items()},
            )
        )
    return found


def _scripts_of(words: tf.Tensor) -> np.ndarray:
    """The script of each word by its first letter, as an index into their names; -1 for what all scripts share."""
    letters = tf.strings.unicode_decode(tf.strings.substr(words, 0, 1, "UTF8_CHAR"), "UTF-8").flat_values
    return _script_table()[tf.strings.unicode_script(letters).numpy()]


@functools.cache
def _script_table() -> np.ndarray:
    """From ICU's number of a script to its place among the names: [numbers]; digits and punctuation (0) and marks (1): -1."""
    table = np.full(1024, scripts.NAMES.index(scripts.OTHER))
    table[:2] = -1
    numbers = tf.strings.unicode_script([ord(letter) for letter in scripts.LETTERS.values()]).numpy()
    table[numbers] = np.arange(len(numbers))
    return table


def sentences(texts: Sequence[bytes]) -> list[np.ndarray]:
    """Where sentences begin and end in each text, in bytes: int [sentences 2].

    The rules are of punctuation and case alone: "Dr. Who" and "at 3. 14" are split, and source code has long ones.
    """
    breaker = tf_text.StateBasedSentenceBreaker()
    _, starts, ends = breaker.break_sentences_with_offsets(tf.constant(list(texts), tf.string))
    spans, splits = np.stack([starts.values.numpy(), ends.values.numpy()], -1), starts.row_splits.numpy()
    return [spans[first:last] for first, last in zip(splits[:-1], splits[1:])]
