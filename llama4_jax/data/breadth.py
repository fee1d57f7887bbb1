"""Real texts of many kinds, to train and to measure tokenizers on: 14 languages, code, mathematics and LaTeX.

Languages are the message catalogues of Django; code is Python's standard library; mathematics are the docstrings of
numerical packages that hold formulas, and LaTeX the formulas alone. A hash of the name decides whether a message
(whatever its language) or a module (its code, its docstrings and formulas together) is held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping

from llama4_jax.data import catalogues, modules, text

LANGUAGES = ("en", "de", "fr", "es", "it", "pt_BR", "ru", "ar", "hi", "id", "vi", "th", "zh_Hans", "ja")
HELDOUT_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Corpus:
    """train: texts. heldout: kind of text (a language's code, "code", "maths", "LaTeX") -> texts, none in `train`."""

    train: list[str]
    heldout: Mapping[str, list[str]]


def read(packages: Iterable[str], *, repeats: int, most: int) -> Corpus:
    """The corpus; training text is in all languages that Django speaks, and the code of `packages`.

    repeats: how often each message stands in `train`, for all messages together are few beside the code.
    most: bytes of each kind in `heldout`, at most; what is left out is chosen by a hash of the text.
    """
    told = catalogues.messages("django")
    train = [t for language in told.values() for m, t in language.items() if not is_held_out(m)] * repeats
    heldout = {code: [t for m, t in told[code].items() if is_held_out(m)] for code in LANGUAGES}
    heldout |= {"code": [], "maths": [], "LaTeX": []}
    for source in (source for split in text.SPLITS for source in text.sources("code", split)):
        (heldout["code"] if is_held_out(source.name) else train).append(source.read())
    for module in modules.read(packages):
        if not is_held_out(module.name):
            train.append(module.code)
            continue
        documented = modules.mathematics(module)
        heldout["maths"] += documented
        heldout["LaTeX"] += [formula for docstring in documented for formula in modules.formulas(docstring)]
    return Corpus(train, {kind: _some(texts, most) for kind, texts in heldout.items()})


def is_held_out(name: str) -> bool:
    return int.from_bytes(_hash(name)[:8], "big") < HELDOUT_SHARE * 2**64


def _some(texts: Iterable[str], most: int) -> list[str]:
    """Distinct texts in the order of their hashes, while they fit into `most` bytes together."""
    taken, room = [], most
    for one in sorted(set(texts), key=_hash):
        room -= len(one.encode())
        if room >= 0:
            taken.append(one)
    return taken


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
