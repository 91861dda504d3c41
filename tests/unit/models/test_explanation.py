"""Pictures of Shapley values for columns of every type and names of every kind; no text is read as a formula."""
import io
from datetime import UTC, date, datetime
from decimal import Decimal

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matplotlib.dates import date2num
from matplotlib.text import Text

from mlops_nb.models import explanation
from mlops_nb.pictures import canvas

matplotlib.use("Agg")
NOON = datetime(2013, 7, 1, 12)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    matplotlib.pyplot.close("all")


def explained(**columns) -> explanation.Contributions:
    "Rows whose contributions are their positions, in the order of the sample."
    rows = pd.DataFrame(columns)
    def encode(frame): return np.zeros(frame.shape)
    def contributions(numbers): return np.arange(len(numbers) * (len(columns) + 1.0)).reshape(len(numbers), -1)
    return explanation.explain_rows(rows, encode, contributions)


def drawn(column) -> tuple:  # matplotlib Axes, and the contributions of the column's rows
    "Draw the dependence of one column to the end."
    sample = explained(a=column)
    figure = explanation.plot_dependence(sample, ["a"])
    figure.savefig(io.BytesIO(), dpi=40)
    return figure.axes[0], sample


def categories(axes) -> list[str]: return [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize("column, labels", [
    (pd.Categorical(["x", "y"] * 20), {"x", "y"}),
    (pd.Categorical(["x", None] * 20, categories=["x", "unused"]), {"x", "missing"}),
    (pd.Categorical([1, 2] * 20, ordered=True), {"1", "2"}),
    (pd.array([True, None] * 20, dtype="boolean"), {"True", "missing"}),
    ([True, False] * 20, {"True", "False"}),
    (pd.Series([True, None] * 20, dtype=object), {"True", "missing"}),
    (["x", None] * 20, {"x", "missing"}),
    (pd.array(["x", None] * 20, dtype="string"), {"x", "missing"}),
    (pd.period_range("2013-01", periods=2, freq="M").repeat(20), {"2013-01", "2013-02"}),
    ([["a"], ["a", "b"]] * 20, {"['a']", "['a', 'b']"}),
    ([None, None] * 20, {"missing"}),
    (["$x_{$", "$a$"] * 20, {"$x_{$", "$a$"})])
def test_categories_are_boxes(column, labels):
    axes, _ = drawn(column)
    assert set(categories(axes)) == labels and len(axes.lines) > 6 * len(labels)


@pytest.mark.parametrize("column, values", [
    ([1.5, None] * 20, [1.5]), (pd.array([1, None] * 20, dtype="Int64"), [1]),
    (pd.Series([3, None] * 20, dtype=object), [3]),
    (pd.array([1.5, None] * 20, dtype="Float64"), [1.5]), ([Decimal("2.5"), None] * 20, [2.5]), ([3, 4] * 20, [3, 4]),
    (pd.array([True, False] * 20, dtype="boolean").astype("Int64"), [0, 1]), ([np.nan] * 40, []),
    ([NOON, None] * 20, [date2num(NOON)]), ([NOON.replace(tzinfo=UTC), None] * 20, [date2num(NOON)]),
    (pd.Series([date(2013, 7, 1), None, date(9999, 12, 31)] * 10, dtype=object),
     [date2num(date(2013, 7, 1)), date2num(date(9999, 12, 31))])])
def test_numbers_and_times_are_points(column, values):
    axes, sample = drawn(column)
    points = axes.collections[0].get_offsets()
    xs = np.ma.filled(np.ma.asarray(points)[:, 0].astype(float), np.nan)
    assert sorted(set(xs[~np.isnan(xs)])) == values
    assert ("missing, not shown" in axes.get_xlabel()) == bool(sample.shown.a.isna().any())


def test_a_box_holds_the_contributions_of_its_category():
    column = ["low"] * 21 + ["high"] * 7 + ["middle"] * 4
    axes, sample = drawn(pd.Categorical(column, categories=["high", "middle", "low"], ordered=True))
    medians = pd.Series(sample.values[:, 0]).groupby(sample.shown.a.astype(str)).median().sort_values()
    lines = [line for line in axes.lines if line.get_color() == explanation.DARK and line.get_linewidth() == 1.5]
    assert medians.is_unique and categories(axes) == list(medians.index)
    assert [line.get_ydata()[0] for line in lines] == list(medians)


TEXTS = st.text(st.sampled_from("$_{}^\\ab%&é "), min_size=1, max_size=8)


@settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(TEXTS, min_size=8, max_size=8, unique_by=str.strip))
@example(names=["$x_{$", "$\\frac$", "$a$", "\\$b", "$", "$$", "$_$", "a$b$c"])
def test_no_text_is_a_formula(names):
    "A picture keeps each text as it was given, also those that are created while it is drawn."
    rng = np.random.default_rng(1)
    columns = {name: rng.choice(names[2:], 60) if i else rng.random(60) for i, name in enumerate(names[:2])}
    sample = explained(**columns)
    figures = [explanation.plot_dependence(sample, names[:2]), explanation.plot_single(sample, 0, names[2])]
    for figure in figures:
        figure.savefig(io.BytesIO(), bbox_inches="tight", dpi=40)
        assert not any(text.get_parse_math() for text in figure.findobj(Text))
    assert set(categories(figures[0].axes[1])) <= {explanation.shortened(name, 20) for name in names[2:]}


def test_the_readers_own_figures_keep_their_formulas():
    figure, axes = canvas("$5")
    figure.savefig(io.BytesIO())
    assert matplotlib.rcParams["text.parse_math"] and not axes.title.get_parse_math()
    own, _ = matplotlib.pyplot.subplots()
    assert own.text(0, 0, "$x^2$").get_parse_math()
