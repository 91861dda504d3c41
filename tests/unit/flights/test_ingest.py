"Checking the source, the times of a flight, and which facts are known: without Spark."
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.flights import ingest

often = settings(max_examples=60, deadline=None)  # on a busy machine too
ZONES = ["America/New_York", "America/Phoenix", "America/Denver", "Pacific/Honolulu", "America/St_Thomas"]


def few_flights() -> pd.DataFrame:
    "One flown, one cancelled, one diverted, one that left early."
    hour = pd.Series(pd.to_datetime(["2013-01-01T10:00Z"] * 4)).astype("datetime64[us, UTC]")
    frame = pd.DataFrame(dict(
        year=2013, month=1, day=1, carrier="UA", flight=[1, 2, 3, 4], tailnum="N1", origin="EWR", dest="IAH",
        sched_dep_time=515, dep_time=[517, None, 520, 510], dep_delay=[2, None, 5, -5], sched_arr_time=819,
        arr_time=[830, None, 1500, 801], arr_delay=[11, None, None, -18], air_time=[227, None, None, 200],
        distance=1400, hour=5, minute=15, time_hour=hour))
    facts = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
    return ingest.with_times(frame.astype(dict.fromkeys(facts, "Int32")), pd.Series({"IAH": "America/Chicago"}))


def test_when_the_facts_of_a_flight_are_known():
    known = few_flights()
    assert [str(t)[11:16] for t in known.departure_known_at] == ["10:17", "", "10:20", "10:10"]
    assert [str(t)[11:16] for t in known.arrival_known_at] == ["14:30", "", "", "14:01"]
    assert set(known.scheduled_arrival) == {pd.Timestamp("2013-01-01T14:19Z")}


@settings(often, max_examples=30)
@given(st.datetimes(datetime(2013, 1, 1, 9), datetime(2013, 1, 1, 16)).map(lambda t: t.replace(tzinfo=UTC)))
def test_only_facts_learnt_before_the_cut_are_known(cut):
    flights = few_flights()
    known = ingest.known_before(flights, cut)
    for row, known_row in zip(flights.to_dict("records"), known.to_dict("records"), strict=True):
        for known_at, facts in ingest.FACTS.items():
            is_known = not pd.isna(row[known_at]) and row[known_at] < cut
            for column in (known_at, *facts):
                if is_known and not pd.isna(row[column]): assert known_row[column] == row[column]
                else: assert pd.isna(known_row[column])
    schedule = [c for c in flights if c not in {*ingest.FACTS, *sum(ingest.FACTS.values(), [])}]
    pd.testing.assert_frame_equal(known[schedule], flights[schedule])


@settings(often, max_examples=30)
@given(*[st.integers(9 * 60, 16 * 60)] * 2)
def test_two_cuts_are_the_same_as_the_earlier_one(first, second):
    def cut(minutes): return datetime(2013, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    both = ingest.known_before(ingest.known_before(few_flights(), cut(first)), cut(second))
    pd.testing.assert_frame_equal(both, ingest.known_before(few_flights(), cut(min(first, second))))


def test_facts_that_contradict_each_other_are_refused():
    flights = few_flights()
    ingest.check_flight_times(flights)
    days_later = pd.Timestamp("2013-01-03T00:00Z")
    for wrong in (dict(air_time=300), dict(departure_known_at=pd.NaT), dict(arrival_known_at=days_later)):
        flights = few_flights()
        for column, value in wrong.items(): flights.loc[0, column] = value
        with pytest.raises(MlopsError, match=r"flights.csv: landings that do not follow.*\n    line 0: .*flight=1,"):
            ingest.check_flight_times(flights)


# ---- values

def test_impossible_values_are_named_by_line_and_key():
    flights = few_flights().assign(distance=[1400, 0, 1400, 99_999])
    with pytest.raises(MlopsError) as caught: ingest.check_limits(ingest.FLIGHTS_FILE, flights)
    assert caught.value.message.splitlines()[0] == "flights.csv: distance outside 1 to 12500"
    assert [line.strip()[:7] for line in caught.value.message.splitlines()[1:]] == ["line 1:", "line 3:"]
    assert "carrier=UA, flight=2" in caught.value.message and "distance=99999" in caught.value.message


@pytest.mark.parametrize("column, value", [("hour", 6), ("minute", 16), ("day", 2), ("sched_dep_time", 1715),
                                           ("time_hour", pd.Timestamp("2013-01-01T11:00Z"))])
def test_contradicting_departure_columns_are_refused(column, value):
    flights = few_flights()
    ingest.check_clocks(flights)
    flights.loc[2, column] = value
    with pytest.raises(MlopsError, match="contradict each other\n    line 2: "):
        ingest.check_clocks(flights)


def test_airports_of_the_file_take_precedence_over_our_own():
    airports = ingest.MISSING_AIRPORTS.head(1).assign(name="from the file")
    whole = ingest.complete_airports(airports)
    assert whole.faa.tolist() == ["BQN", "PSE", "SJU", "STT"] and whole.name.tolist()[0] == "from the file"
