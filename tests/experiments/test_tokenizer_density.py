"""The script that measures vocabularies on many texts, with a small corpus and two small vocabularies."""

import json
import re
import subprocess
import sys

import pytest

from llama4_jax import tokenizer
from llama4_jax.data import breadth

SIZES = (500, 2000)
KINDS = [*breadth.LANGUAGES, "code", "maths", "LaTeX"]


@pytest.fixture(scope="module")
def found(script, tmp_path_factory):
    """The folder, the tables, the final numbers and what was printed."""
    pytest.importorskip("django", reason="the texts in 14 languages are Django's: pip install django")
    pytest.importorskip("llama_models", reason="the published vocabularies are those of the wheel llama-models")
    folder = tmp_path_factory.mktemp("density")
    arguments = ("--sizes", ",".join(map(str, SIZES)), "--packages", "optax", "--repeats", "1", "--most", "8000")
    process = script("tokenizer_density", "--folder", str(folder), *arguments, "--json", str(folder / "out.json"))
    tables = json.loads((folder / "tables.json").read_text())
    return folder, tables, json.loads((folder / "out.json").read_text()), process.stdout


def test_every_kind_of_text_is_measured_with_every_vocabulary(found):
    _, tables, final, _ = found
    sizes = {"Llama 3": 128_256, "Llama 4": 202_048, "0.5k": 500, "2k": 2000}
    assert tables["vocab_size"] == sizes
    for metric in ("tokens_per_word", "bytes_per_token", "unbroken_share"):
        assert list(tables[metric]) == KINDS
        assert all(list(row) == list(sizes) for row in tables[metric].values())
    assert list(final) == [*KINDS, "mean of the languages"]


def test_the_larger_vocabulary_is_the_denser_and_llama_4_denser_than_llama_3(found):
    _, tables, final, _ = found
    for row in tables["bytes_per_token"].values():
        assert 1 <= row["0.5k"] < row["2k"] < row["Llama 4"]
    for kind in ("hi", "th", "ru"):
        density = tables["bytes_per_token"][kind]
        assert final[kind] == pytest.approx(density["Llama 3"] / density["Llama 4"])
        assert final[kind] < 0.9


def test_a_document_costs_less_where_it_is_fewer_tokens(found):
    _, tables, _, _ = found
    languages = tables["cost"]["mean of the languages"]
    assert languages["2k"]["tokens"] > languages["Llama 3"]["tokens"] > languages["Llama 4"]["tokens"]
    assert languages["2k"]["KV MiB"] > languages["Llama 3"]["KV MiB"] > languages["Llama 4"]["KV MiB"]


def test_printed_tables_line_up_and_files_are_whole(found):
    folder, _, _, printed = found
    block = printed[printed.index("bytes per token") :].split("\n\n")[0].splitlines()
    assert len(block) == 1 + len(KINDS)
    assert len({len(line) for line in block}) == 1
    assert all(re.fullmatch(r"\S+ +( +[\d.]+){4}", line) for line in block[1:])
    assert (folder / "density.png").read_bytes().startswith(b"\x89PNG")
    assert tokenizer.load(folder / "2000.model").vocab_size == 2000
    assert not list(folder.glob("*.tmp*"))


def test_the_smaller_vocabulary_is_the_beginning_of_the_larger(found):
    small, large = (tokenizer.load(found[0] / f"{size}.model").ranks for size in SIZES)
    assert small.items() <= large.items()


def test_llama_3_cuts_texts_as_its_authors_do(root):
    """Ids by Meta's own code. In a process of its own, since a script's flags are the process's."""
    pytest.importorskip("llama_models", reason="the published vocabularies are those of the wheel llama-models")
    cases = {
        "HTTPServer parseXMLDocument camelCaseWord": [9412, 5592, 4820, 10833, 7676, 50252, 4301, 11116],
        "-05 0xDEADBEEF": [12, 2304, 220, 15, 80079, 95473, 7244, 37],
        "\t\t\t  \n \n\n   end": [573, 2355, 4815, 256, 842],
        "Привет, мир! Это тест.": [54745, 28089, 8341, 11, 115388, 0, 103874, 117092, 13],
    }
    code = f"""
import importlib.util, json, pathlib
from experiments import tokenizer_density
from llama4_jax.tokenizer import bpe
folder = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent
ranks = bpe.read(folder / "llama3" / "tokenizer.model")
_, pieces = tokenizer_density.published()["Llama 3"]
print(json.dumps([[ranks[piece] for piece in pieces(text)] for text in {list(cases)!r}]))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout) == list(cases.values())
