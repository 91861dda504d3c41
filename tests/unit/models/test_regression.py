"""Metrics of predicted numbers against scikit-learn, their statistics on repeated rows, and operating points."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as oracle

from mlops_nb.errors import MlopsError
from mlops_nb.models.day_resampling import number_days
from mlops_nb.models.intervals import regression_statistics
from mlops_nb.models.problem_types import (
    BINARY,
    PROBLEM_TYPES,
    REGRESSION,
    intervals,
    loss_change,
    operating_point,
    point_tags,
)
from mlops_nb.models.regression import regression_metrics

POINT = {"interval_low": -3.0, "interval_high": 2.0}
NUMBERS = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
ORACLES = {"root_mean_squared_error": oracle.root_mean_squared_error,
           "mean_absolute_error": oracle.mean_absolute_error, "r2_score": oracle.r2_score}


def made_up(days=20, each=30):
    "Labels, predictions and days of rows whose error has a part that all rows of a day share."
    rng = np.random.default_rng(11)
    day = np.datetime64("2024-01-01") + np.repeat(np.arange(days), each)
    label = rng.gamma(3, 5, len(day))
    return label, label + rng.normal(0, 2, len(day)) + rng.normal(0, 1, days).repeat(each), day


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(float, st.tuples(st.integers(2, 30), st.just(2)), elements=NUMBERS))
def test_the_metrics_are_those_of_scikit_learn(rows):
    label, prediction = rows.T
    metrics = regression_metrics(label, prediction, POINT)
    for name, function in ORACLES.items():
        if name == "r2_score" and np.ptp(label) == 0: assert np.isnan(metrics[name])
        else: assert metrics[name] == pytest.approx(function(label, prediction), rel=1e-9, abs=1e-9), name
    inside = [p - 3 <= y <= p + 2 for y, p in rows]
    assert metrics["interval_coverage"] == pytest.approx(np.mean(inside))
    assert metrics["interval_width"] == 5 and metrics["example_count"] == len(rows)


@pytest.mark.parametrize("offset", [0.0, 1e7])  # large values must not lose the differences
def test_statistics_of_day_weights_are_metrics_of_repeated_rows(offset):
    label, prediction, day = made_up()
    label, prediction, days = label + offset, prediction + offset, number_days(day)
    weights = np.random.default_rng(2).multinomial(days.count, np.full(days.count, 1 / days.count), size=5)
    statistics = regression_statistics(label, prediction, POINT, days)
    for i, draw in enumerate(weights):
        rows = np.repeat(np.arange(len(label)), draw[days.number])
        expected = regression_metrics(label[rows], prediction[rows], POINT)
        for name, (statistic, _) in statistics.items():
            assert statistic(weights)[i] == pytest.approx(expected[name], rel=1e-6), name


def test_r2_has_no_value_on_draws_with_equal_labels():
    label = np.repeat([1.0, 1.0, 1.0, 1.0, 2.0], 3)
    days = number_days(np.repeat(np.arange(5), 3))
    statistic = regression_statistics(label, label + 1, {}, days)["r2_score"][0]
    values = statistic(np.array([[1, 1, 1, 1, 1], [2, 1, 1, 1, 0]]))
    assert values[0] == pytest.approx(oracle.r2_score(label, label + 1)) and np.isnan(values[1])


@pytest.mark.parametrize("label, prediction, message", [
    ([1, np.nan], [1, 2], "a label must be a finite number; 1 of 2 are not, such as nan"),
    ([1, 2], [np.inf, np.nan], "a prediction must be a finite number; 2 of 2 are not, such as inf\n  check the"),
    ([], [], "there are no labelled rows")])
def test_values_without_a_metric_are_refused(label, prediction, message):
    with pytest.raises(MlopsError, match=message): regression_metrics(np.array(label), np.array(prediction), {})


def test_intervals_contain_the_metrics_and_stay_in_their_bounds():
    label, prediction, day = made_up()
    table = intervals(REGRESSION, label, prediction, POINT, {}, day)
    values = regression_metrics(label, prediction, POINT)
    assert list(table.index) == [name for name in values if name != "example_count"]
    assert np.allclose(table.value, [values[name] for name in table.index])
    assert ((table.low <= table.value) & (table.value <= table.high)).all() and table.high["r2_score"] <= 1
    exact = intervals(REGRESSION, label, label, {}, {}, day)
    assert exact.loc["root_mean_squared_error"].tolist() == [0, 0, 0]
    assert exact.loc["r2_score"].tolist() == [1, 1, 1] and "interval_width" not in exact.index


def test_the_change_of_the_loss_is_that_of_the_root_mean_squared_error():
    label, prediction, day = made_up()
    worse = prediction + np.random.default_rng(4).normal(0, 1.5, len(label))
    change = loss_change(REGRESSION, label, prediction, worse, day)
    rmse = oracle.root_mean_squared_error
    assert change.value == pytest.approx(rmse(label, prediction) / rmse(label, worse) - 1)
    assert change.low < change.value < change.high < 0


@pytest.mark.parametrize("problem", PROBLEM_TYPES.values(), ids=PROBLEM_TYPES)
def test_a_problem_type_describes_each_of_its_metrics(problem):
    label, prediction, day = made_up()
    if problem is BINARY: label, prediction = (label > 15).astype(int), 1 / (1 + np.exp(15 - prediction))
    point = {tag: 0.3 for tag in problem.operating_tags}
    names = {name for name in problem.metrics(label, prediction, point, {"missed": 5, "false_warning": 1})
             if name != "example_count"}
    statistics = problem.statistics(label, prediction, point, {"missed": 5, "false_warning": 1}, number_days(day))
    assert names == set(problem.bounds) == set(problem.greater_is_better) == set(statistics)
    assert problem.loss in names and not problem.greater_is_better[problem.loss]
    values = problem.metrics(label, prediction, point, {"missed": 5, "false_warning": 1})
    assert problem.mean_loss(label, prediction) == pytest.approx(values[problem.loss])
    assert problem.check_predictions(prediction, len(label)) == []
    with_nan = np.append(prediction[1:], np.nan)
    assert problem.check_predictions(with_nan, 600) == ["1 of 600 predictions are not finite"]


@pytest.mark.parametrize("problem, tags, prefix, expected", [
    (BINARY, {"threshold": "0.2", "baseline_threshold": "0.4"}, "", {"threshold": 0.2}),
    (BINARY, {"threshold": "0.2", "baseline_threshold": "0.4"}, "baseline_", {"threshold": 0.4}),
    (REGRESSION, {"interval_low": "-1", "interval_high": "2"}, "", {"interval_low": -1, "interval_high": 2}),
    (REGRESSION, {"baseline_value": "3"}, "baseline_", {}), (REGRESSION, {}, "", {})])
def test_the_operating_point_of_a_version(problem, tags, prefix, expected):
    assert operating_point(problem, tags, prefix) == expected
    assert point_tags(problem, tags, prefix) == [prefix + name for name in expected]


@pytest.mark.parametrize("problem, tags", [
    (BINARY, {}), (BINARY, {"threshold": "high"}), (BINARY, {"threshold": "nan"}),
    (REGRESSION, {"interval_low": "-1"}), (REGRESSION, {"interval_low": "-1", "interval_high": "inf"})])
def test_a_missing_or_invalid_operating_point_is_named(problem, tags):
    with pytest.raises(MlopsError, match="version 3 has no tag '(threshold|interval_high)' that is a number"):
        operating_point(problem, tags, owner="version 3")
