"""Fairness of two groups of rows from their confusion matrices, compared with scikit-learn on the rows."""
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import quality, thresholds
from mlops_nb.monitoring.windows import GROUP

row = st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from("abc"))  # prediction, label
groups = st.lists(row, max_size=12)
rated = groups.filter(lambda rows: any(prediction is not None for prediction, _ in rows))


def matrix(rows):
    return [{"prediction": prediction, "label": label, "count": n} for (prediction, label), n in Counter(rows).items()]


def rates(rows, name) -> list[float]:
    "The rates of a class by scikit-learn, NaN where they are undefined."
    pairs = [pair for pair in rows if pair[0] is not None]
    predicted, label = (np.array([pair[i] == name for pair in pairs]) for i in (0, 1))
    undefined = {"zero_division": np.nan}
    return [sklearn.metrics.precision_score(label, predicted, **undefined),
            1 - sklearn.metrics.recall_score(~label, ~predicted, **undefined),
            sklearn.metrics.recall_score(label, predicted, **undefined), predicted.mean()]


@settings(max_examples=15)
@given(rated, rated)
def test_each_class_is_compared_with_all_others(rows, other):
    scores = quality.fairness_scores(matrix(rows), matrix(other))
    assert list(scores) == list(quality.FAIRNESS_METRICS)
    classes = sorted({name for pair in rows + other if pair[0] is not None for name in pair})
    differences = [np.subtract(rates(rows, name), rates(other, name)) for name in classes]
    for values, expected in zip(scores.values(), np.transpose(differences), strict=True):
        assert [name for name, _ in values] == classes
        assert np.array([value for _, value in values], float) == pytest.approx(expected, nan_ok=True)


@given(groups, groups)
def test_the_other_group_has_the_opposite_sign(rows, other):
    own, opposite = (quality.fairness_scores(*map(matrix, pair)) for pair in ((rows, other), (other, rows)))
    for metric, values in own.items():
        if values is None: assert opposite[metric] is None
        else: assert opposite[metric] == [(name, value if value is None else -value) for name, value in values]


@given(rated)
def test_equal_groups_have_no_differences(rows):
    for values in quality.fairness_scores(matrix(rows), matrix(rows)).values():
        assert {value for _, value in values} <= {0, None}


def test_a_group_without_rows_or_without_predictions_is_not_compared():
    nothing = dict.fromkeys(quality.FAIRNESS_METRICS)
    assert quality.fairness_scores(matrix([("a", "a")]), []) == nothing
    assert quality.fairness_scores(matrix([("a", "a")]), matrix([(None, "a")])) == nothing


def slice_row(value, rows, month=4, version="1", key="age < 25", **more):
    start = pd.Timestamp(f"2013-{month:02}-01", tz="UTC") if month else pd.NaT
    group = dict(zip(GROUP, ("INPUT" if month else "BASELINE", start, version, key, value), strict=True))
    return group | {"confusion_matrix": matrix(rows) if rows else None} | more


def test_a_slice_is_compared_with_the_other_value_of_its_own_window_and_version():
    yes, no = ("yes", "yes"), ("no", "yes")
    profile = pd.DataFrame([
        slice_row("true", [yes, no]), slice_row("false", [no]),
        slice_row("true", [no], month=5), slice_row("false", [yes], month=5),
        slice_row("true", [yes], version=None), slice_row("false", [no], version=None),
        slice_row("true", [no], month=None), slice_row("false", [no, no, no, yes], month=None),
        slice_row(None, [yes]), slice_row("true", [yes], month=6), slice_row("false", None, month=6),
        slice_row("true", [yes], key="text"), slice_row("false", [no], key="text")])
    result = quality.with_fairness(profile, ["age < 25"])
    assert result[list(profile)].equals(profile)
    shares = [value and dict(value)["yes"] for value in result.statistical_parity]
    assert shares == [0.5, -0.5, -1, 1, 1, -1, -0.25, 0.25, None, None, None, None, None]


def test_predicted_numbers_and_other_slices_have_no_fairness():
    numbers = pd.DataFrame([slice_row("true", None)]).drop(columns="confusion_matrix")
    assert quality.with_fairness(numbers, ["age < 25"]) is numbers
    classes = pd.DataFrame([slice_row("true", [("a", "a")])])
    assert quality.with_fairness(classes, []) is classes


def test_a_threshold_on_a_metric_of_slices_is_an_error():
    rows = pd.DataFrame({"column_name": [":table"], "count": [5]})
    with pytest.raises(MlopsError, match="statistical_parity is a metric of slices"):
        thresholds.rows_of_metric(rows, "statistical_parity.true")
