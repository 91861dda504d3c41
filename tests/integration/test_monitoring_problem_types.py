"""Metric tables of predicted numbers and of boolean slices on Sail, compared with scikit-learn on the rows."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics
from scipy import stats

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring.metric_tables import measure, profile_columns, write_metrics
from mlops_nb.monitoring.quality import FAIRNESS_METRICS, REGRESSION_METRICS
from mlops_nb.monitoring.thresholds import Threshold, compare_windows, violations
from mlops_nb.monitoring.windows import REGRESSION, CustomMetric, Monitor

SLICES = ("origin", "distance > 1000", "weekend")
NUMBERS = Monitor("at", "version", "predicted", "delay", problem_type=REGRESSION, slicing_exprs=SLICES)
CLASSES = Monitor("at", "version", "band", "true_band", slicing_exprs=SLICES)


def as_column(values, missing) -> pa.Array:
    "An Arrow column in which NaN stays NaN, and missing values are null."
    return pa.array(np.asarray(values), mask=np.asarray(missing))


def predictions(rows: int, seed: int, months=("2013-03", "2013-04", "2013-05", "2013-06")) -> pd.DataFrame:
    "Predicted delays in minutes, a third of them 0; with NaN, nulls, and months of equal labels and of zeros."
    random = np.random.default_rng(seed)
    month = random.choice(months, rows)
    delay = np.where(random.random(rows) < 0.3, 0, random.normal(5, 30, rows).round())
    delay = np.select([month == "2013-04", month == "2013-05"], [0.1, 0], delay)
    predicted = (delay + random.normal(0, 10, rows)).round(2)
    predicted[random.random(rows) < 0.05] = np.nan
    frame = pd.DataFrame({
        "at": pd.to_datetime(month, utc=True) + pd.to_timedelta(random.integers(0, 86400 * 28, rows), unit="s"),
        "month": month, "version": random.integers(1, 3, rows).astype("int32"), "delay": delay, "predicted": predicted,
        "origin": random.choice(["EWR", "JFK"], rows), "distance": random.choice([500, 1000, 2000], rows),
        "weekend": random.random(rows) < 0.3, "no_distance": random.random(rows) < 0.05,
        "no_label": random.random(rows) < 0.1, "no_prediction": random.random(rows) < 0.1})
    frame["true_band"], frame["band"] = (pd.cut(frame[name], [-np.inf, 0, 15, np.inf], labels=["none", "some", "much"])
                                         .astype(object).fillna("none") for name in ("delay", "predicted"))
    return frame


def as_spark(spark, frame: pd.DataFrame):
    missing = {"delay": "no_label", "true_band": "no_label", "predicted": "no_prediction", "band": "no_prediction",
               "distance": "no_distance"}
    columns = {name: as_column(frame[name], frame[missing[name]] if name in missing else np.zeros(len(frame), bool))
               for name in ("version", "delay", "predicted", "origin", "distance", "weekend", "band", "true_band")}
    return spark.createDataFrame(pa.table({"at": pa.Array.from_pandas(frame["at"]), **columns}))


@pytest.fixture(scope="module")
def frames():
    return predictions(4000, 1), predictions(600, 2, months=("2013-02",))


def rows_of(row, rows, base) -> pd.DataFrame:
    "The raw rows of a group of the profile, with label and prediction."
    frame = base if row.log_type == "BASELINE" else rows[rows.month == f"{row.window_start:%Y-%m}"]
    if row.model_id != "*": frame = frame[frame.version.astype(str) == row.model_id]
    if row.slice_key == "origin": frame = frame[frame.origin == row.slice_value]
    if row.slice_key == "weekend": frame = frame[frame.weekend == (row.slice_value == "true")]
    if row.slice_key == "distance > 1000":
        known = frame[frame.no_distance == pd.isna(row.slice_value)]
        frame = known if pd.isna(row.slice_value) else known[(known.distance > 1000) == (row.slice_value == "true")]
    return frame[~frame.no_label & ~frame.no_prediction]


def regression_of(frame) -> list[float]:
    "REGRESSION_METRICS by scikit-learn, NaN where a ratio is undefined."
    frame = frame[frame.predicted.notna()]
    label, predicted, rated = frame.delay, frame.predicted, frame.delay != 0
    percentage = explained = np.nan
    if any(rated): percentage = sklearn.metrics.mean_absolute_percentage_error(label[rated], predicted[rated])
    if label.nunique() > 1: explained = sklearn.metrics.r2_score(label, predicted)
    return [sklearn.metrics.mean_squared_error(label, predicted),
            sklearn.metrics.root_mean_squared_error(label, predicted),
            sklearn.metrics.mean_absolute_error(label, predicted), percentage, explained]


@pytest.fixture(scope="module")
def of_numbers(home, frames):
    spark, env = home
    return measure(spark, env, as_spark(spark, frames[0]), NUMBERS, "1 month", baseline=as_spark(spark, frames[1]))


def test_every_window_version_and_slice_has_scikit_learns_metrics(frames, of_numbers):
    profile = of_numbers.profile[of_numbers.profile.column_name == ":table"]
    assert len(profile) == 5 * 3 * (1 + 2 + 3 + 2)  # windows and baseline, versions, the whole table and the slices
    for row in profile.itertuples():
        frame = rows_of(row, *frames)
        values = [getattr(row, metric) for metric in REGRESSION_METRICS]
        assert values == pytest.approx(regression_of(frame), rel=1e-9, nan_ok=True), row
        assert row.evaluated == frame.predicted.notna().sum() and row.labelled >= row.evaluated
    empty = profile[["mean_absolute_percentage_error", "r2_score"]].isna().groupby(profile.window_start).all()
    assert empty.values.tolist() == [[False, False], [False, True], [True, True], [False, False]]


def test_predicted_numbers_drift_like_any_numeric_column(frames, of_numbers):
    drift = of_numbers.drift.query("column_name == 'predicted' and model_id == '*' and drift_type == 'BASELINE'")
    june = drift[drift.slice_key.isna()].sort_values("window_start").iloc[-1]
    rows, base = (frame[~frame.no_prediction].predicted.dropna() for frame in
                  (frames[0][frames[0].month == "2013-06"], frames[1]))
    assert june.ks_test["statistic"] == pytest.approx(stats.ks_2samp(rows, base).statistic, abs=2e-3)
    assert june.avg_delta == pytest.approx(rows.mean() - base.mean())


def test_the_tables_have_the_metrics_and_a_second_run_changes_nothing(home, of_numbers):
    spark, env = home
    write_metrics(spark, env, "delays", of_numbers, NUMBERS, "1 month")
    written = tables.version(spark, env, "delays_profile_metrics")
    write_metrics(spark, env, "delays", of_numbers, NUMBERS, "1 month")
    assert tables.version(spark, env, "delays_profile_metrics") == written
    table = tables.read(spark, env, "delays_profile_metrics")
    types = {field.name: field.dataType.simpleString() for field in table.schema.fields}
    assert list(types) == list(profile_columns("version"))
    assert {types[metric] for metric in REGRESSION_METRICS} == {"double"}
    assert {types[metric] for metric in FAIRNESS_METRICS} == {"map<string,double>"}
    expected = of_numbers.part("INPUT").root_mean_squared_error.tolist()
    rows = table.where("column_name = ':table' AND slice_key IS NULL AND version = '*' AND log_type = 'INPUT'")
    assert [row[0] for row in rows.orderBy("window.start").select("root_mean_squared_error").collect()] == (
        pytest.approx(expected, rel=1e-9))


def test_a_threshold_on_the_error_counts_the_evaluated_rows(of_numbers):
    limit = Threshold("root_mean_squared_error", at_most=1.0, min_rows=400)
    windows = compare_windows(of_numbers, limit)
    inputs = of_numbers.profile.query("column_name == ':table' and log_type == 'INPUT' and model_id != '*'")
    evaluated = inputs[inputs.slice_key.isna()].set_index(["window_start", "model_id"]).evaluated.sort_index()
    assert windows["count"].tolist() == evaluated.tolist() and (windows.value > 1).all()
    assert windows.broken.tolist() == (evaluated >= 400).tolist() and 0 < windows.broken.sum() < len(windows)
    assert {v["metric"] for v in violations(of_numbers, [limit], NUMBERS, "1 month")} == {limit.metric}


def fairness_of(frames: list[pd.DataFrame], name: str) -> list[float]:
    "FAIRNESS_METRICS of one class by scikit-learn: the first group minus the second."
    rates = []
    for frame in frames:
        label, predicted = (frame.true_band == name).to_numpy(bool), (frame.band == name).to_numpy(bool)
        rates.append([sklearn.metrics.precision_score(label, predicted, zero_division=np.nan),
                      1 - sklearn.metrics.recall_score(~label, ~predicted, zero_division=np.nan),
                      sklearn.metrics.recall_score(label, predicted, zero_division=np.nan), predicted.mean()])
    return np.subtract(*rates).tolist()


def test_boolean_slices_are_compared_as_scikit_learn_compares_them(home, frames):
    spark, env = home
    rows, base = (as_spark(spark, frame) for frame in (frames[0][frames[0].month <= "2013-04"], frames[1]))
    measured = measure(spark, env, rows, CLASSES, "1 month", baseline=base)
    write_metrics(spark, env, "bands", measured, CLASSES, "1 month")
    table = tables.read(spark, env, "bands_profile_metrics").where("statistical_parity IS NOT NULL").toPandas()
    assert set(table.column_name) == {":table"} and set(table.slice_key) == {"distance > 1000", "weekend"}
    assert len(table) == 3 * 3 * 2 * 2  # windows and baseline, versions, slicing expressions, true and false
    profile = measured.profile[measured.profile.column_name == ":table"]
    of_march = (profile.window_start == pd.Timestamp("2013-03-01", tz="UTC")) & (profile.model_id == "*")
    checked = profile[of_march | ((profile.log_type == "BASELINE") & (profile.model_id == "1"))]
    assert checked.statistical_parity.notna().sum() == 2 * 2 * 2
    compared = checked[checked.statistical_parity.notna()].sort_values(["log_type", "slice_key", "slice_value"])
    rows = list(compared.itertuples())
    for other, row in zip(rows[::2], rows[1::2], strict=True):  # the slices false and true
        assert (other.slice_value, row.slice_value) == ("false", "true")
        for name in {name for name, _ in row.statistical_parity}:
            expected = np.array(fairness_of([rows_of(row, *frames), rows_of(other, *frames)], name))
            for group, sign in ((row, 1), (other, -1)):
                values = [dict(getattr(group, metric))[name] for metric in FAIRNESS_METRICS]
                assert np.array(values, float) == pytest.approx(sign * expected, nan_ok=True), (group, name)


@pytest.mark.parametrize("baseline", [False, True])
def test_types_are_refused_before_anything_is_computed(home, monkeypatch, baseline):
    spark, env = home
    rows = as_spark(spark, predictions(10, 3))
    wrong = rows.withColumn("predicted", rows.predicted.cast("string"))
    monkeypatch.setattr(tables, "staged", None)
    monkeypatch.setattr("mlops_nb.monitoring.windows.count_versions", None)
    with pytest.raises(MlopsError, match="prediction_col 'predicted' is string, not a number"):
        measure(spark, env, rows if baseline else wrong, NUMBERS, "1 month", baseline=wrong if baseline else None)


def test_labels_that_are_all_unknown_leave_the_metrics_null(home):
    spark, env = home
    rows = as_spark(spark, predictions(50, 4).assign(no_label=True))
    measured = measure(spark, env, rows, replace(NUMBERS, slicing_exprs=()), "1 month")
    write_metrics(spark, env, "unknown", measured, NUMBERS, "1 month")
    table = tables.read(spark, env, "unknown_profile_metrics").toPandas()
    assert len(table) and table[[*REGRESSION_METRICS]].isna().all(axis=None)


def test_an_infinite_prediction_violates_a_threshold(home):
    spark, env = home
    rows = predictions(50, 5, months=("2013-03", "2013-06"))
    rows.loc[rows.month == "2013-06", "predicted"] = np.inf
    measured = measure(spark, env, as_spark(spark, rows), replace(NUMBERS, slicing_exprs=()), "1 month")
    windows = measured.part("INPUT")
    assert np.isfinite(windows.root_mean_squared_error).tolist() == [True, False]
    broken = violations(measured, [Threshold("mean_average_error", at_most=60, min_rows=1)], NUMBERS, "1 month")
    assert [v["window"] for v in broken] == ["2013-06"] * 2  # of both versions


def custom(name, kind, definition) -> CustomMetric:
    double = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'
    return CustomMetric(name, f"CUSTOM_METRIC_TYPE_{kind}", (":table",), definition, double)


def test_custom_metrics_can_use_the_errors(home, frames):
    spark, env = home
    growth = "{{current_df}}.root_mean_squared_error - {{base_df}}.root_mean_squared_error"
    monitor = replace(NUMBERS, slicing_exprs=(), custom_metrics=(
        custom("error_in_hours", "DERIVED", "root_mean_squared_error / 60"), custom("error_growth", "DRIFT", growth)))
    measured = measure(spark, env, as_spark(spark, frames[0]), monitor, "1 month", baseline=as_spark(spark, frames[1]))
    errors = measured.part("INPUT").root_mean_squared_error
    assert measured.part("INPUT").error_in_hours.tolist() == pytest.approx((errors / 60).tolist())
    drift = measured.drift.query("column_name == ':table' and drift_type == 'BASELINE' and model_id == '*'")
    growths = drift.sort_values("window_start").error_growth.tolist()
    assert growths == pytest.approx((errors - measured.part("BASELINE").root_mean_squared_error.item()).tolist())


def test_a_custom_metric_can_use_the_fairness_of_one_class(home, frames):
    spark, env = home
    gap = custom("parity_gap", "DERIVED", "abs(statistical_parity['much'])")
    monitor = replace(CLASSES, slicing_exprs=("weekend",), custom_metrics=(gap,))
    profile = measure(spark, env, as_spark(spark, frames[0].head(300)), monitor, "1 month").profile
    slices = profile[profile.statistical_parity.notna()]
    expected = [dict(value).get("much") for value in slices.statistical_parity]
    assert len(slices) and np.array(slices.parity_gap, float) == pytest.approx(np.abs(np.array(expected, float)),
                                                                               nan_ok=True)


def test_decimal_literals_of_slices_and_custom_metrics_are_computed_in_double(home):
    "Sail compares a double and a decimal literal with 15 digits, and fails for 1e20."
    spark, env = home
    rows = spark.sql("SELECT TIMESTAMP'2013-01-05 00:00:00' AS at, '1' AS version, true AS late, x "
                     "FROM VALUES (1e-17D), (0.5D), (-1D), (1e20D) AS t(x)")
    metrics = (custom("positive", "AGGREGATE", "count_if(x > 0.0)"),
               custom("share", "DERIVED", "nullif(positive, 0.1) / count"),
               custom("large", "DERIVED", "CASE WHEN positive * 1e20D > 0.5 THEN 0.25 ELSE positive END"))
    monitor = Monitor("at", "version", "late", slicing_exprs=("x > 0.0",), custom_metrics=metrics)
    profile = measure(spark, env, rows, monitor, "1 month", []).profile
    profile = profile.query("column_name == ':table' and model_id == '*'")
    assert profile[profile.slice_key.isna()][["positive", "share", "large"]].values.tolist() == [[3, 0.75, 0.25]]
    slices = profile[profile.slice_key == "x > 0.0"].set_index("slice_value")
    assert slices[["count", "positive"]].to_dict("index") == {"true": {"count": 3, "positive": 3},
                                                              "false": {"count": 1, "positive": 0}}
