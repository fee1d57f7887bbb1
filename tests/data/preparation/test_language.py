"""Languages: two that every machine with Python has, told apart as whole texts and within one."""

import pytest

from llama4_jax.data.preparation import corpus, examples, language


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    read = lambda item: corpus.read(item).decode("utf-8", "replace")  # noqa: E731
    topics = [item for item in corpus.standard_library("documentation").items if item.form is corpus.Form.TOPIC]
    code = corpus.standard_library("code", limit=60).items
    return {"en": [read(item) for item in topics], "python": [examples.code_alone(read(item)) for item in code]}


@pytest.fixture(scope="module")
def profiles(texts) -> language.Profiles:
    return language.learn({name: found[::2] for name, found in texts.items()})


def test_other_texts_of_learned_languages_are_recognised(profiles, texts):
    others = {name: [text for text in found[1::2] if len(text) >= 500] for name, found in texts.items()}
    assert min(map(len, others.values())) > 15
    assert min(language.accuracy(profiles, others).values()) > 0.9


def test_a_text_in_two_languages_has_both_shares(profiles, texts):
    english, python = (max(texts[name][1::2], key=len)[:5000] for name in ("en", "python"))
    shares = profiles.shares(english + python)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert 0.35 < shares["python"] < 0.65
    assert profiles.shares("ab") == {} and profiles.language("") is None


def test_a_language_with_little_text_is_not_learned(texts):
    few = {**texts, "rare": ["so few words"]}
    assert language.learn(few).names == ("en", "python")
    assert language.learn({"en": texts["en"]}) is None  # nothing to tell it from


def test_code_alone_has_no_docstrings_and_no_comments():
    source = 'def f():\n    "Says so."\n    # why\n    return 1\n\nclass A:\n    """Only this."""\n'
    assert examples.code_alone(source) == "def f():\n    return 1\n\nclass A:\n    pass"
    assert examples.code_alone("def broken(") == ""


@pytest.mark.parametrize(
    ("name", "expected"), [("man1/ls.1.gz", "en"), ("de/man1/man.1.gz", "de"), ("pt_BR/man8/x.8.gz", "pt")]
)
def test_the_language_of_a_page_is_that_of_its_folder(name, expected):
    assert examples.language_of_page(corpus.Item("manuals", name, corpus.Form.MANUAL, "", 0, 0)) == expected


def test_a_page_that_was_never_translated_is_no_example(tmp_path):
    import gzip

    english = "The command reads its input and writes each line once more, in order of its length. " * 20
    german = "Der Befehl liest seine Eingabe und schreibt jede Zeile noch einmal, geordnet nach ihrer Laenge. " * 20
    for folder, text in (("man1", english), ("de/man1", english), ("sv/man1", german)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.1.gz").write_bytes(gzip.compress(f".SH NAME\n{text}\n".encode()))
    found = examples.texts(str(tmp_path), most=3)
    assert found["de"] == [] and len(found["sv"]) == 1
    assert "reads its input" in found["en"][0]
