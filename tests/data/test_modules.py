"""Modules of packages and the formulas in their docstrings; the split of all of it by message and by module."""

import numpy as np
import pytest

from llama4_jax.data import breadth, modules

CODE = '''
def norm(x):
    r"""The norm :math:`\\sqrt{x^2}`.

    .. math::

        \\begin{aligned}
            a &= b
        \\end{aligned}

    and in one line, with a name:

    .. math:: c = d
        :label: short

    Not a formula.
    """

def plain(x):
    """Nothing to see."""
'''


def test_formulas_are_displayed_ones_then_those_in_the_line():
    (documented,) = modules.mathematics(modules.Module("m.py", CODE))
    assert documented.startswith("The norm") and documented.endswith("Not a formula.")
    assert modules.formulas(documented) == [
        "\\begin{aligned}\n    a &= b\n\\end{aligned}",
        "c = d",
        "\\sqrt{x^2}",
    ]


def test_modules_of_a_package_are_named_from_the_package_on():
    found = {module.name: module.code for module in modules.read(["optax"])}
    assert "optax/__init__.py" in found and all(name.startswith("optax/") for name in found)
    assert "import" in found["optax/__init__.py"]


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="no package 'no_such_package'"):
        list(modules.read(["no_such_package"]))


def words(text: str) -> str:
    """The text without its layout: a docstring is indented in its module."""
    return " ".join(text.split())


def test_nothing_held_out_is_trained_on_and_room_is_kept():
    pytest.importorskip("django", reason="the texts in 14 languages are Django's: pip install django")
    corpus = breadth.read(["optax"], repeats=2, most=20_000)
    assert list(corpus.heldout) == [*breadth.LANGUAGES, "code", "maths", "LaTeX"]
    trained = set(corpus.train)
    whole = words("\n".join(text for text in trained if len(text) > 1000))
    for kind, texts in corpus.heldout.items():
        assert 300 < sum(len(text.encode()) for text in texts) <= 20_000, kind
        if kind in ("code", "maths"):
            assert not [text for text in texts if words(text) in whole]
    # Translations of different messages may be the same word; whole sentences are not.
    long = [text for code in breadth.LANGUAGES for text in corpus.heldout[code] if len(text) > 60]
    assert long and np.mean([text in trained for text in long]) < 0.01


SPLIT = [False, True, False, False]


def test_the_split_takes_a_quarter_and_is_that_of_the_name_alone():
    share = np.mean([breadth.is_held_out(f"module{number}.py") for number in range(4000)])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert [breadth.is_held_out(name) for name in ("Yes", "No", "json/__init__.py", "ast.py")] == SPLIT
