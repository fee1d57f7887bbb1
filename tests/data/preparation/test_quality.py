"""The rule of quality: each bound has a document that breaks it and no other, and good text passes."""

import pytest

from llama4_jax.data.preparation import quality

PROSE = {"words": 400, "repaired": 0.0, "control": 0.0, "digits": 0.05, "punctuation": 0.2, "upper_case": 0.02}
PROSE |= {"mean_line": 60.0, "repeated_lines": 0.1}


def test_good_text_has_no_reason_to_go():
    assert quality.Rule().reason(PROSE) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("words", 29), ("repaired", 0.01), ("control", 0.01), ("digits", 0.4), ("punctuation", 0.7)]
    + [("upper_case", 0.6), ("mean_line", 2000.0), ("repeated_lines", 0.6)],
)
def test_each_bound_rejects_under_its_own_name(name, value):
    assert quality.Rule().reason(PROSE | {name: value}) == name
    loose = quality.Rule(**{("min_" if name == "words" else "max_") + name: value})
    assert loose.reason(PROSE | {name: value}) is None
    assert name in quality.REASONS


def test_ratios_are_of_lines_and_characters():
    found = quality.ratios(
        "first line\n}\nfirst line\n}\nlast\x00 line", words=7, shapes={"digits": 0.25}, repaired=0.5
    )
    assert found["repeated_lines"] == pytest.approx(1 / 3, abs=1e-5)  # brackets are not lines worth counting
    assert found["mean_line"] == pytest.approx((10 + 1 + 10 + 1 + 10) / 5)
    assert found["control"] == pytest.approx(1 / 36, abs=1e-5)
    assert (found["words"], found["digits"], found["repaired"]) == (7, 0.25, 0.5)


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="Rule.max_digits=-1 must not be negative"):
        quality.Rule(max_digits=-1)
