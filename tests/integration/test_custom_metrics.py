"""Custom metrics of random predictions on Sail, compared with pandas and scikit-learn on the rows."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring.metric_tables import measure, profile_columns, write_metrics
from mlops_nb.monitoring.noise import check_rates, noise_limits
from mlops_nb.monitoring.thresholds import Threshold, compare_windows, read_thresholds, violations
from mlops_nb.monitoring.windows import CustomMetric, Monitor

BIG = 2**53 + 1  # the first whole number that is no floating-point number


def output(kind): return f'{{"name": "output", "type": {kind}, "nullable": true, "metadata": {{}}}}'


def metric(kind, name, definition, columns=(":table",), data_type='"double"'):
    return CustomMetric(name, f"CUSTOM_METRIC_TYPE_{kind}", columns, definition, output(data_type))


METRICS = (
    metric("DERIVED", "loss_ratio", "log_loss / nullif(heuristic_loss, 0)"),
    metric("AGGREGATE", "heuristic_loss",
           "-avg(ln(CASE WHEN {{label_col}} THEN heuristic WHEN NOT {{label_col}} THEN 1 - heuristic END))"),
    metric("AGGREGATE", "error_cost", "sum(CASE WHEN {{prediction_col}} != {{label_col}} THEN cost END)"),
    metric("AGGREGATE", "squares", "avg(`{{input_column}}` * `{{input_column}}`)", ("delay", "cost")),
    metric("DERIVED", "spread", "sqrt(squares - avg * avg) / count", ("delay", "cost")),
    metric("AGGREGATE", "largest_id", "max(flight)", data_type='"long"'),
    metric("AGGREGATE", "origins", "array_sort(collect_set(origin))",
           data_type='{"type": "array", "elementType": "string", "containsNull": true}'),
    metric("DERIVED", "is_good", "f1_score.weighted > 0.5", data_type='"boolean"'),
    metric("DRIFT", "loss_ratio_growth", "{{current_df}}.loss_ratio / {{base_df}}.loss_ratio"),
    metric("DRIFT", "squares_delta", "{{current_df}}.squares - {{base_df}}.squares", ("delay", "cost")),
    metric("DRIFT", "accuracy_delta", "{{current_df}}.accuracy_score - {{base_df}}.accuracy_score"))
MONITOR = Monitor("at", "version", "warning", "late", "prediction", slicing_exprs=("origin", "delay > 0"),
                  sliced_columns=(), custom_metrics=METRICS)


def predictions(rows: int, seed: int, versions=(1, 2)) -> pd.DataFrame:
    "Predictions of two months, with a column that only custom metrics use, and unknown labels."
    random = np.random.default_rng(seed)
    at = pd.Timestamp("2013-04-01", tz="UTC") + pd.to_timedelta(random.integers(0, 60 * 86400, rows), unit="s")
    late = pd.array(random.random(rows) < 0.3, "boolean")
    late[random.random(rows) < 0.1] = pd.NA
    return pd.DataFrame({
        "at": at, "version": random.choice(versions, rows).astype("int32"), "late": late,
        "prediction": random.uniform(0.05, 0.95, rows), "warning": random.random(rows) < 0.5,
        "heuristic": random.uniform(0.1, 0.9, rows), "cost": random.integers(1, 9, rows),
        "delay": random.normal(0, 10, rows), "flight": BIG - random.integers(0, 2, rows),
        "origin": random.choice(["EWR", "JFK"], rows)})


@pytest.fixture(scope="module")
def measured(home):
    spark, env = home
    rows, base = predictions(1200, 1), predictions(300, 2, versions=(1,))
    frames = [spark.createDataFrame(frame) for frame in (rows, base)]
    metrics = measure(spark, env, frames[0], MONITOR, "1 month", baseline=frames[1])
    return rows.assign(month=rows["at"].dt.month), base.assign(month=0), metrics


def part(frame, row):
    "The rows of the frame that a row of the metric tables is about."
    if row.model_id != "*": frame = frame[frame.version == int(row.model_id)]
    if row.slice_key == "origin": frame = frame[frame.origin == row.slice_value]
    if row.slice_key == "delay > 0": frame = frame[(frame.delay > 0) == (row.slice_value == "true")]
    return frame


def log_loss(rows, column):
    known = rows[rows.late.notna()]
    return sklearn.metrics.log_loss(known.late.astype(bool), known[column])


def loss_ratio(rows): return log_loss(rows, "prediction") / log_loss(rows, "heuristic")


def test_aggregates_and_derived_metrics_are_those_of_the_rows(measured):
    rows, base, metrics = measured
    table = metrics.profile[metrics.profile.column_name == ":table"]
    assert len(table) == 3 * 2 * 5 + 2 * 5  # *, 1 and 2 in two months, * and 1 in the baseline; with four slices each
    for row in table.itertuples():
        source = rows[rows.month == row.window_start.month] if row.log_type == "INPUT" else base
        these = part(source, row)
        assert row.count == len(these) and row.heuristic_loss == pytest.approx(log_loss(these, "heuristic"))
        assert row.loss_ratio == pytest.approx(loss_ratio(these)) and row.squares is None and row.spread is None
        assert row.error_cost == these.cost[(these.warning != these.late).fillna(False)].sum()
        assert row.largest_id == these.flight.max() and row.origins == sorted(these.origin.unique())
        assert row.is_good == (row.f1_score["weighted"] > 0.5)


def test_metrics_of_columns_are_in_the_rows_of_the_columns_in_slices_too(measured):
    rows, base, metrics = measured
    table = metrics.profile[metrics.profile.column_name.isin(["delay", "cost"])]
    assert set(table.slice_key.dropna()) == {"origin", "delay > 0"}
    for row in table.itertuples():
        source = rows[rows.month == row.window_start.month] if row.log_type == "INPUT" else base
        values = part(source, row)[row.column_name]
        assert row.squares == pytest.approx((values ** 2).mean()) and row.heuristic_loss is None
        assert row.spread == pytest.approx(values.std(ddof=0) / len(values)) and row.loss_ratio is None
    others = metrics.profile[~metrics.profile.column_name.isin([":table", "delay", "cost"])]
    assert others[[m.name for m in METRICS if m.type != "CUSTOM_METRIC_TYPE_DRIFT"]].isna().all(axis=None)


def test_drift_metrics_compare_a_window_with_the_one_before_and_with_the_baseline(measured):
    rows, base, metrics = measured
    compared = metrics.drift[metrics.drift.column_name.isin([":table", "cost"])]
    assert set(compared.drift_type) == {"CONSECUTIVE", "BASELINE"}
    for row in compared.itertuples():
        now = part(rows[rows.month == row.window_start.month], row)
        then = part(rows[rows.month == row.compared_start.month] if row.drift_type == "CONSECUTIVE" else base, row)
        if row.column_name == "cost":
            assert row.squares_delta == pytest.approx((now.cost ** 2).mean() - (then.cost ** 2).mean())
            assert row.loss_ratio_growth is None
            continue
        assert row.loss_ratio_growth == pytest.approx(loss_ratio(now) / loss_ratio(then))
        scores = [(frame.warning == frame.late)[frame.late.notna()].mean() for frame in (now, then)]
        assert row.accuracy_delta == pytest.approx(scores[0] - scores[1]) and row.squares_delta is None


def test_a_window_is_flagged_by_a_custom_metric(measured):
    rows, base, metrics = measured
    checked = compare_windows(metrics, Threshold("loss_ratio", at_most=1.0, times_baseline=True, min_rows=0))
    assert len(checked) == 4
    for (start, version), row in checked.iterrows():
        these = rows[(rows.month == start.month) & (rows.version == int(version))]
        assert row.value == pytest.approx(loss_ratio(these))
        assert row["count"] == these.late.notna().sum() < len(these), "min_rows counts rows with a label"
        limit = loss_ratio(base) if version == "1" else np.nan
        assert row.high == pytest.approx(limit, nan_ok=True) and row.broken == (row.value > limit)
    ids = compare_windows(metrics, Threshold("largest_id", at_most=0))
    assert ids["count"].sum() == len(rows), "a metric without labels is of all rows"
    growth = read_thresholds([{"metric": "loss_ratio_growth", "at_most": 0.1, "min_rows": 0}])
    assert [v["version"] for v in violations(metrics, growth, MONITOR, "1 month")] == ["1", "1"]


def test_the_metric_tables_have_the_columns_with_the_declared_types(home, measured):
    (spark, env), (_, _, metrics) = home, measured
    metrics = replace(metrics, profile=metrics.profile.query("column_name == ':table'"))
    plain = replace(MONITOR, custom_metrics=())
    write_metrics(spark, env, "watched", metrics, plain, "1 month")
    versions = []
    for _ in range(2):  # the second run changes nothing
        write_metrics(spark, env, "watched", metrics, MONITOR, "1 month")
        versions.append([tables.version(spark, env, f"watched_{kind}_metrics") for kind in ("profile", "drift")])
    assert versions[0] == versions[1]
    table = tables.read(spark, env, "watched_profile_metrics")
    assert dict(table.dtypes)["largest_id"] == "bigint" and dict(table.dtypes)["origins"] == "array<string>"
    whole = table.where("column_name = ':table' AND slice_key IS NULL").select("largest_id").collect()
    assert len(whole) == 8 and {row[0] for row in whole} == {BIG}
    write_metrics(spark, env, "watched", metrics, plain, "1 month")  # the metrics are removed from the monitor
    assert tables.read(spark, env, "watched_drift_metrics").where("loss_ratio_growth IS NOT NULL").count() == 0


def test_the_frames_have_no_column_whose_name_a_custom_metric_could_take(measured):
    from mlops_nb.monitoring.custom_metrics import HOME_COLUMNS
    from mlops_nb.monitoring.windows import GROUP
    _, _, metrics = measured
    known = {*profile_columns("model_id"), *GROUP, *HOME_COLUMNS, *(m.name for m in METRICS)}
    assert set(metrics.profile) <= known


def test_one_version_has_the_same_metrics_as_all_together(home):
    spark, env = home
    rows = spark.createDataFrame(predictions(200, 4, versions=(7,)))
    metrics = measure(spark, env, rows, replace(MONITOR, slicing_exprs=()), "1 month")
    parts = [metrics.part("INPUT", version) for version in ("*", "7")]
    assert len(parts[0]) == 2 and parts[0].loss_ratio.tolist() == parts[1].loss_ratio.tolist()
    growth = metrics.drift[metrics.drift.column_name == ":table"].set_index("model_id").loss_ratio_growth
    assert growth["*"] == growth["7"] and set(metrics.drift.drift_type) == {"CONSECUTIVE"}


@pytest.mark.parametrize("wrong, message", [
    (metric("AGGREGATE", "m", "avg(delai)"), "no column 'delai' in custom metric 'm'\n  did you mean 'delay'"),
    (metric("AGGREGATE", "m", "avg({{input_column}})", ("delai",)), "no column 'delai' in custom metric 'm'"),
    (metric("AGGREGATE", "m", "avg(delay"), "custom metric 'm': the engine cannot analyse the definition"),
    (metric("AGGREGATE", "m", "avg(delay); DROP TABLE x"), "the engine cannot analyse the definition"),
    (metric("AGGREGATE", "m", "delay + 1"), "the engine cannot analyse the definition"),
    (metric("AGGREGATE", "m", "no_function(delay)"), "the engine cannot analyse the definition: .*no_function"),
    (metric("AGGREGATE", "m", "collect_set(origin)"), "of type array<string>, but output_data_type is double"),
    (metric("DERIVED", "m", "log_los / 2"), "no metric 'log_los' in custom metric 'm'\n  did you mean 'log_loss'"),
    (metric("DERIVED", "m", "delay / 2"), "no metric 'delay' in custom metric 'm'"),
    (metric("DERIVED", "m", "f1_score.wrong"), "no metric 'f1_score.wrong' in custom metric 'm'"),
    (metric("DERIVED", "m", "sum(log_loss)"), "the engine cannot analyse the definition"),
    (metric("DERIVED", "m", "label_mean"), "no metric 'label_mean'"),  # not a column of Databricks' tables
    (metric("DRIFT", "m", "{{current_df}}.log_los"), "no metric 'log_los' in custom metric 'm'\n  did you mean"),
    (metric("DRIFT", "m", "log_loss"), "write {{current_df}}.log_loss or {{base_df}}.log_loss"),
    (metric("AGGREGATE", "stddev", "count(*)"), "custom metric 'stddev' has the name of a column")])
def test_wrong_metrics_are_found_before_anything_is_computed(home, monkeypatch, wrong, message):
    spark, env = home
    monitor, rows = replace(MONITOR, custom_metrics=(wrong,)), spark.createDataFrame(predictions(5, 1))
    monkeypatch.setattr(tables, "staged", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(MlopsError, match=message): measure(spark, env, rows, monitor, "1 month")


def test_the_names_of_the_groups_columns_are_not_for_custom_metrics(home):
    spark, env = home
    rows = spark.createDataFrame(predictions(5, 1)).withColumnRenamed("flight", "model_id")
    count = metric("AGGREGATE", "m", "count(model_id)")
    with pytest.raises(MlopsError, match=r"custom metrics cannot use the columns \['model_id'\]"):
        measure(spark, env, rows, replace(MONITOR, custom_metrics=(count,)), "1 month")


def test_an_error_in_the_rows_names_the_metric(home):
    spark, env = home
    others = (metric("AGGREGATE", "n", "count(*)"), metric("AGGREGATE", "m", "sum(100 / (cost - cost))"))
    with pytest.raises(MlopsError, match="(?i)^custom metric 'm' cannot be computed: .*zero.*\n.*nullif"):
        measure(spark, env, spark.createDataFrame(predictions(5, 1)), replace(MONITOR, custom_metrics=others),
                "1 month")


@pytest.mark.parametrize("change, message", [
    ({"slicing_exprs": ("orign",)}, "no column 'orign' in slicing_exprs: 'orign'\n  did you mean 'origin'"),
    ({"slicing_exprs": ("cost >",)}, "slicing_exprs: 'cost >': the engine cannot analyse the expression"),
    ({"sliced_columns": ("dela",)}, "no profiled column 'dela' in sliced_columns\n  did you mean 'delay'")])
def test_wrong_slices_are_found_before_anything_is_computed(home, change, message):
    spark, env = home
    with pytest.raises(MlopsError, match=message):
        measure(spark, env, spark.createDataFrame(predictions(5, 1)), replace(MONITOR, **change), "1 month")


@pytest.mark.parametrize("name, column, message", [
    ("squares", ":table", "'squares' has values for delay, cost, not for ':table'"),
    ("squares", "prediction", "'squares' has values for delay, cost, not for 'prediction'"),
    ("loss_ratio", "delay", "'loss_ratio' has values for :table, not for 'delay'"),
    ("avg", "warning", "'avg' has values for .*delay.*, not for 'warning'"),
    ("origins", ":table", "the metric 'origins' is not a number"),
    ("js_distance", "delay", "'js_distance' has values for late, warning|'js_distance' has values for warning, late")])
def test_a_limit_in_rows_without_the_metric_is_an_error(measured, name, column, message):
    _, _, metrics = measured
    with pytest.raises(MlopsError, match=message): compare_windows(metrics, Threshold(name, at_most=1, column=column))


def test_a_rate_uses_the_sums_of_its_column_and_ignores_other_aggregates(home):
    spark, env = home
    monitor = replace(MONITOR, slicing_exprs=(), custom_metrics=(
        metric("AGGREGATE", "total", "sum({{input_column}})", ("delay", "cost")),
        metric("AGGREGATE", "n", "count({{input_column}})", ("delay", "cost")),
        metric("DERIVED", "mean", "total / nullif(n, 0)", ("cost",)),
        metric("AGGREGATE", "mean_cost", "avg(cost)"),
        metric("AGGREGATE", "last", "max(origin)", data_type='"string"')))
    frame = predictions(600, 3, versions=(1,))
    rows = spark.createDataFrame(frame)
    metrics, threshold = measure(spark, env, rows, monitor, "1 month", baseline=rows), Threshold(
        "mean", column="cost", false_alarm_rate=0.01, side="both")
    limits = noise_limits(spark, rows, rows, metrics, monitor, "1 month", [threshold])[threshold]
    assert limits.reason.isna().all() and (limits.low < frame.cost.mean()).all()
    assert (limits.high > frame.cost.mean()).all() and (limits.high - limits.low < 2).all()
    with pytest.raises(MlopsError, match="'wrong' .* uses custom metric 'last', which is string, not a number"):
        check_rates(replace(monitor, custom_metrics=(*monitor.custom_metrics, metric("DERIVED", "wrong", "last"))),
                    [Threshold("wrong", false_alarm_rate=0.01)])
