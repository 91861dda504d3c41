"""The point-in-time join on Sail against pandas.merge_asof: timestamps and dates, in several session time zones."""
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.features.point_in_time import point_in_time_join

ZONES = ("UTC", "America/New_York", "Asia/Kolkata")
SPRING, AUTUMN = datetime(2013, 3, 10, 7, tzinfo=UTC), datetime(2013, 11, 3, 6, tzinfo=UTC)  # New York's clocks change
NEAR = [-7200, -3600, -1801, -1800, -1, 0, 1, 1799, 1800, 3600, 5400, 7200]
MOMENTS = [base + timedelta(seconds=s, microseconds=m) for base in (SPRING, AUTUMN) for s in NEAR for m in (0, 750_000)]
DAYS = [datetime.combine(base.date() + timedelta(days=d), datetime.min.time(), UTC)
        for base in (SPRING, AUTUMN) for d in range(-3, 4)]
SERIES, KEYS = [*range(25), None], ["a", "b", None]  # each series is a small case; all cases share one table


@contextmanager
def zone_of(spark, zone: str):
    "Set the session's time zone temporarily."
    spark.conf.set("spark.sql.session.timeZone", zone)
    try: yield
    finally: spark.conf.set("spark.sql.session.timeZone", "UTC")


def micros(moment: datetime) -> int: return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def tables_of(spark, left: list, right: list, kind: str):
    "Return two tables from timestamps; times are created from numbers, which no time zone changes."
    time = {"TIMESTAMP": "timestamp_micros(at)", "DATE": "date_from_unix_date(CAST(at / 86400000000 AS INT))"}[kind]
    events = [(i, series, key, at and micros(at)) for i, (series, key, at) in enumerate(left)]
    features = [(series, key, at and micros(at), value) for series, key, at, value in right]
    return (spark.createDataFrame(events, "id INT, series INT, k STRING, at BIGINT").selectExpr(
                "id", "series", "k", f"{time} AS t"),
            spark.createDataFrame(features, "series INT, k STRING, at BIGINT, value INT").selectExpr(
                "series", "k AS key", f"{time} AS ts", "at AS feature_time", "value"))


def by_spark(left, right, window) -> pd.DataFrame:
    "Return for each row of `left` the time and value of its feature row; -1 for missing."
    joined = point_in_time_join(left, right, ["series", "k"], "t", "ts", window, right_keys=["series", "key"])
    rows = [(row.id, row.feature_time or -1, -1 if row.value is None else row.value) for row in joined.collect()]
    return pd.DataFrame(sorted(rows), columns=["id", "feature_time", "value"])


def by_pandas(left: list, right: list, window) -> pd.DataFrame:
    "Return the same from pandas, which takes rows with a key and a time, in order of time."
    events = pd.DataFrame(left, columns=["series", "k", "t"]).assign(id=range(len(left)))
    features = pd.DataFrame(right, columns=["series", "k", "ts", "value"]).astype({"value": float})
    events, features = events.dropna().sort_values("t"), features.dropna(subset=["series", "k", "ts"]).sort_values("ts")
    features["feature_time"] = [micros(t) for t in features.ts]
    for frame, time in ((events, "t"), (features, "ts")):
        frame[time] = pd.to_datetime(frame[time], utc=True).astype("datetime64[us, UTC]")
        frame[["series", "k"]] = frame[["series", "k"]].astype({"series": int, "k": str})
    joined = pd.merge_asof(events, features, left_on="t", right_on="ts", by=["series", "k"], allow_exact_matches=True,
                           tolerance=None if window is None else pd.Timedelta(window))
    values = joined.set_index("id")[["feature_time", "value"]].astype(float).reindex(range(len(left))).fillna(-1)
    return values.astype("int64").rename_axis("id").reset_index()


def or_none(values): return st.one_of(values, st.none())


def events_at(times):
    "Rows of the left table."
    row = st.tuples(st.sampled_from(SERIES), st.sampled_from(KEYS), or_none(st.sampled_from(times)))
    return st.lists(row, min_size=60, max_size=150)


def features_at(times):
    "Feature rows, one per key and time; duplicates with a null key or time, which a table without a key may hold."
    row = st.tuples(st.sampled_from(SERIES), st.sampled_from(KEYS), or_none(st.sampled_from(times)),
                    or_none(st.integers(0, 99)))
    return st.lists(row, min_size=60, max_size=250, unique_by=lambda r: r[:3] if None not in r[:3] else object())


OPTIONS = dict(deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
               suppress_health_check=list(HealthCheck))
WINDOWS = st.sampled_from([0, 1e-6, 0.5, 1, 1799.25, 1800, 3599, 3600, 7201, 86_400 * 236]).map(
    lambda s: timedelta(seconds=s))
EXAMPLES = pytest.mark.parametrize("examples", [8, pytest.param(80, marks=[pytest.mark.slow, pytest.mark.full])])


def check_as_pandas(spark, zone, left, right, kind, window):
    with zone_of(spark, zone):
        events, features = tables_of(spark, left, right, kind)
        for lookback in (None, window):
            pd.testing.assert_frame_equal(by_spark(events, features, lookback), by_pandas(left, right, lookback))


@EXAMPLES
def test_timestamps_as_pandas_joins_them(spark, examples):
    "Ties, gaps, duplicate events, nulls in keys, times and values, around the nights in which clocks change."
    @settings(max_examples=examples, **OPTIONS)
    @given(left=events_at(MOMENTS), right=features_at(MOMENTS), window=WINDOWS, zone=st.sampled_from(ZONES))
    @example(left=[(0, "a", t) for t in MOMENTS] * 2, right=[(0, "a", t, None) for t in MOMENTS[::3]],
             window=timedelta(hours=1), zone="America/New_York")
    def check(left, right, window, zone): check_as_pandas(spark, zone, left, right, "TIMESTAMP", window)
    check()


@EXAMPLES
def test_dates_as_pandas_joins_them(spark, examples):
    "A day between two dates is 24 hours, also if New York's clocks changed in it."
    @settings(max_examples=examples, **OPTIONS)
    @given(left=events_at(DAYS), right=features_at(DAYS), days=st.integers(0, 3), zone=st.sampled_from(ZONES))
    @example(left=[(0, "a", t) for t in DAYS], right=[(0, "a", t, 1) for t in DAYS[::2]], days=1,
             zone="America/New_York")
    def check(left, right, days, zone): check_as_pandas(spark, zone, left, right, "DATE", timedelta(days=days))
    check()


BEFORE_1970 = -(200 * 365.25 * 86_400) // 1  # seconds before SPRING


def at(seconds: float) -> datetime: return SPRING + timedelta(seconds=seconds)


@pytest.mark.parametrize("window, since, until, is_used", [
    (timedelta(milliseconds=500), 0.0, 0.9, False),
    (timedelta(seconds=1), 0.0, 1.4, False),
    (timedelta(seconds=1), 0.999, 2.0, False),
    (timedelta(seconds=1), 0.999, 1.999, True),
    (timedelta(milliseconds=100), 5.95, 6.05, True),  # across the end of a second
    (timedelta(microseconds=1), 5.999999, 6.0, True),
    (timedelta(microseconds=1), 5.999998, 6.0, False),
    (timedelta(seconds=1.9), 0.0, 1.9, True),
    (timedelta(seconds=1.9), 0.0, 1.900001, False),
    (timedelta(0), 5.1, 5.1, True),
    (timedelta(0), 5.1, 5.100001, False),  # zero requires equal times, not equal seconds
    (timedelta(days=1), 0.0, 86_400.0, True),
    (timedelta(days=1), 0.0, 86_400.5, False),
    (timedelta(seconds=1), BEFORE_1970 + 0.4, BEFORE_1970 + 1.4, True),
    (timedelta(seconds=1), BEFORE_1970 + 0.4, BEFORE_1970 + 1.400001, False),
    (timedelta(days=365 * 300), BEFORE_1970, 0.0, True),
    (timedelta.max, BEFORE_1970, 0.0, True),
    (None, 0.000001, 0.000001, True),
    (None, 0.000001, 0.0, False),
])
def test_ages_are_counted_in_microseconds(spark, window, since, until, is_used):
    left, right = tables_of(spark, [(1, "a", at(until))], [(1, "a", at(since), 7)], "TIMESTAMP")
    assert by_spark(left, right, window).value.tolist() == [7 if is_used else -1]


def test_an_older_row_inside_the_window_does_not_replace_the_latest(spark):
    "The latest row is null, and the one before it, still inside the window, has a value."
    left, right = tables_of(spark, [(1, "a", at(10))], [(1, "a", at(1), 7), (1, "a", at(2), None)], "TIMESTAMP")
    assert by_spark(left, right, timedelta(hours=1)).values.tolist() == [[0, micros(at(2)), -1]]


@pytest.mark.parametrize("time", [5, 50, 5000])  # the row in use, an earlier one, a later one
def test_two_feature_rows_of_one_key_and_time_are_refused(spark, time):
    right = [(1, "a", at(t), 7) for t in (0, 5, 50, 5000)]
    events = [(1, "a", at(9)), (1, "a", None), (2, "a", at(9))]
    left, features = tables_of(spark, events, [*right, (1, "a", at(time), 8)], "TIMESTAMP")
    text = f"more than one row with series = 1, key = a, ts = {at(time):%Y-%m-%d %H:%M:%S}"
    joined = point_in_time_join(left, features, ["series", "k"], "t", "ts", right_keys=["series", "key"])  # only a plan
    for action in (joined.collect, joined.count, joined.select("id").collect):
        with pytest.raises(Exception, match=text): action()


def test_feature_rows_that_match_no_event_may_be_duplicates(spark):
    right = [(1, "a", at(0), 7), (1, None, at(0), 1), (1, None, at(0), 2), (None, "a", at(0), 3), (None, "a", at(0), 4),
             (1, "a", None, 5), (1, "a", None, 6), (2, "a", at(0), 8), (1, "b", at(0), 9)]
    events = [(1, "a", at(1)), (1, None, at(1)), (None, "a", at(1)), (1, "a", None)]
    left, features = tables_of(spark, events, right, "TIMESTAMP")
    assert by_spark(left, features, None).value.tolist() == [7, -1, -1, -1]


@pytest.mark.parametrize("kind", ["double", "float"])
def test_zero_is_one_key_whatever_its_sign(spark, kind):
    times = pd.to_datetime([1, 2, 3], unit="s", utc=True)
    features = pd.DataFrame({"k": [0.0, -0.0, 1.5], "ts": times, "value": [1.0, 9.0, 5.0]})
    events = pd.DataFrame({"k": [-0.0, 0.0, 1.5, -0.0, 0.0], "ts": pd.to_datetime([9, 9, 9, 1, 1], unit="s", utc=True)})
    expected = pd.merge_asof(events.reset_index().sort_values("ts"), features, on="ts", by="k").sort_values("index")
    left = spark.createDataFrame(events.reset_index()).selectExpr("index", f"CAST(k AS {kind}) AS k", "ts AS t")
    right = spark.createDataFrame(features).selectExpr(f"CAST(k AS {kind}) AS k", "ts", "value")
    joined = point_in_time_join(left, right, "k", "t", "ts").orderBy("index").toPandas()
    assert joined.value.tolist() == expected.value.tolist() == [9, 9, 5, 1, 1]
    twice = right.where("k = 0").selectExpr("k", "timestamp_seconds(1) AS ts", "value")  # k is 0.0 and -0.0
    with pytest.raises(Exception, match="more than one row with k = "):
        point_in_time_join(left, twice, "k", "t", "ts").count()


def test_columns_of_every_type_are_returned(spark):
    left = spark.sql("SELECT 'a' AS `the key`, date'2013-03-10' AS day, struct(1 AS x) AS s, map('a', 1) AS m")
    right = spark.sql("SELECT 'a' AS key, date'2013-03-09' AS day, array(1, 2) AS array, struct('b' AS y) AS inner")
    joined = point_in_time_join(left, right, "the key", "day", "day", right_keys="key")
    assert joined.columns == ["the key", "day", "s", "m", "array", "inner"]
    assert joined.first() == ("a", date(2013, 3, 10), (1,), {"a": 1}, [1, 2], ("b",))


def test_many_events_after_few_features_take_no_longer(spark):
    "The last feature row is not searched again for every event."
    left = spark.range(400_000).selectExpr("id", "id % 2 AS k", "timestamp_seconds(1362900000 + id) AS t")
    right = spark.range(2).selectExpr("id AS k", "timestamp_seconds(1362800000) AS ts", "id + 1 AS value")
    start = datetime.now(UTC)
    assert point_in_time_join(left, right, "k", "t", "ts").selectExpr("sum(value)").first()[0] == 600_000
    assert datetime.now(UTC) - start < timedelta(seconds=8)


@pytest.mark.parametrize("types, arguments, message", [
    ({}, dict(lookback_window=timedelta(seconds=-1)), "lookback_window is negative: -1 s"),
    ({}, dict(lookback_window=3600), "lookback_window is 3600"),
    ({}, dict(right_keys=["series"]), "2 key columns on the left, 1 in the feature table"),
    ({}, dict(keys=[], right_keys=[]), "0 key columns"),
    ({}, dict(keys=["series", "code"]), "no column 'code' in the left table"),
    ({}, dict(right_keys=["key", "series"]), "column 'series' is int, and 'key' of the feature table is string"),
    ({"ts": "timestamp_ntz"}, {}, "column 't' is timestamp, and 'ts' of the feature table is timestamp_ntz"),
    ({"ts": "date"}, {}, "column 't' is timestamp, and 'ts' of the feature table is date"),
])
def test_tables_that_cannot_be_joined_are_refused_at_once(spark, types, arguments, message):
    left, right = tables_of(spark, [(1, "a", at(0))], [(1, "a", at(0), 1)], "TIMESTAMP")
    for name, kind in types.items(): right = right.withColumn(name, right[name].cast(kind))
    keys = dict(keys=["series", "k"], right_keys=["series", "key"])
    with pytest.raises(MlopsError, match=message):
        point_in_time_join(left, right, left_time="t", right_time="ts", **keys | arguments)


def test_names_that_would_collide_are_refused(spark):
    left, right = tables_of(spark, [(1, "a", at(0))], [(1, "a", at(0), 1)], "TIMESTAMP")
    def join(left, right): return point_in_time_join(left, right, ["series"], "t", "ts")
    with pytest.raises(MlopsError, match="both tables have a column 'ID'"):
        join(left, right.withColumnRenamed("value", "ID"))
    with pytest.raises(MlopsError, match="column 'feature_time__' is reserved for the join"):
        join(left.withColumnRenamed("id", "feature_time__"), right)
    ntz_left = left.withColumn("t", left.t.cast("timestamp_ntz"))
    ntz_right = right.withColumn("ts", right.ts.cast("timestamp_ntz"))
    with pytest.raises(MlopsError, match="column 't' is timestamp_ntz"): join(ntz_left, ntz_right)
