"""Variants beside each other: their order, their table and their picture."""

import matplotlib.pyplot as plt

from llama4_jax.eval import comparison

LOSS = {"full": [1.0, 1.2], "rounded": [1.4, 1.6], "trained": [1.1, 1.31]}


def test_an_order_that_the_means_do_not_have_is_told_with_both_means():
    order = (("full", "trained"), ("trained", "rounded"))
    assert comparison.disagreements(LOSS, order, 0.0) == []
    (said,) = comparison.disagreements(LOSS, (("rounded", "trained"), *order), 0.0)
    assert said == "rounded (1.5000) is above trained (1.2050)"
    assert comparison.disagreements(LOSS, (("rounded", "trained"),), 0.3) == []


def test_the_table_has_means_and_extremes_that_line_up():
    lines = comparison.table({"loss": LOSS, "names": {name: [0.0, 50.0] for name in LOSS}}, 2).split("\n")
    assert lines[2] == "rounded  1.50 (1.40..1.60)  25.00 (0.00..50.00)"
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == ["loss", "names"]


def test_the_picture_has_a_bar_for_each_mean_and_a_dot_for_each_seed():
    figure = comparison.bars({"loss above full": {n: v for n, v in LOSS.items() if n != "full"}, "loss": LOSS})
    left, right = figure.axes
    assert [bar.get_width() for bar in right.patches] == [1.1, 1.5, 1.205]
    assert [list(line.get_xdata()) for line in left.lines] == [LOSS["rounded"], LOSS["trained"]]
    assert left.patches[0].get_facecolor() == right.patches[1].get_facecolor()
    plt.close(figure)
