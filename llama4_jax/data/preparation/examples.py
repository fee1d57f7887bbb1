"""Text of this machine whose language is known: manual pages by their folder, documentation in English, Python.

Translations of manual pages are often half done. A page that shares more than a fifth of its word 5-grams with the
English page of its name is no example of its language and is left out.
"""

from __future__ import annotations

import ast
import re

import numpy as np

from llama4_jax.data.preparation import corpus, words

PYTHON = "python"
SHARED_AT_MOST = 0.2
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts(manuals: str, most: int = 300) -> dict[str, list[str]]:
    """At most `most` pages for each language, and a third as many modules; nothing where no pages are installed."""
    pages = corpus.manual_pages(manuals)
    if pages is None:
        return {}
    by_language: dict[str, list[corpus.Item]] = {}
    for item in pages.items:
        by_language.setdefault(language_of_page(item), []).append(item)
    english = {item.name: item for item in by_language.get("en", ())}
    found = {
        language: [page for item in corpus.spread(items, most) if (page := _translated(item, english))]
        for language, items in by_language.items()
        if language != "en"
    }
    documentation = corpus.standard_library("documentation").items
    found["en"] = [
        _text(item) for item in [*corpus.spread([*english.values()], most), *corpus.spread(documentation, most // 3)]
    ]
    found[PYTHON] = [code_alone(_text(item)) for item in corpus.standard_library("code", limit=most // 3).items]
    return found


def language_of_page(item: corpus.Item) -> str:
    """The language whose folder a manual page lies in: of "pt_BR/man1/man.1.gz" it is "pt", of "man1/ls.1.gz" "en"."""
    match = re.match(r"([a-z]{2,3})(_[A-Z]{2})?/", item.name)
    return match.group(1) if match else "en"


def code_alone(source: str) -> str:
    """A module without its comments and docstrings, which are English; nothing for what this Python cannot parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _translated(item: corpus.Item, english: dict[str, corpus.Item]) -> str:
    """The text of a page, or nothing where much of it is still English."""
    page = _text(item)
    original = english.get(item.name.split("/", 1)[1])
    if original is None:
        return page
    own, other = (words.shingles(words.hashes(text), 5) for text in (page, _text(original)))
    return page if np.isin(own, other).mean() <= SHARED_AT_MOST else ""


def _text(item: corpus.Item) -> str:
    return corpus.read(item).decode("utf-8", "replace")
