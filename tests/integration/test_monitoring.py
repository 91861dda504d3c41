"""Metric tables of random predictions on Sail, compared with pandas, SciPy and scikit-learn on the rows."""
from dataclasses import replace
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import profiles
from mlops_nb.monitoring.drift import number_drift
from mlops_nb.monitoring.metric_tables import drift_columns, measure, profile_columns, write_metrics
from mlops_nb.monitoring.noise import (
    baseline_days,
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
def metrics(home):
    spark, env = home
    rows = predictions(6000, 1)
    base = predictions(2000, 2).query("at < '2013-03-30 00:00Z'").assign(version=np.int32(1))
    measured = measure(spark, env, as_spark(spark, rows), MONITOR, "1 month", FEATURES, baseline=as_spark(spark, base))
    rows, base = (f.assign(delay=f.delay.mask(f.distance == 0)) for f in (rows, base))
    return rows.assign(month=rows["at"].dt.tz_convert(ZONE).dt.tz_localize(None).dt.to_period("M")), base, measured


def row_of(frame, column, month=None, version="*", key=None, value=None, zone=ZONE, **more):
    "The single row of a metric frame with these values."
    start = pd.Timestamp(month.start_time, tz=ZoneInfo(zone)) if month is not None else None
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


def quantiles_of(rows) -> list:
    "For each share k/1000 the smallest value that this share of the rows does not exceed."
    ordered = np.sort(np.asarray(rows, dtype=float))
    return ordered[[max(0, -(-k * len(ordered) // 1000) - 1) for k in range(1001)]].tolist()


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
            assert result["quantiles"].tolist() == pytest.approx(quantiles_of(values.dropna()), rel=1e-11)
            assert result["median"] == result["quantiles"][500]
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
            assert result.ks_test["statistic"] == pytest.approx(stats.ks_2samp(now, then).statistic, abs=0.001)
            reference = stats.wasserstein_distance(now, then)
            assert result.wasserstein_distance == pytest.approx(reference, abs=0.001 * then.std())
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
    for granularity, rows in (("1 month", 20), ("1 week", 10), ("1 week", 3)):
        some = replace(measured, profile=measured.profile.head(rows), drift=measured.drift.head(rows))
        write_metrics(spark, env, "both", some, MONITOR, granularity)
    for kind in ("profile", "drift"):
        counts = tables.read(spark, env, f"both_{kind}_metrics").groupBy("granularity").count().collect()
        assert dict(map(tuple, counts)) == {"1 month": 20, "1 week": 3}


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


# errors of the buckets

SAMPLES = {"skewed": lambda random, n: random.lognormal(0, 2, n), "counts": lambda random, n: random.poisson(2.5, n),
           "rounded": lambda random, n: random.normal(0, 1, n).round(3),
           "two peaks": lambda random, n: np.where(random.random(n) < 0.4, 0, random.exponential(1, n))}


def described_and_drift(samples: list):
    "Profile of each sample, and the drift of each from the one before."
    counts = [profiles.count_numbers(np.sort(np.asarray(sample, dtype=float))) for sample in samples]
    described = pd.DataFrame([profiles.describe_numbers(own) for own in counts])
    drift = pd.DataFrame([number_drift(now, then) for then, now in zip(counts, counts[1:], strict=False)])
    return counts, described, drift


def ks_of(now, then) -> float:
    "The largest difference of the shares of rows up to a value; SciPy's ks_2samp divides by zero for single rows."
    values = np.union1d(now, then)
    shares = [np.searchsorted(np.sort(rows), values, side="right") / len(rows) for rows in (now, then)]
    return float(np.abs(shares[0] - shares[1]).max())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(SAMPLES)), st.integers(1, 6000), st.integers(1, 6000),
       st.floats(0.5, 1.5))
def test_quantiles_are_exact_and_drift_is_within_its_bounds(seed, kind, n, m, factor):
    random, sample = np.random.default_rng(seed), SAMPLES[kind]
    then, now = sample(random, n).astype(float), sample(random, m) * factor
    counts, described, drift = described_and_drift([then, now])
    for rows, result in zip((then, now), described.itertuples(), strict=True):
        assert result.quantiles.tolist() == quantiles_of(rows) and result.distinct_count == len(np.unique(rows))
        assert [result.avg, result.min, result.max] == pytest.approx([rows.mean(), rows.min(), rows.max()])
        deviation = rows.std(ddof=1) if len(rows) > 1 else np.nan
        assert result.stddev == pytest.approx(deviation, nan_ok=True)
    is_exact = max(len(np.unique(then)), len(np.unique(now))) <= profiles.BUCKETS
    distance = stats.wasserstein_distance(now, then)
    assert abs(drift.ks_test[0]["statistic"] - ks_of(now, then)) <= (1e-12 if is_exact else 1e-3)
    bound = 2e-3 * (np.ptp(now) + np.ptp(then))
    assert abs(drift.wasserstein_distance[0] - distance) <= 1e-9 * (1 + distance) + (0 if is_exact else bound)
    assert max(len(own.n) for own in counts) <= profiles.BUCKETS


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_a_window_far_from_all_others_is_measured_as_exactly(share):
    "Buckets of pooled rows were as coarse as a small window whose values all lie in the tail of the others."
    random = np.random.default_rng(0)
    then, now = random.lognormal(0, 1, 20000), random.lognormal(5, 1, int(20000 * share))
    _, described, drift = described_and_drift([then, now])
    assert described["quantiles"][1][999] == quantiles_of(now)[999]
    assert drift.ks_test[0]["statistic"] == pytest.approx(stats.ks_2samp(now, then).statistic, abs=1e-3)
    assert drift.wasserstein_distance[0] == pytest.approx(stats.wasserstein_distance(now, then), rel=1e-3)


# infinite values and NaN

@pytest.mark.parametrize("n", [100, 3000])  # with a bucket for each value, and with shared buckets
def test_an_infinite_value_changes_only_its_own_window(n):
    random = np.random.default_rng(0)
    months = [random.normal(0, 1, n), random.normal(0, 1, n), random.normal(100, 1, n)]
    spoiled = [months[0], np.append(months[1][1:], np.inf), months[2]]
    _, clean, _ = described_and_drift(months)
    counts, described, drift = described_and_drift(spoiled)
    for column in ("avg", "stddev", "min", "max", "quantiles", "num_nan"):
        for i in (0, 2): np.testing.assert_array_equal(described[column][i], clean[column][i])
    spoiled_month = described.loc[1]
    assert (spoiled_month.avg, spoiled_month["max"]) == (np.inf, np.inf) and np.isnan(spoiled_month.stddev)
    assert spoiled_month["quantiles"].tolist() == quantiles_of(spoiled[1])
    assert drift.wasserstein_distance.tolist() == [np.inf, np.inf]
    assert [test["statistic"] for test in drift.ks_test] == pytest.approx(
        [stats.ks_2samp(a, b).statistic for a, b in zip(spoiled, spoiled[1:], strict=False)], abs=1e-3)
    assert drift.population_stability_index[1] > 1


def test_equal_shares_of_infinite_values_leave_the_distance_of_the_others():
    then, now = np.array([-np.inf, 0, 0, np.inf] * 30), np.array([-np.inf, 5, 5, np.inf] * 70)
    _, described, drift = described_and_drift([then, now])
    assert drift.wasserstein_distance.tolist() == [2.5] and described.avg.isna().all()
    assert described["min"].tolist() == [-np.inf] * 2 and described["max"].tolist() == [np.inf] * 2


def test_the_largest_numbers_leave_other_windows_alone():
    largest = np.finfo(float).max
    _, described, _ = described_and_drift([np.array([1.0, 3]), np.array([largest, largest, 1])])
    assert described.avg[0] == 2 and described["max"][1] == largest and described["median"][1] == largest


def small_rows(spark, *rows, columns="at string, version string, warning boolean, x double"):
    frame = spark.createDataFrame([*rows], columns)
    return frame.selectExpr("CAST(at AS TIMESTAMP) AS at", *(name for name in frame.columns if name != "at"))


def test_metric_tables_with_infinite_values_can_be_read(home):
    spark, env = home
    rows = small_rows(spark, *[(f"2013-0{month}-05", "1", True, x) for month, x in
                               ((1, 1.0), (1, 3.0), (2, float("inf")), (2, float("nan")), (3, 7.0))])
    monitor = Monitor("at", "version", "warning")
    write_metrics(spark, env, "infinite", measure(spark, env, rows, monitor, "1 month", ["x"]), monitor, "1 month")
    profile = tables.read(spark, env, "infinite_profile_metrics").where("column_name = 'x' AND version = '1'")
    values = [tuple(row) for row in profile.orderBy("window.start").select("avg", "max", "num_nan").collect()]
    assert values == [(2.0, 3.0, 0), (float("inf"), float("inf"), 1), (7.0, 7.0, 0)]


def test_a_probability_or_a_label_that_is_nan_is_missing(home):
    spark, env = home
    nan = float("nan")
    rows = [(0.9, 1.0, 1.0), (0.2, 0.0, 0.0), (0.6, 1.0, 0.0), (0.6, nan, 1.0), (nan, 0.0, 0.0), (nan, 1.0, 1.0),
            (0.2, 1.0, nan), (None, 0.0, 0.0), (0.9, 1.0, None), (float("inf"), 1.0, 1.0), (1.5, 1.0, 1.0)]
    columns = "at string, version string, prediction double, warning double, late double"
    frame = small_rows(spark, *(("2013-04-05", "1", *row) for row in rows), columns=columns)
    monitor = Monitor("at", "version", "warning", "late", "prediction")
    measured = measure(spark, env, frame, monitor, "1 month")
    result = measured.part("INPUT").iloc[0]
    assert (result["count"], result.labelled, result.evaluated) == (11, 9, 4)
    assert result.log_loss == pytest.approx(sklearn.metrics.log_loss([1, 0, 0, 1], [0.9, 0.2, 0.6, 0.6]))
    area = sklearn.metrics.roc_auc_score([1, 0, 0, 1], [0.9, 0.2, 0.6, 0.6])
    assert result.roc_auc_score["one_vs_one"]["weighted"] == area
    assert result.accuracy_score == pytest.approx(7 / 9)  # a missing class counts as wrong
    nans = measured.profile.query("model_id == '1'").set_index("column_name").num_nan
    assert (nans["prediction"], nans["late"], nans["warning"]) == (2, 1, 1)


def test_both_zeros_are_one_value_and_large_numbers_are_distinct(home):
    "Row i has the id 10**18 + i; a double has 53 bits. The dates are local days."
    spark, env = home
    ids = [10**18 + i for i in range(4)]
    values = zip(["0.0", "-0.0", "0.0", "1.0"], ["-0.0", "0.0", "0.0", "1.0"], ids, strict=True)
    rows = ", ".join(f"(CAST('{label}' AS DOUBLE), CAST('{other}' AS DOUBLE), {i})" for label, other, i in values)
    frame = spark.sql("SELECT DATE'2013-04-01' AS at, y AS late, z AS version, z AS warning, z AS prediction, id, "
                      f"CAST(id + 0.25BD AS DECIMAL(38,2)) AS amount FROM VALUES {rows} AS t(y, z, id)")
    monitor = Monitor("at", "version", "warning", "late", "prediction", slicing_exprs=("late",), time_zone=ZONE)
    measured = measure(spark, env, frame, monitor, "1 day", ["id", "amount"])
    table = measured.part("INPUT").iloc[0]
    assert (table.accuracy_score, table.roc_auc_score["one_vs_one"]["macro"]) == (1, 1)
    assert measured.part("INPUT").index.tolist() == [pd.Timestamp("2013-04-01", tz=ZoneInfo(ZONE))]
    profile = measured.profile[measured.profile.model_id == "*"].set_index("column_name")
    slices = profile.loc[":table"].dropna(subset="slice_key")
    assert dict(zip(slices.slice_value, slices["count"], strict=True)) == {"0.0": 3, "1.0": 1}
    assert set(measured.profile.model_id) == {"*", "0.0", "1.0"}
    whole = profile[profile.slice_key.isna()]
    assert whole.distinct_count[["late", "prediction", "id", "amount"]].tolist() == [2, 2, 4, 4]
    assert window_days(frame, monitor, "1 week").tolist() == [1, 1]
    assert profile[profile.slice_value == "0.0"].distinct_count[["id", "amount"]].tolist() == [3, 3]


def test_a_column_of_nan_and_one_other_value_keeps_its_nan(home):
    spark, env = home
    rows = small_rows(spark, *[("2013-04-05", "1", True, x) for x in (0.5, float("nan"), 0.5)])
    result = row_of(measure(spark, env, rows, Monitor("at", "version", "warning"), "1 month", ["x"]).profile, "x",
                    pd.Period("2013-04"), zone="UTC")
    assert (result.num_nan, result.avg, result.distinct_count) == (1, 0.5, 1)


# rows without a version, a time or a slice

@pytest.mark.parametrize("versions, expected", [
    (("1", None), {"*": [10], "1": [5], "2": [], None: [5]}), ((None, None), {"*": [10], "1": [], "2": [], None: [10]}),
    (("1", "2"), {"*": [10], "1": [5], "2": [5], None: []})])
def test_all_versions_together_contain_the_rows_without_one(home, versions, expected):
    spark, env = home
    rows = small_rows(spark, *[("2013-01-05", version, True, float(i)) for version in versions for i in range(5)])
    monitor = Monitor("at", "version", "warning")
    measured = measure(spark, env, rows, monitor, "1 month", ["x"], baseline=rows.drop("at"))
    assert {version: measured.part("INPUT", version)["count"].tolist() for version in expected} == expected
    assert {version: measured.part("BASELINE", version)["count"].tolist() for version in expected} == expected
    drift = measured.drift[measured.drift.column_name == "x"]  # each version has its own baseline
    assert len(drift) == len([rows for rows in expected.values() if rows]) and (drift.wasserstein_distance == 0).all()


def test_rows_without_a_time_are_reported_and_in_no_window(home):
    spark, env = home
    rows = [("2013-01-05", "1", True, 1.0)] * 5 + [(None, "1", True, 100.0)] * 4 + [(None, "2", True, 100.0)]
    monitor = Monitor("at", "version", "warning")
    measured = measure(spark, env, small_rows(spark, *rows), monitor, "1 month", ["x"])
    assert measured.without_time == 5 and measured.part("INPUT")["count"].tolist() == [5]
    assert measured.drift.empty and measured.profile["max"].max() == 1 and "2" not in set(measured.profile.model_id)
    write_metrics(spark, env, "timeless", measured, monitor, "1 month")
    assert tables.read(spark, env, "timeless_profile_metrics").where("window IS NULL").count() == 0
    with pytest.raises(MlopsError, match="none of the 5 rows to be monitored has a time\n  fill the column 'at'"):
        measure(spark, env, small_rows(spark, *rows[5:]), monitor, "1 month", ["x"])


def test_a_version_named_like_all_versions_is_refused(home):
    spark, env = home
    rows = small_rows(spark, ("2013-01-05", "*", True, 1.0), ("2013-01-05", "1", True, 1.0))
    with pytest.raises(MlopsError, match="a model version is named '\\*'"):
        measure(spark, env, rows, Monitor("at", "version", "warning"), "1 month", ["x"])


def test_the_text_null_is_a_slice_and_a_value_of_its_own(home):
    spark, env = home
    values = ["null"] * 3 + [None] * 5 + ["a"] * 2
    frame = spark.createDataFrame([("2013-01-05", "1", True, value) for value in values],
                                  "at string, version string, warning boolean, origin string")
    rows = frame.selectExpr("CAST(at AS TIMESTAMP) AS at", "version", "warning", "origin")
    monitor = Monitor("at", "version", "warning", slicing_exprs=("origin",))
    measured = measure(spark, env, rows, monitor, "1 month", ["origin"], baseline=rows.where("origin IS NOT NULL"))
    inputs = measured.profile[(measured.profile.log_type == "INPUT") & (measured.profile.model_id == "1")]
    slices = inputs[(inputs.column_name == ":table") & (inputs.slice_key == "origin")]
    assert dict(zip(slices.slice_value.fillna("-"), slices["count"], strict=True)) == {"null": 3, "-": 5, "a": 2}
    column = inputs[(inputs.column_name == "origin") & inputs.slice_key.isna()].iloc[0]
    assert column.frequent_items == [{"item": "null", "count": 3}, {"item": "a", "count": 2}] and column.num_nulls == 5
    drift = measured.drift[(measured.drift.column_name == ":table") & (measured.drift.model_id == "1")]
    assert set(drift.slice_value[drift.slice_key == "origin"]) == {"null", "a"}  # the baseline has no null slice
    write_metrics(spark, env, "sliced", measured, monitor, "1 month")
    table = tables.read(spark, env, "sliced_profile_metrics").where("column_name = ':table' AND version = '*'")
    counted = table.where("log_type = 'INPUT' AND slice_key = 'origin'").select("slice_value", "count").collect()
    assert dict(map(tuple, counted)) == {"null": 3, None: 5, "a": 2}


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


def test_rows_without_a_version_have_the_limits_of_a_version_and_rows_without_a_time_are_no_day(home, limited):
    "Half of the rows have version 1, and copies of them none; the baseline has rows without a time."
    spark, env = home
    rows, base = (frame.where("version = 1") for frame in limited[2:])
    rows = rows.where("at BETWEEN TIMESTAMP'2013-04-01 04:00:00Z' AND TIMESTAMP'2013-05-01 03:59:59Z'")
    base = base.unionByName(base.limit(7).selectExpr("CAST(NULL AS TIMESTAMP) AS at", *base.columns[1:]))
    names = ["at", "round(prediction, 1) AS prediction", "warning", "late"]
    rows, base = (frame.selectExpr(*names, "stack(2, '1', CAST(NULL AS STRING)) AS (version)")
                  for frame in (rows, base))
    measured = measure(spark, env, rows, OBSERVED_TO_EXPECTED, "1 month", baseline=base)
    limits = noise_limits(spark, rows, base, measured, OBSERVED_TO_EXPECTED, "1 month", [TWO_SIDED, INDEX])
    for threshold in (TWO_SIDED, INDEX):
        checked = compare_windows(measured, threshold, limits).reset_index()
        own, unversioned = (checked[checked.model_id.isna() == missing] for missing in (False, True))
        assert len(own) and np.isfinite(own.high).all() and own.reason.isna().all()
        columns = ["window_start", "low", "high", "value"]
        assert unversioned[columns].to_numpy().tolist() == own[columns].to_numpy().tolist()
    days = baseline_days(base, OBSERVED_TO_EXPECTED, [])
    assert days.count("1") == days.count(None) == limited[1]["at"].dt.tz_convert(ZONE).dt.date.nunique()


def test_a_mean_cannot_be_added_up_over_days(home, limited):
    mean = metric("expected", "AGGREGATE", "avg(prediction)")
    metrics = (OBSERVED_TO_EXPECTED.custom_metrics[0], mean, OBSERVED_TO_EXPECTED.custom_metrics[2])
    with pytest.raises(MlopsError, match="the aggregate expected is no sum over rows"):
        limits_of(home, limited, replace(OBSERVED_TO_EXPECTED, custom_metrics=metrics))
