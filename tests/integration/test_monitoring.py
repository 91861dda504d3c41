"""Metric tables of random predictions on Sail, compared with pandas, SciPy and scikit-learn on the rows."""
from dataclasses import replace
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics
from scipy import stats

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring.metric_tables import drift_columns, measure, profile_columns, write_metrics
from mlops_nb.monitoring.noise import (
    difference_noise,
    drift_noise,
    noise_limits,
    sums_statistic,
    window_days,
)
from mlops_nb.monitoring.thresholds import Threshold, compare_windows, unchecked
from mlops_nb.monitoring.windows import CustomMetric, Monitor

ZONE = "America/New_York"
MONITOR = Monitor("at", "version", "warning", "late", "prediction", slicing_exprs=("origin", "distance > 1000"),
                  time_zone=ZONE)
FEATURES = ("delay", "distance", "carrier", "day")


def predictions(rows: int, seed: int) -> pd.DataFrame:
    "Predictions of three months by two versions, with nulls, NaN, unknown labels, and a shift in May."
    random = np.random.default_rng(seed)
    at = pd.Timestamp("2013-03-15", tz="UTC") + pd.to_timedelta(random.integers(0, 90 * 86400, rows), unit="s")
    late = random.random(rows) < 0.3
    frame = pd.DataFrame({
        "at": at, "version": np.where(at < pd.Timestamp("2013-05-10", tz="UTC"), 1, 2).astype("int32"),
        "late": pd.array(late, "boolean"),
        "prediction": np.clip(0.3 + 0.2 * late + 0.15 * random.normal(size=rows), 0.01, 0.99).round(3),
        "delay": random.normal(1013 + 3 * (at.month == 5), 7, rows),
        "distance": random.integers(100, 3000, rows).astype("int32"),
        "carrier": random.choice(["UA", "B6", "DL", None], rows, p=[0.5, 0.3, 0.1, 0.1]),
        "origin": random.choice(["EWR", "JFK"], rows),
        "day": at.tz_convert(ZONE).date})
    frame.loc[random.random(rows) < 0.05, "late"] = pd.NA
    frame.loc[random.random(rows) < 0.1, "delay"] = np.nan
    frame.loc[:40, "distance"] = 0
    return frame.assign(warning=frame.prediction >= 0.4)


def as_spark(spark, frame: pd.DataFrame):
    "Convert the frame to Spark; missing delays are null, and those of distance 0 are NaN."
    missing = frame.delay.isna() & (frame.distance != 0)
    delay = pa.array(frame.delay.mask(frame.distance == 0).to_numpy(), mask=missing.to_numpy())
    table = pa.Table.from_pandas(frame.drop(columns="delay"), preserve_index=False)
    return spark.createDataFrame(table.append_column("delay", delay))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    env = replace(load_env("dev"), engine="sail", lakehouse=str(tmp_path_factory.mktemp("lakehouse")))
    yield get_spark(env), env
    stop()


@pytest.fixture(scope="module")
def metrics(home):
    spark, env = home
    rows = predictions(6000, 1)
    base = predictions(2000, 2).query("at < '2013-03-30 00:00Z'").assign(version=np.int32(1))
    measured = measure(spark, env, as_spark(spark, rows), MONITOR, "1 month", FEATURES, baseline=as_spark(spark, base))
    rows, base = (f.assign(delay=f.delay.mask(f.distance == 0)) for f in (rows, base))
    return rows.assign(month=rows["at"].dt.tz_convert(ZONE).dt.tz_localize(None).dt.to_period("M")), base, measured


def row_of(frame, column, month=None, version="*", key=None, value=None, **more):
    "The single row of a metric frame with these values."
    start = pd.Timestamp(month.start_time, tz=ZoneInfo(ZONE)) if month is not None else None
    selected = (frame.column_name == column) & (frame.model_id == version)
    selected &= frame.slice_key.isna() if key is None else (frame.slice_key == key) & (frame.slice_value == value)
    selected &= frame.window_start.isna() if start is None else frame.window_start == start
    for name, expected in more.items(): selected &= frame[name] == expected
    assert selected.sum() == 1
    return frame[selected].iloc[0]


def groups_of(rows, base):
    "Each group of the metric tables, with its rows."
    for version in ("*", "1", "2"):
        own = rows if version == "*" else rows[rows.version == int(version)]
        for month, these in own.groupby("month"):
            yield these, dict(month=month, version=version)
            for origin, sliced in these.groupby("origin"):
                yield sliced, dict(month=month, version=version, key="origin", value=origin)
            far = these[these.distance > 1000]
            yield far, dict(month=month, version=version, key="distance > 1000", value="true")
    for version in ("*", "1"): yield base, dict(version=version)


def test_profiles_are_those_of_the_rows(metrics):
    rows, base, measured = metrics
    for these, group in groups_of(rows, base):
        for column in ("delay", "distance", "prediction"):
            result, values = row_of(measured.profile, column, **group), these[column]
            nan = (these.distance == 0).sum() if column == "delay" else 0
            assert (result["count"], result.num_nulls, result.num_nan, result.num_zeros) == (
                len(values), values.isna().sum() - nan, nan, (values == 0).sum())
            assert result.distinct_count == values.nunique()
            assert result.percent_distinct == pytest.approx(100 * values.nunique() / len(values))
            reference = [values.min(), values.max(), values.mean(), values.std()]
            assert [result["min"], result["max"], result["avg"], result["stddev"]] == pytest.approx(reference)
            spread = np.nanquantile(values, 0.75) - np.nanquantile(values, 0.25)
            assert result["median"] == pytest.approx(values.median(), abs=0.03 * spread)
            assert len(result["quantiles"]) == 1001
        carriers = row_of(measured.profile, "carrier", **group)
        assert {i["item"]: i["count"] for i in carriers.frequent_items} == these.carrier.value_counts().to_dict()
        assert (carriers.num_nulls, carriers.distinct_count) == (these.carrier.isna().sum(), these.carrier.nunique())
        assert carriers.avg_length == 2


def test_a_date_is_profiled_in_seconds(metrics):
    rows, _, measured = metrics
    month = rows.month.min()
    result = row_of(measured.profile, "day", month)
    assert result["min"] == pd.Timestamp(min(rows[rows.month == month].day)).timestamp() and result.data_type == "date"
    assert pd.isna(row_of(measured.drift, "day", rows.month.max(), drift_type="BASELINE").population_stability_index)


def test_quality_is_scikit_learns(metrics):
    rows, base, measured = metrics
    for these, group in groups_of(rows, base):
        known = these[these.late.notna()]
        label, result = known.late.astype(bool), row_of(measured.profile, ":table", **group)
        assert result["count"] == len(these) and result.labelled == len(known)
        assert result.log_loss == pytest.approx(sklearn.metrics.log_loss(label, known.prediction))
        area = sklearn.metrics.roc_auc_score(label, known.prediction)
        assert result.roc_auc_score["one_vs_one"]["weighted"] == pytest.approx(area)
        assert result.accuracy_score == pytest.approx(sklearn.metrics.accuracy_score(label, known.warning))
        reference = sklearn.metrics.precision_recall_fscore_support(label, known.warning, average="weighted")
        assert [result[s]["weighted"] for s in ("precision", "recall", "f1_score")] == pytest.approx(reference[:3])
        assert [result.label_mean, result.probability_mean] == pytest.approx([label.mean(), known.prediction.mean()])


def test_drift_is_scipys(metrics):
    rows, base, measured = metrics
    for month in rows.month.unique():
        these = rows[rows.month == month]
        for column in ("delay", "prediction"):
            result = row_of(measured.drift, column, month, drift_type="BASELINE")
            now, then = these[column].dropna(), base[column].dropna()
            assert result.ks_test["statistic"] == pytest.approx(stats.ks_2samp(now, then).statistic, abs=0.005)
            reference = stats.wasserstein_distance(now, then)
            assert result.wasserstein_distance == pytest.approx(reference, rel=0.02, abs=0.002 * then.std())
            assert result.avg_delta == pytest.approx(now.mean() - then.mean())
        now, then = (f.carrier.value_counts(normalize=True).reindex(["B6", "DL", "UA"]) for f in (these, base))
        result = row_of(measured.drift, "carrier", month, drift_type="BASELINE")
        middle = (now + then) / 2
        divergence = (stats.entropy(now, middle, base=2) + stats.entropy(then, middle, base=2)) / 2
        assert result.js_distance == pytest.approx(np.sqrt(divergence))
        assert result.tv_distance == pytest.approx(abs(now - then).sum() / 2)


def test_the_shifted_month_has_the_largest_drift(metrics):
    rows, _, measured = metrics
    months = sorted(rows.month.unique())
    index = [row_of(measured.drift, "delay", m, drift_type="BASELINE").population_stability_index for m in months]
    assert [i > 0.1 for i in index] == [str(m) == "2013-05" for m in months]
    steps = measured.drift.query("column_name == 'delay' and model_id == '*' and slice_key.isna()")
    assert (steps.drift_type == "CONSECUTIVE").sum() == len(months) - 1


def test_the_tables_have_databricks_columns_and_a_second_run_changes_nothing(home, metrics):
    (spark, env), (_, _, measured) = home, metrics
    for _ in range(2): write_metrics(spark, env, "watched", measured, MONITOR, "1 month", commit=7)
    for kind, columns in (("profile", profile_columns("version")), ("drift", drift_columns("version"))):
        table = tables.read(spark, env, f"watched_{kind}_metrics")
        assert table.columns == list(columns) and tables.version(spark, env, f"watched_{kind}_metrics") == 1
    quality = tables.read(spark, env, "watched_profile_metrics").where(
        "column_name = ':table' AND slice_key IS NULL AND log_type = 'INPUT' AND logging_table_commit_version = 7")
    assert quality.where("version = '*'").count() == 4 and quality.where("f1_score.weighted > 0").count() == 4 + 3 + 2


def test_other_granularities_stay(home, metrics):
    (spark, env), (_, _, measured) = home, metrics
    write_metrics(spark, env, "both", measured, MONITOR, "1 month")
    before = tables.read(spark, env, "both_profile_metrics").count()
    write_metrics(spark, env, "both", measured, MONITOR, "1 week")
    write_metrics(spark, env, "both", replace(measured, profile=measured.profile.head(3)), MONITOR, "1 week")
    counts = tables.read(spark, env, "both_profile_metrics").groupBy("granularity").count().collect()
    assert dict(map(tuple, counts)) == {"1 month": before, "1 week": 3}


def test_rows_without_a_baseline_have_consecutive_drift_only(home):
    spark, env = home
    rows = spark.createDataFrame(predictions(300, 3)[["at", "version", "prediction", "warning"]])
    measured = measure(spark, env, rows, Monitor("at", "version", "warning", time_zone=ZONE), "1 month", ["prediction"])
    assert set(measured.drift.drift_type) == {"CONSECUTIVE"} and "log_loss" not in measured.profile


def test_one_window_without_baseline_has_no_drift(home):
    spark, env = home
    rows = spark.createDataFrame(predictions(50, 3)[["at", "version", "prediction", "warning"]])
    monitor = Monitor("at", "version", "warning", time_zone=ZONE)
    measured = measure(spark, env, rows, monitor, "1 year", ["prediction"])
    write_metrics(spark, env, "short", measured, monitor, "1 year")
    assert measured.drift.empty and tables.read(spark, env, "short_drift_metrics").count() == 0


def test_no_rows_are_an_error(home):
    spark, env = home
    rows = spark.createDataFrame(predictions(5, 3)[["at", "version", "prediction", "warning"]]).where("false")
    with pytest.raises(MlopsError, match="there are no rows"):
        measure(spark, env, rows, Monitor("at", "version", "warning"), "1 day", ["prediction"])


# limits from the noise of the baseline

DOUBLE = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'


def metric(name, kind, definition):
    return CustomMetric(name, f"CUSTOM_METRIC_TYPE_{kind}", (":table",), definition, DOUBLE)


OBSERVED_TO_EXPECTED = replace(MONITOR, slicing_exprs=(), custom_metrics=(
    metric("observed", "AGGREGATE", "sum(CAST({{label_col}} AS DOUBLE))"),
    metric("expected", "AGGREGATE", "sum(CASE WHEN {{label_col}} IS NOT NULL THEN prediction END)"),
    metric("observed_to_expected", "DERIVED", "observed / nullif(expected, 0)")))
TWO_SIDED = Threshold("observed_to_expected", false_alarm_rate=0.1, side="both", min_rows=0)
INDEX = Threshold("population_stability_index", column="prediction", at_most=0.001, false_alarm_rate=0.1, min_rows=0)


@pytest.fixture(scope="module")
def limited(home):
    "Rows of two versions; the first has a baseline of 30 days."
    spark, _ = home
    rows = predictions(3000, 1)[["at", "version", "prediction", "warning", "late"]]
    base = predictions(6000, 2)[list(rows)].query("at < '2013-04-14 04:00Z'").assign(version=np.int32(1))
    return rows, base, spark.createDataFrame(rows), spark.createDataFrame(base)


def limits_of(home, limited, monitor=OBSERVED_TO_EXPECTED, granularity="1 month", first="2013-01-01"):
    spark, env = home
    _, _, rows, base = limited
    base = base.where(f"at >= TIMESTAMP'{first}'")
    measured = measure(spark, env, rows, monitor, granularity, baseline=base)
    thresholds = [TWO_SIDED, INDEX]
    return measured, noise_limits(spark, rows, base, measured, monitor, granularity, thresholds)


@pytest.fixture(scope="module")
def measured_and_limits(home, limited): return limits_of(home, limited)


def test_limits_are_those_of_the_days_of_the_rows(limited, measured_and_limits):
    (rows, base, frame, _), (measured, limits) = limited, measured_and_limits
    day = base["at"].dt.tz_convert(ZONE).dt.date
    known = base.late.notna()
    sums = np.column_stack([base.late[known].astype(float).groupby(day[known]).sum(),
                            base.prediction[known].groupby(day[known]).sum()])
    value, count = sums[:, 0].sum() / sums[:, 1].sum(), len(sums)
    statistic = sums_statistic(sums, lambda drawn: drawn[:, 0] / drawn[:, 1])
    checked = compare_windows(measured, TWO_SIDED, limits)
    for (start, version), size in window_days(frame, OBSERVED_TO_EXPECTED, "1 month").items():
        own = rows[(rows.version == int(version)) & (rows["at"] >= start)]
        local = own["at"].dt.tz_convert(ZONE)
        assert size == local[local.dt.month == start.tz_convert(ZONE).month].dt.date.nunique()
        row = checked.loc[(start, version)]
        if version == "2": assert np.isnan([row.low, row.high]).all() and row.reason == "there is no baseline"
        else:
            noise = difference_noise(statistic, count, size, 0.9)
            assert [row.low, row.high] == pytest.approx([value + noise.low, value + noise.high])
    assert unchecked(measured, [TWO_SIDED], limits) == [
        "2 windows are not compared with the limit of observed to expected: there is no baseline"]


def test_limits_of_drift_are_those_of_the_counts_of_the_days(limited, measured_and_limits):
    base, (measured, limits) = limited[1], measured_and_limits
    counts = pd.crosstab(base["at"].dt.tz_convert(ZONE).dt.date, base.prediction)
    expected = drift_noise(INDEX.metric, counts.to_numpy(), counts.columns.to_numpy(), 30, 0.8)
    april = compare_windows(measured, INDEX, limits).xs("1", level="model_id").iloc[1]  # 30 days; buckets merge values
    assert april.high == pytest.approx(expected.high, rel=0.01) and april.high > INDEX.at_most
    assert not april.broken and april.low == -np.inf


def test_a_short_baseline_flags_nothing_and_gives_the_reason(home, limited):
    measured, limits = limits_of(home, limited, first="2013-04-05 04:00:00Z")
    reasons = compare_windows(measured, TWO_SIDED, limits).reason.xs("1", level="model_id").unique().tolist()
    assert reasons == ["the baseline has 9 days, and the noise needs 14"]
    assert not any(compare_windows(measured, t, limits).broken.any() for t in (TWO_SIDED, INDEX))


def test_a_mean_cannot_be_added_up_over_days(home, limited):
    mean = metric("expected", "AGGREGATE", "avg(prediction)")
    metrics = (OBSERVED_TO_EXPECTED.custom_metrics[0], mean, OBSERVED_TO_EXPECTED.custom_metrics[2])
    with pytest.raises(MlopsError, match="the aggregate expected is no sum over rows"):
        limits_of(home, limited, replace(OBSERVED_TO_EXPECTED, custom_metrics=metrics))
