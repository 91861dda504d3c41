"""Metrics of predicted numbers from means over rows, compared with scikit-learn on the rows."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import quality
from mlops_nb.monitoring.windows import CLASSIFICATION, REGRESSION, Monitor, as_monitor

MONITOR = Monitor("at", "version", "predicted", "actual", problem_type=REGRESSION)
numbers = st.one_of(st.integers(-50, 50), st.floats(-1e6, 1e6)).map(lambda value: round(float(value), 3))


def means(label, prediction) -> pd.DataFrame:
    "What Spark returns for a group of these rows."
    label, error = np.array(label, float), np.array(label, float) - np.array(prediction, float)
    relative = np.abs(error[label != 0]) / np.abs(label[label != 0])
    return pd.DataFrame({"squared_error": [np.mean(error**2)], "absolute_error": [np.mean(np.abs(error))],
                         "relative_error": [relative.mean() if len(relative) else None],
                         "label_variance": [label.var() if label.min() < label.max() else None]})


@settings(max_examples=40)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_the_metrics_are_scikit_learns(rows):
    label, prediction = map(np.array, zip(*rows, strict=True))
    scores = quality.regression_scores(means(label, prediction)).iloc[0]
    assert scores.mean_squared_error == pytest.approx(sklearn.metrics.mean_squared_error(label, prediction))
    assert scores.root_mean_squared_error == pytest.approx(sklearn.metrics.root_mean_squared_error(label, prediction))
    assert scores.mean_average_error == pytest.approx(sklearn.metrics.mean_absolute_error(label, prediction))
    rated = label != 0
    if rated.any():
        expected = sklearn.metrics.mean_absolute_percentage_error(label[rated], prediction[rated])
        assert scores.mean_absolute_percentage_error == pytest.approx(expected)
    else: assert np.isnan(scores.mean_absolute_percentage_error)
    if len(set(label)) > 1:
        assert scores.r2_score == pytest.approx(sklearn.metrics.r2_score(label, prediction), rel=1e-6, abs=1e-9)
    else: assert np.isnan(scores.r2_score)


@pytest.mark.parametrize("variance", [0, None])
@pytest.mark.parametrize("squared_error", [0, 4])
def test_equal_labels_have_no_r2_score(variance, squared_error):
    group = means([1, 2], [1, 2]).assign(squared_error=squared_error, label_variance=variance)
    assert quality.regression_scores(group).r2_score.isna().all()


def test_a_group_without_predictions_has_no_metrics():
    empty = pd.DataFrame(dict.fromkeys(["squared_error", "absolute_error", "relative_error", "label_variance"], [None]))
    scores = quality.regression_scores(empty)
    assert list(scores) == list(quality.REGRESSION_METRICS) and scores.isna().all(axis=None)


def rows_of(**types):
    "An object with the schema of a DataFrame."
    kinds = [SimpleNamespace(name=name, dataType=SimpleNamespace(simpleString=kind.__str__))
             for name, kind in types.items()]
    return SimpleNamespace(schema=SimpleNamespace(fields=kinds))


@pytest.mark.parametrize("types", [("double", "int"), ("float", "decimal(10,2)"), ("bigint", "bigint")])
def test_numbers_of_different_types_can_be_compared(types):
    quality.check_label_columns(rows_of(predicted=types[0], actual=types[1]), MONITOR)


@pytest.mark.parametrize("predicted, actual, message", [
    ("string", "double", "prediction_col 'predicted' is string, not a number\n  cast it to double, or correct the "
                         "problem type PROBLEM_TYPE_REGRESSION"),
    ("double", "boolean", "label_col 'actual' is boolean, not a number"),
    ("double", "array<double>", "label_col 'actual' is array<double>, not a number")])
def test_other_types_are_refused(predicted, actual, message):
    with pytest.raises(MlopsError) as error:
        quality.check_label_columns(rows_of(predicted=predicted, actual=actual), MONITOR)
    assert message in str(error.value)


def test_predictions_are_checked_without_labels_too():
    with pytest.raises(MlopsError, match="prediction_col 'predicted' is string"):
        quality.check_label_columns(rows_of(predicted="string"),
                                    Monitor("at", "version", "predicted", problem_type=REGRESSION))


def test_a_probability_must_be_a_number():
    monitor = Monitor("at", "version", "predicted", "actual", "probability")
    with pytest.raises(MlopsError, match="prediction_proba_col 'probability' is array<double>, not a number"):
        quality.check_label_columns(rows_of(predicted="int", actual="int", probability="array<double>"), monitor)


def test_a_bundles_resource_may_be_a_regression():
    log = {"timestamp_col": "at", "model_id_col": "version", "prediction_col": "predicted", "label_col": "actual",
           "problem_type": "PROBLEM_TYPE_REGRESSION", "granularities": ["1 day"]}
    assert as_monitor({"inference_log": log}) == MONITOR
    with pytest.raises(MlopsError) as error: as_monitor({"inference_log": log | {"prediction_proba_col": "p"}})
    assert str(error.value) == (f"the monitor has prediction_proba_col, but its problem type is {REGRESSION}\n"
                                f"  remove prediction_proba_col, or use {CLASSIFICATION}: a number has no probability")
    with pytest.raises(MlopsError, match="'PROBLEM_TYPE_RANKING' is not valid"):
        as_monitor({"inference_log": log | {"problem_type": "PROBLEM_TYPE_RANKING"}})
