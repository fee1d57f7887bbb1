"""Reads Hugging Face's `tokenizer.json` where it says what a tiktoken-format file would: byte-level BPE by rank.

Such a file spells bytes as letters, lists merges, and names its split, its special tokens and more. It is taken only if
all of that is what our tokenizer does, for then, and only then, both give every text the same ids:
* merges stand in the order of the ids that they give, and every two tokens that join to a token have one;
* each token is reached by merging, or the file looks words up before it merges (`ignore_merges`), as tiktoken does;
* text is not normalised, and split by the pattern of Llama 4;
* the special tokens are those of `special`, with the ids behind the ordinary ones.
What the file adds around a text (its post-processor) is left to the arguments of `Tokenizer.encode`.

Source: the `tokenizers` library (the file format), Radford et al. 2019 (the letters for bytes).
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from llama4_jax.tokenizer import special


def read(path: str | os.PathLike, split_pattern: str) -> dict[bytes, int]:
    """Bytes of each ordinary token in a `tokenizer.json` -> rank.

    Raises ValueError for a file that is no such thing, NotImplementedError, naming it, for anything in it that would
    make another tokenizer.
    """
    content = pathlib.Path(path).read_text(encoding="utf-8")
    try:
        parsed = json.loads(content)
        model, vocabulary = parsed["model"], parsed["model"]["vocab"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted a tokenizer.json with a model and its vocab; {error!r}") from error
    _check_kind(parsed, split_pattern, path)
    ranks = {_bytes(token, path): rank for token, rank in vocabulary.items()}
    _check_special(parsed.get("added_tokens") or [], ranks, path)
    _check_merges(model.get("merges") or [], vocabulary, path)
    if not model.get("ignore_merges"):
        _check_reachable(content, vocabulary, path)
    return ranks


@functools.cache
def byte_alphabet() -> Mapping[str, int]:
    """The letter that stands for each byte in byte-level BPE -> that byte.

    Printable Latin-1 stands for itself; the other bytes, in order, for the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others: Iterator[int] = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _bytes(token: str, path) -> bytes:
    try:
        return bytes(map(byte_alphabet().__getitem__, token))
    except KeyError as error:
        raise NotImplementedError(
            f"{path}: the token {token[:40]!r} has {error.args[0]!r}, which stands for no byte; "
            "only byte-level vocabularies can be read"
        ) from error


def _check_kind(parsed: Mapping[str, Any], split_pattern: str, path) -> None:
    """Compares all settings that change ids with the one value that our tokenizer has."""
    model, steps = parsed["model"], _steps(parsed.get("pre_tokenizer"))
    split = steps[0] if steps else {}
    found = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "model.dropout": (model.get("dropout"), None),
        "model.unk_token": (model.get("unk_token"), None),
        "model.byte_fallback": (bool(model.get("byte_fallback")), False),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or "", ""),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or "", ""),
        "normalizer": (parsed.get("normalizer"), None),
        "truncation": (parsed.get("truncation"), None),
        "padding": (parsed.get("padding"), None),
        "pre_tokenizer": ([step.get("type") for step in steps], ["Split", "ByteLevel"]),
        "pre_tokenizer's pattern": ((split.get("pattern") or {}).get("Regex"), split_pattern),
    }
    keeps = (split.get("behavior"), bool(split.get("invert")))
    found["pre_tokenizer's behavior and invert"] = (keeps if keeps != ("Removed", True) else _KEPT, _KEPT)
    if len(steps) > 1:
        for name in ("add_prefix_space", "use_regex"):
            found[f"pre_tokenizer's {name}"] = (bool(steps[1].get(name, True)), False)
    for name, (got, wanted) in found.items():
        if got != wanted:
            raise NotImplementedError(
                f"{path}: {name} is {str(got)[:80]!r}, where only {str(wanted)[:80]!r} can be expressed; "
                "use the tokenizer.model that the model came with"
            )


_KEPT = ("Isolated", False)  # every match is a word; so is it, as all text matches, to remove what does not


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer and pre_tokenizer.get("type") == "Sequence":
        return pre_tokenizer["pretokenizers"]
    return [pre_tokenizer] if pre_tokenizer else []


def _check_special(added: list[Mapping[str, Any]], ranks: Mapping[bytes, int], path) -> None:
    taken = set(ranks.values())
    base = next(rank for rank in range(len(ranks) + 1) if rank not in taken)
    wanted = {special.spelling(name): base + offset for offset, name in enumerate(special.names(base))}
    got = {token["content"]: token["id"] for token in added}
    wrong = [name for name in {**wanted, **got} if wanted.get(name) != got.get(name)]
    if wrong:
        raise NotImplementedError(
            f"{path}: {len(wrong)} special tokens are not those behind {base} ordinary ones: {wrong[0]!r} has id "
            f"{got.get(wrong[0])}, wanted {wanted.get(wrong[0])}"
        )
    options = ("lstrip", "rstrip", "single_word", "normalized")
    odd = [(token["content"], name) for token in added for name in options if token.get(name)]
    if odd:
        raise NotImplementedError(f"{path}: the special token {odd[0][0]!r} has {odd[0][1]}=true, which ours never do")


def _check_merges(merges: list, vocabulary: Mapping[str, int], path) -> None:
    """Merges by their place in the list are merges by rank if both give the same order to the same pairs."""
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    made = [vocabulary.get("".join(pair), -1) for pair in pairs]
    early = next((place for place in range(1, len(made)) if made[place] < made[place - 1]), None)
    if early is not None or -1 in made:
        place = early if early is not None else made.index(-1)
        raise NotImplementedError(
            f"{path}: merge {place}, {' + '.join(pairs[place])!r}, is not in the order of the ids that merges give; "
            "only vocabularies whose ids are ranks can be read"
        )
    known = set(pairs)
    for token in vocabulary:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                raise NotImplementedError(
                    f"{path}: {' + '.join(pair)!r} are tokens that join to a token, but have no merge; by rank they "
                    "would merge. Use the tokenizer.model that the model came with"
                )


def _check_reachable(content: str, vocabulary: Mapping[str, int], path) -> None:
    model = tokenizers.Tokenizer.from_str(content).model
    for token in vocabulary:
        if len(model.tokenize(token)) > 1:
            raise NotImplementedError(
                f"{path}: no merges lead to the token {token!r}, and ignore_merges is not set; by rank a word of these "
                "bytes is this token"
            )
