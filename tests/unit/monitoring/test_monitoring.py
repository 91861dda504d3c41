"""Profiles, quality, drift and thresholds, compared with SciPy, scikit-learn and pandas."""
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import drift, metric_tables, profiles, quality, thresholds, windows
from mlops_nb.monitoring.windows import GROUP, Monitor, as_monitor, parse_granularity, window_end
from mlops_nb.pictures import canvas

MONITOR = Monitor("at", "version", "warning", "late", "prediction", time_zone="America/New_York")


def counts(k): return st.lists(st.integers(0, 60), min_size=k, max_size=k).filter(any).map(np.array)


pairs = st.integers(1, 12).flatmap(lambda k: st.tuples(counts(k), counts(k)))


@given(pairs)
def test_ks_test_is_scipys(two):
    now, then = two
    assume(min(now.sum(), then.sum()) > 2)  # SciPy divides by zero for single rows
    values = np.arange(len(now))
    reference = stats.ks_2samp(np.repeat(values, now), np.repeat(values, then), method="asymp")
    assert drift.ks_test(now, then)["statistic"] == pytest.approx(reference.statistic)


@pytest.mark.parametrize("shift", [0, 20, 40, 80])
def test_p_value_of_large_windows_is_scipys(shift):
    now, then = np.random.default_rng(1).multinomial(5000, np.full(100, 0.01), size=2)
    now[:50] += shift // 4
    reference = stats.ks_2samp(np.repeat(np.arange(100), now), np.repeat(np.arange(100), then), method="asymp")
    assert drift.ks_test(now, then)["pvalue"] == pytest.approx(reference.pvalue, rel=0.05)


@given(pairs, st.lists(st.floats(0.01, 50), min_size=12, max_size=12))
def test_wasserstein_distance_is_that_of_the_rows(two, steps):
    now, then = two
    values = np.cumsum(steps)[:len(now)]
    gap = np.abs(np.cumsum(now) / now.sum() - np.cumsum(then) / then.sum())  # between the distribution functions
    reference = (gap[:-1] * np.diff(values)).sum()
    assert drift.wasserstein_distance(values, now, then) == pytest.approx(reference, abs=1e-9)


@given(pairs, st.booleans(), st.booleans())
def test_the_distance_is_infinite_if_the_shares_of_an_infinite_value_differ(two, low, high):
    now, then = two
    values = np.arange(len(now), dtype=float)
    if low: values[0] = -np.inf
    if high: values[-1] = np.inf
    p, q = now * then.sum(), then * now.sum()  # whole numbers, so equal shares are equal
    differs = (low and p[0] != q[0]) or (high and p[-1] != q[-1])
    gaps = np.abs(np.cumsum(p) - np.cumsum(q)) / (now.sum() * then.sum())
    finite = gaps[low:len(gaps) - 1 - high].sum()  # of steps of width 1
    expected = np.inf if differs else pytest.approx(finite)
    assert drift.wasserstein_distance(values, now, then) == expected


def stability_index_of_rows(now, then):
    "The textbook on single rows: bins open at both ends between the deciles of the base."
    edges = np.unique(np.quantile(then, np.arange(1, 10) / 10, method="inverted_cdf"))
    bins = [np.bincount(np.searchsorted(edges, rows, side="left"), minlength=len(edges) + 1) / len(rows)
            for rows in (now, then)]
    p, q = (np.maximum(b, drift.SMALLEST_SHARE) for b in bins)
    return float(((p - q) * np.log(p / q)).sum())


@given(pairs)
def test_population_stability_index_is_the_textbooks(two):
    now, then = two
    values = np.arange(len(now))
    expected = stability_index_of_rows(np.repeat(values, now), np.repeat(values, then))
    assert drift.population_stability_index(now, then) == pytest.approx(expected)


def test_population_stability_index_counts_a_bin_that_emptied():
    moved = drift.population_stability_index(np.array([0, 10]), np.array([5, 5]))
    assert moved == pytest.approx(0.5 * math.log(2) + (1e-4 - 0.5) * math.log(2e-4))


def js_distance_of_shares(p, q):
    "The textbook: the square root of the mean divergence, in bits, from the mean of both distributions."
    divergences = [sum(a * math.log2(a / m) for a, m in zip(x, (p + q) / 2, strict=True) if a) for x in (p, q)]
    return math.sqrt(max(0, sum(divergences) / 2))


@given(pairs)
def test_distances_of_categories_are_the_textbooks(two):
    now, then = two
    p, q = now / now.sum(), then / then.sum()
    assert drift.js_distance(now, then) == pytest.approx(js_distance_of_shares(p, q), abs=1e-7)
    assert drift.tv_distance(now, then) == pytest.approx(1 - np.minimum(p, q).sum())
    assert drift.l_infinity_distance(now, then) == pytest.approx(max(abs(a - b) for a, b in zip(p, q, strict=True)))
    assert 0 <= drift.l_infinity_distance(now, then) <= drift.tv_distance(now, then) + 1e-12 <= 1 + 1e-9


@given(pairs)
def test_chi_squared_test_is_pearsons(two):
    now, then = two
    result, table = drift.chi_squared_test(now, then), np.array([now, then])[:, (now + then) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    pvalue = stats.chi2.sf(statistic, table.shape[1] - 1) if table.shape[1] > 1 else 1
    assert (result["statistic"], result["pvalue"]) == (pytest.approx(statistic, abs=1e-9),
                                                       pytest.approx(pvalue, abs=1e-9))


def test_one_category_cannot_differ():
    assert drift.chi_squared_test(np.array([3, 0]), np.array([7, 0])) == {"statistic": 0, "pvalue": 1}


def test_equal_shares_have_no_distance_whatever_their_rounding():
    for k in range(1, 60): assert drift.js_distance(np.arange(1, k + 1), 3 * np.arange(1, k + 1)) == pytest.approx(0)


@given(pairs)
def test_nothing_drifts_from_itself(two):
    counts, _ = two
    values = np.arange(len(counts))
    assert drift.ks_test(counts, 3 * counts)["statistic"] == pytest.approx(0)
    for distance in (drift.population_stability_index, drift.js_distance, drift.tv_distance, drift.l_infinity_distance):
        assert distance(counts, 3 * counts) == pytest.approx(0, abs=1e-7)
    assert drift.wasserstein_distance(values, counts, 3 * counts) == pytest.approx(0)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_class_scores_are_scikit_learns(pairs):
    predicted, label = map(list, zip(*pairs, strict=True))
    counts = pd.DataFrame({"prediction": predicted, "label": label}).value_counts().rename("n").reset_index()
    result = quality.class_scores(counts)
    assert result["accuracy_score"] == pytest.approx(sklearn.metrics.accuracy_score(label, predicted))
    for average in ("weighted", "macro"):
        reference = sklearn.metrics.precision_recall_fscore_support(label, predicted, average=average, zero_division=0)
        assert [result[s][average] for s in ("precision", "recall", "f1_score")] == pytest.approx(reference[:3])
    assert sum(cell["count"] for cell in result["confusion_matrix"]) == len(pairs)


def test_a_missing_prediction_counts_as_wrong():
    counts = pd.DataFrame({"prediction": ["a", None], "label": ["a", "a"], "n": [3, 1]})
    assert quality.class_scores(counts)["accuracy_score"] == 0.75


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=300))
def test_quantiles_are_those_of_the_rows(rows):
    result = profiles.quantiles(np.sort(np.array(rows, dtype=float)))
    assert result.tolist() == [sorted(rows)[max(0, -(-k * len(rows) // 1000) - 1)] for k in range(1001)]
    assert result[500] == np.quantile(rows, 0.5, method="inverted_cdf")


def test_a_group_without_values_has_no_quantiles():
    assert profiles.quantiles(np.array([])) is None
    assert profiles.describe_numbers(profiles.count_numbers(np.array([np.nan, np.nan]), nulls=1))["median"] is None


@given(st.integers(0, 10**9), st.integers(1, 6000), st.sampled_from([3, 900, 1001, 2500, 10**6]), st.booleans())
def test_buckets_are_those_of_the_ranks_of_all_values(seed, rows, most, has_infinite):
    "Each value belongs to the bucket of its first rank; infinite values have their own."
    random = np.random.default_rng(seed)
    values = random.integers(0, most, rows).astype(float)
    if has_infinite: values[random.random(rows) < 0.1] = random.choice([-np.inf, np.inf])
    values = np.sort(values)
    distinct, first = np.unique(values, return_index=True)
    buckets = [(1, value) if len(distinct) <= profiles.BUCKETS or np.isinf(value)
               else (0, int(place) * profiles.BUCKETS // rows) for place, value in zip(first, distinct, strict=True)]
    starts = [place for i, place in enumerate(first) if i == 0 or buckets[i] != buckets[i - 1]]
    assert profiles.bucket_starts(values, len(distinct)).tolist() == starts


def test_the_rank_of_a_quantile_is_not_rounded_up():
    "0.007 * 1000 is 7.000000000000001 in floating point, but of 1000 rows the quantile 0.007 is the seventh."
    assert profiles.quantiles(np.arange(1, 1001)).tolist() == [1, *range(1, 1001)]


@pytest.mark.parametrize("granularity", ["1 day", "1 week", "3 weeks", "1 month", "1 year"])
@given(st.datetimes(datetime(2012, 1, 1), datetime(2016, 1, 1)),
       st.sampled_from(["America/New_York", "Europe/Berlin", "UTC", "Asia/Kolkata"]))
def test_windows_follow_each_other_from_midnight_to_midnight(granularity, moment, zone):
    number, unit = parse_granularity(granularity)
    local = pd.Timestamp(moment)
    day = {"day": local.normalize(), "week": local.normalize() - pd.Timedelta(days=local.weekday()),
           "month": local.normalize().replace(day=1),
           "year": local.normalize().replace(month=1, day=1)}[unit].to_pydatetime()
    step = {"day": pd.DateOffset(days=1), "week": pd.DateOffset(weeks=number), "month": pd.DateOffset(months=1),
            "year": pd.DateOffset(years=1)}[unit]
    start = day.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    expected = (pd.Timestamp(day) + step).to_pydatetime().replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    assert window_end(start, granularity, zone) == expected


def test_short_windows_are_counted_in_utc():
    start = datetime(2013, 11, 3, 5, tzinfo=UTC)  # New York's clock goes back an hour at 06:00 UTC
    assert window_end(start, "1 hour", "America/New_York") == start + timedelta(hours=1)
    assert window_end(start, "30 minutes", "America/New_York") == start + timedelta(minutes=30)


@pytest.mark.parametrize("wrong", ["monthly", "2 months", "0 weeks", "53 weeks", "<n> weeks", "9" * 5000 + " weeks",
                                   "1 weekly", "", "minutes", "5 minute s"])
def test_an_unknown_granularity_lists_what_exists(wrong):
    with pytest.raises(MlopsError, match="there are: 5 minutes, 30 minutes, 1 hour"): parse_granularity(wrong)


def test_a_monitor_is_read_from_a_bundles_resource():
    log = {"timestamp_col": "at", "model_id_col": "version", "prediction_col": "warning", "label_col": "late",
           "prediction_proba_col": "prediction",
           "problem_type": "PROBLEM_TYPE_CLASSIFICATION", "granularities": ["1 day"]}
    assert as_monitor({"inference_log": log}, time_zone="America/New_York") == MONITOR
    with pytest.raises(MlopsError, match="no key 'label_column'.*\n.*'label_col'"):
        as_monitor({"inference_log": {"label_column": "x"}})


@pytest.mark.parametrize("change, message", [
    ({"slicing_exprs": "origin"}, "slicing_exprs: 'origin' is not valid\n  it must be a list"),
    ({"slicing_exprs": None}, "slicing_exprs: null is not valid"),
    ({"custom_metrics": ["rate"]}, r"custom_metrics\[0\]: 'rate' is not a mapping"),
    ({"inference_log": "log"}, "inference_log: 'log' is not valid\n  it must be a mapping"),
    ({"inference_log": {"timestamp_col": "at", "model_id_col": "v"}}, "prediction_col: the key is missing"),
    ({"inference_log": {"timestamp_col": "at", "model_id_col": "v", "prediction_col": 3}}, "prediction_col: 3 is")])
def test_settings_of_a_monitor_that_are_not_valid_are_named(change, message):
    log = {"timestamp_col": "at", "model_id_col": "version", "prediction_col": "warning"}
    with pytest.raises(MlopsError, match=message): as_monitor({"inference_log": log} | change)
    with pytest.raises(MlopsError, match="sliced_columns: 'x' is not valid"):
        as_monitor({"inference_log": log}, sliced_columns="x")


def test_types_that_cannot_be_profiled_are_named():
    def field(name, kind): return SimpleNamespace(name=name, dataType=SimpleNamespace(simpleString=lambda: kind))
    rows = SimpleNamespace(schema=SimpleNamespace(fields=[field("a", "decimal(10,2)"), field("b", "struct<x:int>"),
                                                          field("c", "map<string,int>")]))
    assert profiles.data_types(rows, ["a"]) == {"a": "decimal(10,2)"}
    assert profiles.column_kind("decimal(10,2)") == "number"
    with pytest.raises(MlopsError, match="'b' is struct<x:int>, which cannot be profiled"):
        profiles.data_types(rows, ["a", "b"])


# comparisons

def described(*windows, base=(), version="1", **more):
    rows = [("INPUT", w) for w in windows] + [("BASELINE", None) for _ in base]
    frame = pd.DataFrame([dict(zip(GROUP, (kind, start, version, None, None), strict=True)) for kind, start in rows])
    return frame.assign(column_name="x", **more)


def test_a_window_is_compared_with_the_last_one_that_has_rows():
    pairs = list(drift.comparisons(described(3, 1, 7)))
    assert [kind for kind, *_ in pairs] == ["CONSECUTIVE"] * 2
    assert [(row.window_start, base.window_start) for _, row, base in pairs] == [(3, 1), (7, 3)]


def test_rows_without_a_window_are_not_compared_as_one():
    pairs = list(drift.comparisons(described(3, None, base=[0])))
    assert [(kind, row.window_start) for kind, row, base in pairs] == [("BASELINE", 3)]


def test_a_null_slice_is_compared_with_the_null_slice_and_not_with_the_text_null():
    named, null = (described(1, 2).assign(slice_key="origin", slice_value=value) for value in ("null", None))
    pairs = drift.comparisons(pd.concat([named, null.iloc[1:]]))
    assert [(row.slice_value, base.slice_value) for _, row, base in pairs] == [("null", "null")]
    pairs = drift.comparisons(pd.concat([named, null]))
    assert sorted(str(row.slice_value) + str(base.slice_value) for _, row, base in pairs) == ["NoneNone", "nullnull"]


def text_parts(*parts):
    "The counts of a text column in some groups, with their profiles."
    column = profiles.text_column(pa.chunked_array([pa.array(sum(parts, []), pa.string())]))
    ends = np.cumsum([len(part) for part in parts])
    counts = [profiles.count_codes(column.codes[end - len(part):end], len(column.values))
              for part, end in zip(parts, ends, strict=True)]
    return counts, [profiles.describe_texts(count, column.values, column.lengths) for count in counts]


def test_drift_of_a_text_column_tells_null_from_the_text_null():
    then, now = ["null"] * 10 + ["a"] * 10 + [None] * 30, ["null"] * 10 + ["a"] * 30 + [None] * 10
    (base, counts), (before, after) = text_parts(then, now)
    drifted = drift.text_drift(counts, base)
    assert drifted["tv_distance"] == drifted["l_infinity_distance"] == 0.25
    assert drift.deltas(after, before)["percent_null_delta"] == -40
    expected = stats.chi2_contingency([[10, 10], [10, 30]], correction=False)
    assert drifted["chi_squared_test"]["statistic"] == pytest.approx(expected.statistic)
    assert before["frequent_items"] == [{"item": "a", "count": 10}, {"item": "null", "count": 10}]


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["a", "bb", "", "é", None]), min_size=1, max_size=30), min_size=2, max_size=2))
def test_counts_of_texts_are_those_of_pandas(parts):
    for part, profile in zip(parts, text_parts(*parts)[1], strict=True):
        rows = pd.Series(part, dtype=object)
        assert {item["item"]: item["count"] for item in profile["frequent_items"]} == rows.value_counts().to_dict()
        assert (profile["count"], profile["num_nulls"], profile["distinct_count"]) == (
            len(rows), rows.isna().sum(), rows.nunique())
        lengths = rows.dropna().str.len()
        assert profile["avg_length"] == (pytest.approx(lengths.mean()) if len(lengths) else None)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["INPUT", "BASELINE"]), st.integers(0, 3), st.sampled_from(["1", "2", None])),
                min_size=1, max_size=60))
def test_groups_of_rows_are_those_of_pandas(rows):
    frame = pd.DataFrame(rows, columns=["log_type", "month", "model_id"])
    starts = [None if kind == "BASELINE" else pd.Timestamp(2013, month + 1, 1, tz="UTC") for kind, month, _ in rows]
    keys = pa.table({"log_type": frame.log_type, "window_start": pa.array(starts, pa.timestamp("us", "UTC")),
                     "model_id": pa.array(frame.model_id, pa.string())})
    versions = list(frame.model_id.unique())
    (by_version, *together), slices = windows.groups_in(keys, MONITOR, versions)
    assert slices == [] and len(together) == (len(versions) > 1)
    grouped = {key[:3]: sorted(by_version.order[part].tolist())
             for key, part in zip(by_version.keys, by_version.slices, strict=True)}
    expected = {}
    for place, (kind, _, version) in enumerate(rows):
        expected.setdefault((kind, starts[place], version), []).append(place)
    assert grouped == expected


@settings(max_examples=60)
@given(st.lists(st.one_of(st.none(), st.floats(-5, 5).map(lambda x: round(x, 1)),
                          st.sampled_from([math.inf, -math.inf, math.nan, -0.0])), min_size=1, max_size=60))
def test_counts_of_numbers_are_those_of_pandas(rows):
    column = profiles.number_column(pa.chunked_array([pa.array(rows, pa.float64())]))
    counts, = column.counts(windows.Groups.whole(len(rows)))
    profile, known = profiles.describe_numbers(counts), [x for x in rows if x is not None and not math.isnan(x)]
    assert (profile["num_nulls"], profile["num_nan"]) == (rows.count(None), len(rows) - len(known) - rows.count(None))
    assert (profile["num_zeros"], profile["distinct_count"]) == (known.count(0), len(set(known)))
    if not known: return
    assert (profile["min"], profile["max"]) == (min(known), max(known))
    assert dict(zip(counts.high.tolist(), counts.n.tolist(), strict=True)) == pd.Series(known).value_counts().to_dict()
    if all(map(math.isfinite, known)):
        assert profile["avg"] == pytest.approx(np.mean(known), abs=1e-12)
        if len(known) > 1: assert profile["stddev"] == pytest.approx(np.std(known, ddof=1), abs=1e-7)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.one_of(st.just(math.nan), st.floats(0, 1).map(lambda x: round(x, 1))),
                          st.sampled_from([0.0, 1.0, math.nan])), min_size=1, max_size=60))
def test_scores_of_probabilities_are_scikit_learns(rows):
    p, y = map(np.array, zip(*rows, strict=True))
    scores, known = quality.probability_scores(p, y), ~np.isnan(p) & ~np.isnan(y)
    assert scores["evaluated"] == known.sum()
    if not known.any(): return
    assert scores["log_loss"] == pytest.approx(sklearn.metrics.log_loss(y[known], p[known], labels=[0, 1]))
    if len(set(y[known])) < 2: assert scores["roc_auc_score"] is None
    else: assert scores["roc_auc_score"]["one_vs_one"]["macro"] == pytest.approx(
        sklearn.metrics.roc_auc_score(y[known], p[known]))


def test_versions_and_slices_are_compared_with_their_own():
    first, second = described(1, base=[0]), described(1, 2, version="2")
    sliced = described(1, base=[0]).assign(slice_key="origin", slice_value="JFK")
    other = described(2).assign(slice_key="origin", slice_value="EWR")
    pairs = drift.comparisons(pd.concat([first, second, sliced, other]))
    groups = {(row.model_id, row.slice_value, kind) for kind, row, base in pairs}
    assert groups == {("1", None, "BASELINE"), ("1", "JFK", "BASELINE"), ("2", None, "CONSECUTIVE")}


def test_a_month_of_nulls_has_differences_but_no_distance():
    base, counts = profiles.count_numbers(np.ones(10)), profiles.count_numbers(np.full(10, np.nan), nulls=10)
    before, after = map(profiles.describe_numbers, (base, counts))
    assert drift.deltas(after, before)["percent_null_delta"] == 100 and drift.number_drift(counts, base) == {}


# thresholds

def measured(*log_losses, base=0.40, count=5000, version="1"):
    starts = [datetime(2013, 4 + i, 1, 4, tzinfo=UTC) for i in range(len(log_losses))]
    rows = [("BASELINE", None, base), *zip(["INPUT"] * len(starts), starts, log_losses, strict=True)]
    profile = pd.DataFrame([dict(zip(GROUP, (kind, pd.Timestamp(start), version, None, None), strict=True)) | {
        "column_name": ":table", "count": count, "labelled": count, "evaluated": count, "log_loss": loss,
        "f1_score": {"weighted": 1 - loss, "macro": 0.5}}
        for kind, start, loss in rows])
    moved = profile.loc[profile.log_type == "INPUT", [*GROUP]].assign(
        drift_type="BASELINE", column_name="prediction",
        ks_test=[{"statistic": loss, "pvalue": 0.0} for loss in log_losses])
    return metric_tables.Measured(profile, moved)


def flags(metrics, **threshold):
    return thresholds.compare_windows(metrics, thresholds.Threshold(**threshold)).broken.tolist()


def test_a_value_equal_to_the_limit_is_no_violation():
    assert flags(measured(0.40, 0.44, 0.45), metric="log_loss", at_most=0.44) == [False, False, True]
    assert flags(measured(0.40, 0.44, 0.45), metric="f1_score.weighted", at_least=0.56) == [False, False, True]


def test_a_limit_as_a_multiple_of_the_baselines_value():
    assert flags(measured(0.43, 0.45), metric="log_loss", at_most=1.1, times_baseline=True) == [False, True]
    assert flags(measured(0.43, 0.45, base=0.5), metric="log_loss", at_most=1.1, times_baseline=True) == [False, False]


def test_each_version_has_its_own_baseline():
    first, second = measured(0.45, base=0.40), measured(0.45, base=0.50, version="2")
    both = metric_tables.Measured(*(pd.concat([getattr(first, part), getattr(second, part)], ignore_index=True)
                                   for part in ("profile", "drift")))
    checked = thresholds.compare_windows(both, thresholds.Threshold("log_loss", at_most=1.1, times_baseline=True))
    assert checked.broken.droplevel(0).to_dict() == {"1": True, "2": False}


def test_a_version_without_baseline_breaks_no_relative_limit():
    metrics = measured(0.9)
    metrics = replace(metrics, profile=metrics.profile[metrics.profile.log_type == "INPUT"])
    relative = thresholds.Threshold("log_loss", at_most=1.1, times_baseline=True)
    assert thresholds.compare_windows(metrics, relative).broken.tolist() == [False]
    assert thresholds.unchecked(metrics, [relative], {}) == [
        "1 window is not compared with the limit of log loss: there is no baseline"]
    without_value = thresholds.unchecked(measured(0.9, 0.8, base=math.nan), [relative], {})
    assert without_value == ["2 windows are not compared with the limit of log loss: "
                             "the metric has no value on the baseline"]
    many = replace(relative, times_baseline=False, min_rows=10**6)
    assert thresholds.unchecked(measured(0.9, 0.8), [many], {}) == [
        "2 windows are not compared with the limit of log loss: fewer than 1,000,000 rows"]


@pytest.mark.parametrize("base", [-10.0, 10.0])
@pytest.mark.parametrize("limit, change, broken", [
    ("at_most", 0, False), ("at_most", 1.9, False), ("at_most", 2.1, True), ("at_most", -9, False),
    ("at_least", 0, False), ("at_least", -1.9, False), ("at_least", -2.1, True), ("at_least", 9, False)])
def test_a_relative_limit_allows_a_share_of_the_absolute_value_of_the_baseline(base, limit, change, broken):
    factor = {"at_most": 1.2, "at_least": 0.8}[limit]
    metrics = measured(base + change, base=base)
    assert flags(metrics, metric="log_loss", times_baseline=True, **{limit: factor}) == [broken]


@pytest.mark.parametrize("value, limit, expected", [
    (7.3e-6, 5e-6, "7.3e-06, above the limit 5e-06"), (0.58, 0.495, "0.5800, above the limit 0.4950"),
    (0.50001, 0.50002, "0.50001, below the limit 0.50002"), (math.inf, 60, "inf, above the limit 60.0000"),
    (0.1 + 0.2, 0.3, "0.30000000000000004, above the limit 0.29999999999999999")])
def test_a_violation_has_the_numbers_that_were_compared(value, limit, expected):
    threshold = thresholds.Threshold("log_loss", **{"at_most" if value > limit else "at_least": limit})
    violation, = thresholds.violations(measured(value), [threshold], MONITOR, "1 month")
    assert (violation["value"], violation["limit"]) == (value, limit)
    assert thresholds.violation_text(violation) == f"log loss {expected}"


def test_all_versions_together_and_slices_are_not_checked():
    metrics = measured(0.9)
    for change in ({"model_id": "*"}, {"slice_key": "origin", "slice_value": "JFK"}):
        assert flags(replace(metrics, profile=metrics.profile.assign(**change)), metric="log_loss", at_most=0.1) == []


def test_metrics_of_drift_are_those_against_the_baseline():
    metrics = measured(0.1, 0.3)
    consecutive = metrics.drift.assign(drift_type="CONSECUTIVE", ks_test=[{"statistic": 1.0, "pvalue": 0.0}] * 2)
    metrics = replace(metrics, drift=pd.concat([metrics.drift, consecutive], ignore_index=True))
    checked = thresholds.compare_windows(metrics, thresholds.Threshold("ks_test.statistic", at_most=0.2,
                                                                       column="prediction", min_rows=0))
    assert checked.value.tolist() == [0.1, 0.3]


@settings(max_examples=30)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_small_windows_are_not_checked(count, min_rows):
    assume(count != min_rows)
    assert flags(measured(0.9, count=count), metric="log_loss", at_most=0.1, min_rows=min_rows) == [count > min_rows]


@pytest.mark.parametrize("metric, column, rows", [
    ("log_loss", ":table", 70), ("roc_auc_score.one_vs_one.weighted", ":table", 70),
    ("f1_score.weighted", ":table", 80), ("avg", "x", 60), ("ks_test.statistic", "x", 60),
    ("percent_null", "x", 100), ("percent_zeros", "x", 100)])
def test_min_rows_counts_the_rows_that_a_metric_is_computed_from(metric, column, rows):
    "Of 100 rows 80 have a label, 70 of these a probability; the column x has 30 nulls and 10 NaN."
    name, *keys = metric.split(".")
    value = {"one_vs_one": {"weighted": 9.0}} if name == "roc_auc_score" else {keys[0]: 9.0} if keys else 9.0
    group = dict(zip(GROUP, ("INPUT", pd.Timestamp("2013-04-01", tz="UTC"), "1", None, None), strict=True))
    table = group | {"column_name": ":table", "count": 100, "labelled": 80, "evaluated": 70}
    profile = pd.DataFrame([table, group | {"column_name": "x", "count": 100, "num_nulls": 30, "num_nan": 10}])
    drifted = pd.DataFrame([group | {"column_name": "x", "drift_type": "BASELINE"}])
    (drifted if name == "ks_test" else profile)[name] = [value] * (1 if name == "ks_test" else 2)
    metrics = metric_tables.Measured(profile, drifted)
    for min_rows, broken in ((rows, True), (rows + 1, False)):
        assert flags(metrics, metric=metric, column=column, at_most=1, min_rows=min_rows) == [broken]


def test_rows_without_a_version_are_compared_with_their_own_baseline():
    first, unversioned = measured(0.45, base=0.40), measured(0.45, base=0.50, version=None)
    both = metric_tables.Measured(*(pd.concat([getattr(first, part), getattr(unversioned, part)], ignore_index=True)
                                   for part in ("profile", "drift")))
    threshold = thresholds.Threshold("log_loss", at_most=1.1, times_baseline=True)
    checked = thresholds.compare_windows(both, threshold).reset_index()
    assert dict(zip(checked.model_id.fillna("none"), checked.broken, strict=True)) == {"1": True, "none": False}
    both.profile.loc[both.profile.log_type == "BASELINE", "log_loss"] = 0.4
    assert [v["version"] for v in thresholds.violations(both, [threshold], MONITOR, "1 month")] == ["1", None]


@pytest.mark.parametrize("wrong, message", [
    ({"metric": "log_loss"}, "no limit"), ({"metric": "log_loss", "at_most": 1, "at_least": 0}, "two limits"),
    ({"metric": "log_loss", "at_least": None}, "no limit"),
    ({"metric": "log_loss", "limit": 1}, r"thresholds\[0\].limit: no key 'limit'"),
    ({"metric": "log_loss", "at_most": "0.05"}, "at_most: '0.05' is not valid\n.* remove the quotes"),
    ({"metric": "log_loss", "at_most": float("nan")}, "at_most: NaN is not valid"),
    ({"metric": "log_loss", "false_alarm_rate": "1 %"}, "false_alarm_rate: '1 %' is.*\n.*such as 0.01"),
    ({"metric": "log_loss", "at_most": 1, "min_rows": "many"}, "min_rows: 'many' is not valid"),
    ({"metric": "log_loss", "at_most": 1, "times_baseline": "yes"}, "times_baseline: 'yes' is.*\n.*true or false"),
    ({"metric": "log_loss", "at_most": 1, "column": None}, "column: null is not valid"),
    ({"at_most": 1}, r"thresholds\[0\].metric: the key is missing"), ("loss_ratio", "'loss_ratio' is not a mapping")])
def test_a_wrong_threshold_is_an_error(wrong, message):
    with pytest.raises(MlopsError, match=message): thresholds.read_thresholds([wrong])


def test_thresholds_are_a_list_which_may_have_no_items():
    assert thresholds.read_thresholds([]) == []
    for wrong in (None, "log_loss", {"metric": "log_loss"}):
        with pytest.raises(MlopsError, match=r"thresholds is .*\n  give a list of thresholds, or \[\] for none"):
            thresholds.read_thresholds(wrong)


@pytest.mark.parametrize("metric, column, message", [
    ("population_stability_index", "predicton", "no column 'predicton'.*\n  did you mean 'prediction'"),
    ("log_loss", "prediction", "'log_loss' has values for :table, not for 'prediction'"),
    ("f1_score", ":table", "the metric 'f1_score' is not a number\n  .*f1_score.macro, f1_score.weighted"),
    ("f1_score.makro", ":table", "'f1_score.makro' is not a number\n  did you mean 'f1_score.macro'"),
    ("logloss", ":table", "no metric 'logloss' in the metric tables\n  did you mean 'log_loss'")])
def test_a_limit_that_no_window_can_violate_is_an_error_before_anything_is_measured(metric, column, message):
    with pytest.raises(MlopsError, match=message):
        thresholds.check_thresholds([thresholds.Threshold(metric, at_most=0.5, column=column)], MONITOR)


@pytest.mark.parametrize("metric, column, message", [
    ("ks_test.statistic", "predicton", "no column 'predicton' in the metric tables\n  did you mean 'prediction'"),
    ("ks_test.statistic", ":table", "'ks_test.statistic' has values for prediction, not for ':table'"),
    ("f1_score", ":table", "the metric 'f1_score' is not a number\n  .*f1_score.macro, f1_score.weighted"),
    ("f1_score.makro", ":table", "no metric 'f1_score.makro'.*\n  did you mean 'f1_score.macro'")])
def test_a_limit_without_any_value_is_an_error(metric, column, message):
    with pytest.raises(MlopsError, match=message): flags(measured(0.4), metric=metric, column=column, at_most=0.1)


def test_a_metric_without_labels_is_null_and_no_error():
    metrics = measured(0.4)
    metrics.profile["log_loss"] = None
    assert flags(metrics, metric="log_loss", at_most=0.1) == [False]


def test_a_limit_relative_to_the_baseline_is_not_for_drift():
    with pytest.raises(MlopsError, match="ks_test.statistic has times_baseline, but the metric compares"):
        flags(measured(0.4), metric="ks_test.statistic", column="prediction", at_most=2, times_baseline=True)


@pytest.mark.parametrize("granularity, name", [("1 month", "2013-05"), ("1 day", "2013-05-31"), ("1 year", "2013"),
                                               ("2 weeks", "2013-05-31"),
                                               ("1 hour", "2013-06-01 03:00")])
def test_windows_are_named_in_their_time_zone(granularity, name):
    assert thresholds.window_name(datetime(2013, 6, 1, 3, tzinfo=UTC), granularity, "America/New_York") == name


def test_violations_are_in_order_of_time():
    violations = thresholds.violations(measured(0.3, 0.6, 0.5),
                                       [thresholds.Threshold("log_loss", at_most=0.44),
                                        thresholds.Threshold("f1_score.weighted", at_least=0.45)],
                                       MONITOR, "1 month")
    assert [(v["window"], v["metric"], v["version"], v["value"]) for v in violations] == [
        ("2013-05", "f1_score.weighted", "1", 0.4), ("2013-05", "log_loss", "1", 0.6),
        ("2013-06", "log_loss", "1", 0.5)]


def test_arrow_keeps_missing_values_as_null():
    frame = pd.DataFrame({"count": [1.0, np.nan], "avg": [0.1 + 0.2, np.nan],
                          "window": [None, {"start": datetime(2013, 1, 1, tzinfo=UTC), "end": None}]})
    table = metric_tables.as_arrow(frame, {k: v for k, v in metric_tables.profile_columns("version").items()
                                        if k in ("count", "avg", "window", "log_loss")})
    assert table["count"].to_pylist() == [1, None] and table["avg"].to_pylist() == [0.3, None]
    assert table["log_loss"].null_count == 2


def test_a_picture_of_windows_without_any_known_label_can_be_drawn():
    figure, axes = canvas("No labels")
    windows = pd.DataFrame({"label_mean": [np.nan], "probability_mean": [np.nan]})
    thresholds.plot_shares(axes, ["2013-11-27"], windows, "late_arrival")
    figure.canvas.draw()
    assert axes.get_ylim() == (0, 1)
