"""The page at the end of a run: one file that needs no other, with what it was given."""

import base64
import html.parser
import io
import re
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from llama4_jax.data.heldout import Question
from llama4_jax.eval import report
from llama4_jax.eval.naming import Answer

TABLES = {"A caption": [("language", "exact"), ("English", "80.0 %"), ("<b>Deutsch</b>", "75.0 %")]}
LOAD = [[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]  # three mixture layers of two experts
RECORDS = [
    {"step": 10, "loss": 5.0, "seconds": 30.0, "load": LOAD},
    {"step": 15, "heldout_accuracy": 0.25},
    {"step": 20, "loss": 4.0, "seconds": 90.0, "load": LOAD},
]


@pytest.fixture(autouse=True)
def strict_and_tidy():
    """Matplotlib only warns of text that it cannot draw; and open figures stay in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    plt.close("all")


def answer(said: str, name: str = "tree") -> Answer:
    image = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    prompt = np.zeros(0, np.int32)
    return Answer(Question(0, "x", "en", name, image, prompt, prompt), said)


class Page(html.parser.HTMLParser):
    """What a page holds: table cells, and every address that it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.addresses, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, text):
        if self.inside in ("td", "th") and text.strip():
            self.cells.append(text)


@pytest.fixture
def written(tmp_path):
    figures = {"curves": report.loss_curves(RECORDS), "expert_load": report.expert_load(RECORDS)}
    path = report.write(tmp_path, "A title", figures, TABLES, ["a note & more"])
    return path, path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(written):
    _, text = written
    page = Page(text)
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\(", text)


def test_the_page_shows_the_table_and_escapes_what_is_in_it(written):
    _, text = written
    assert Page(text).cells == ["language", "exact", "English", "80.0 %", "<b>Deutsch</b>", "75.0 %"]
    for shown in ("<h1>A title</h1>", "<h2>A caption</h2>", "<h2>Expert load</h2>", "a note &amp; more"):
        assert shown in text


def test_pictures_in_the_page_are_the_files_beside_it(written):
    path, text = written
    assert sorted(file.name for file in path.parent.iterdir()) == ["curves.png", "expert_load.png", "report.html"]
    inside = [base64.b64decode(address.partition(",")[2]) for address in Page(text).addresses]
    assert inside == [(path.parent / f"{name}.png").read_bytes() for name in ("curves", "expert_load")]
    assert Image.open(io.BytesIO(inside[0])).size[0] > 500
    assert not plt.get_fignums()  # closed once written


def test_curves_show_the_loss_over_minutes_and_accuracy_at_its_own_time():
    left, right = report.loss_curves(RECORDS).axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[0.5, 5.0], [1.5, 4.0]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[1.0, 25.0]])  # step 15: between the two


def test_curves_of_a_run_that_asked_nothing_are_drawn_too():
    assert len(report.loss_curves(RECORDS[:1]).axes) == 2


def test_expert_load_has_a_panel_for_each_mixture_layer():
    figure = report.expert_load(RECORDS)
    assert [axes.get_title() for axes in figure.axes] == ["mixture layer 0", "mixture layer 1", "mixture layer 2"]
    first = figure.axes[0].collections[0].get_paths()[0].vertices
    assert first[:, 1].max() == pytest.approx(0.75)


@pytest.mark.parametrize("records", [RECORDS[:1], [], [{"step": 10, "loss": 5.0, "seconds": 30.0}]])
def test_expert_load_of_one_step_or_of_a_dense_model_is_still_a_figure(records):
    report.expert_load(records).savefig(io.BytesIO())


def test_the_sheet_tells_right_from_wrong():
    figure = report.answer_sheet([answer("tree"), answer("bush"), answer("")], columns=2)
    right, wrong, nothing, unused = figure.axes
    assert (right.get_title(), right.title.get_color()) == ("en: tree", report.RIGHT)
    assert (wrong.get_title(), wrong.title.get_color()) == ("en: bush\n(tree)", report.WRONG)
    assert nothing.get_title() == "en: (nothing)\n(tree)"
    assert not unused.get_title()
    assert wrong.images[0].get_array().min() == 0
    assert wrong.images[0].get_array().max() == 1


def test_drawable_keeps_words_and_hides_what_cannot_be_drawn():
    assert report.drawable("roter Apfel") == "roter Apfel"
    assert report.drawable("a\x00b\nc\ud800") == "a\ufffdb\ufffdc\ufffd"
    assert report.drawable("x" * 99) == "x" * 40
    assert report.drawable("") == "(nothing)"
    assert report.drawable("$5 and $6") == r"\$5 and \$6"


@pytest.mark.parametrize("said", ["$\\frac$", "$x_{$", "\\", "$$", "\ud800\x07", "^_{}\\$", "%&#~", "\t\r\n"])
def test_whatever_a_model_says_can_be_drawn(said):
    report.answer_sheet([answer(said)], columns=1).savefig(io.BytesIO())
