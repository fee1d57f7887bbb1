"""Message catalogues: the file format, written by Python's own msgfmt rules, and an installed package's files."""

import struct

import pytest

from llama4_jax.data import catalogues


def compiled(messages: dict[str, str], order: str = "<") -> bytes:
    """A `.mo` file as the gettext manual lays it out: header, two tables of (length, offset), the texts."""
    texts = [text.encode() for text in (*sorted(messages), *(messages[key] for key in sorted(messages)))]
    start = 28 + 8 * len(texts)
    table, body = b"", b""
    for text in texts:
        table += struct.pack(order + "2I", len(text), start + len(body))
        body += text + b"\0"
    count = len(messages)
    return struct.pack(order + "7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + table + body


MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "Yes": "Да",
    "verb\x04Open": "Открыть",
    "%d file\0%d files": "%d файл\0%d файла\0%d файлов",
    "untranslated": "",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_catalogue_is_read_without_header_context_and_untranslated_messages(order):
    assert catalogues.read(compiled(MESSAGES, order), "test.mo") == {
        "Yes": "Да",
        "Open": "Открыть",
        "%d file\n%d files": "%d файл\n%d файла\n%d файлов",
    }


def test_other_bytes_are_refused_by_name():
    with pytest.raises(ValueError, match="test.mo starts with b'PK.*compiled by msgfmt"):
        catalogues.read(b"PK\x03\x04 and so on", "test.mo")


def test_a_packages_languages_are_joined_over_its_catalogues(tmp_path, monkeypatch):
    for name, language, messages in (
        ("a", "ru", {"Yes": "Да"}),
        ("b", "ru", {"No": "Нет"}),
        ("b", "de", {"No": "Nein"}),
    ):
        folder = tmp_path / "spoken" / name / "locale" / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.mo").write_bytes(compiled(messages))
    (tmp_path / "spoken" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert catalogues.messages("spoken") == {
        "en": {"Yes": "Yes", "No": "No"},
        "ru": {"Yes": "Да", "No": "Нет"},
        "de": {"No": "Nein"},
    }


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="pip install no_such_package"):
        catalogues.messages("no_such_package")
