"""Where documents come from: files, lines, the standard library, manual pages without their marking-up."""

import gzip
import json

import pytest

from llama4_jax.data import text
from llama4_jax.data.preparation import corpus, roff

PAGE = r""".\" a comment
.TH X 1 "today" "x 1.0"
.SH NAME
x \- does the \fIright\fR thing
.SH "SEE ALSO"
.TP 4
.BR ls (1),
\(lqM\(:unchen\(rq, caf\['e], \[u4E2D] and 2\(mu3\&.
.de Xx
.I hidden
and this
..
.nf
a\\b \*(Aqq\*(Aq \s+2big\s0
"""


def test_a_manual_page_keeps_its_words_and_loses_its_marks():
    expected = "NAME\nx - does the right thing\n\nSEE ALSO\n\nls(1),\n“München”, café, 中 and 2×3.\n\na\\b 'q' big\n"
    assert roff.plain(PAGE) == expected


def test_a_manual_page_that_is_no_utf8_keeps_its_bytes_for_the_repair(tmp_path):
    folder = tmp_path / "man1"
    folder.mkdir()
    (folder / "x.1.gz").write_bytes(gzip.compress(b".SH NAME\ncaf\xe9 au lait\n"))
    (folder / "y.1.gz").symlink_to(folder / "x.1.gz")
    source = corpus.manual_pages(str(tmp_path))
    assert [item.name for item in source.items] == ["man1/x.1.gz"]
    assert corpus.read(source.items[0]) == b"NAME\ncaf\xe9 au lait\n"
    assert corpus.manual_pages(str(tmp_path / "none")) is None


def test_lines_of_json_are_documents_of_their_own(tmp_path):
    lines = [{"text": "erste Zeile: ü"}, {"text": "second"}, {"other": 1}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"plain \xff")
    source = corpus.from_files("mine", "CC0-1.0", f"{tmp_path}/*")
    assert [item.name for item in source.items] == [f"{path}:1", f"{path}:3", f"{path}:5", str(tmp_path / "b.txt")]
    first, second, wrong, file = source.items
    assert [corpus.read(item).decode() for item in (first, second)] == ["erste Zeile: ü", "second"]
    assert corpus.read(file) == b"plain \xff"
    with pytest.raises(ValueError, match='a.jsonl:5: wanted an object with a string "text"'):
        corpus.read(wrong)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source 'mine': wanted files that match"):
        corpus.from_files("mine", "CC0-1.0", f"{tmp_path}/*.txt")


@pytest.mark.parametrize("kind", text.KINDS)
def test_the_standard_library_is_read_as_the_loader_reads_it(kind):
    items = corpus.standard_library(kind).items
    sources = {source.name: source for source in text.sources(kind, "train")}
    assert [item.name for item in items] == list(sources)
    for item in items[::60]:
        assert corpus.read(item).decode("utf-8", "replace") == sources[item.name].read()


def test_a_limit_spreads_evenly():
    assert corpus.spread("abcdefghij", 4) == ("a", "c", "f", "h")
    assert corpus.spread("abc", 0) == corpus.spread("abc", 3) == ("a", "b", "c")
