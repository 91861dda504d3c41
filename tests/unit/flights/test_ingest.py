"Reading and checking the source, the times of a flight, and which facts are known: without Spark."
import zipfile
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.flights import ingest

often = settings(max_examples=60, deadline=None)  # on a busy machine too
ZONES = ["America/New_York", "America/Phoenix", "America/Denver", "Pacific/Honolulu", "America/St_Thomas"]


def shows(moment: datetime, clock: int, zone: str) -> bool:
    local = moment.astimezone(ZoneInfo(zone))
    return local.hour * 100 + local.minute == clock


def next_time(moment: datetime, clock: int, zone: str) -> datetime:
    departure = pd.Series([moment]).astype("datetime64[us, UTC]")
    return ingest.next_clock_time(departure, pd.Series([clock]), zone)[0].to_pydatetime()


# Half of the moments lie in the nights on which the clocks change
MOMENTS = st.one_of(st.datetimes(datetime(2013, 1, 1), datetime(2013, 12, 31)),
                    st.datetimes(datetime(2013, 3, 9), datetime(2013, 3, 11)),
                    st.datetimes(datetime(2013, 11, 2), datetime(2013, 11, 4))
                    ).map(lambda t: t.replace(second=0, microsecond=0, tzinfo=UTC))


@often
@given(MOMENTS, st.integers(0, 23), st.integers(0, 59), st.sampled_from(ZONES))
def test_the_next_clock_time_is_the_first_minute_that_shows_it(moment, hour, minute, zone):
    clock, waited = hour * 100 + minute, moment + timedelta(minutes=1)
    while not shows(waited, clock, zone):
        waited += timedelta(minutes=1)
    assume(waited - moment <= timedelta(hours=25))  # otherwise the clocks skipped it on that day
    arrival = next_time(moment, clock, zone)
    skipped = zone in ZONES[0:3:2] and moment < datetime(2013, 3, 10, 10, tzinfo=UTC) and 200 <= clock < 300
    assert arrival == waited or (skipped and moment < arrival < waited)


def test_a_time_that_the_clocks_skip_counts_an_hour_later():
    evening = datetime(2013, 3, 10, 3, 0, tzinfo=UTC)
    assert next_time(evening, 215, "America/New_York") == datetime(2013, 3, 10, 7, 15, tzinfo=UTC)
    assert next_time(evening, 155, "America/New_York") == datetime(2013, 3, 10, 6, 55, tzinfo=UTC)


def test_midnight_as_2400_is_the_end_of_the_day():
    assert next_time(datetime(2013, 6, 1, 20, tzinfo=UTC), 2400, ZONES[0]) == datetime(2013, 6, 2, 4, tzinfo=UTC)


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
    ingest.check_flight_times("f.csv", flights)
    days_later = pd.Timestamp("2013-01-03T00:00Z")
    for wrong in (dict(air_time=300), dict(departure_known_at=pd.NaT), dict(arrival_known_at=days_later)):
        flights = few_flights()
        for column, value in wrong.items(): flights.loc[0, column] = value
        with pytest.raises(MlopsError, match=r"f.csv: landings that do not follow.*\n    line 0: .*flight=1,"):
            ingest.check_flight_times("f.csv", flights)


# ---- files

AIRPORT = "EWR,Newark,40.7,-74.1,18,-5,A,America/New_York"
HEADER = "faa,name,lat,lon,alt,tz,dst,tzone"


def read(tmp_path, text: str, name: str = "airports"):
    path = tmp_path / f"{name}.csv"
    path.write_text(text)
    return ingest.read_source_file(path, name)


def test_missing_values_stay_missing_and_whole_numbers_whole(tmp_path):
    header = ",".join(ingest.file_columns("planes"))
    text = f"{header}\nN1,NA,Fixed wing,BOEING,737,2,140,NA,Turbo-fan\nN2,1999.0,NA,,A320,2,,99,\n"
    frame = read(tmp_path, text, "planes")
    assert frame.index.tolist() == [2, 3]
    assert frame.year.isna().tolist() == [True, False] and str(frame.year[3]) == "1999"
    assert frame.type.isna().tolist() == [False, True] and frame.manufacturer.isna().tolist() == [False, True]
    with pytest.raises(MlopsError, match="planes.csv: Float value 1999.5.* was truncated"):
        read(tmp_path, text.replace("1999.0", "1999.5"), "planes")


def test_columns_are_found_by_name_and_further_ones_ignored(tmp_path):
    line = "1928,Newark,EWR,40.7,-74.1,18,-5,A,America/New_York"
    frame = read(tmp_path, f"since,name,faa,lat,lon,alt,tz,dst,tzone\n{line}\n")
    assert frame.loc[2, ["faa", "name", "alt"]].tolist() == ["EWR", "Newark", 18] and "since" not in frame


@pytest.mark.parametrize("text, message", [
    (f"{HEADER}\n{AIRPORT}", "airports.csv breaks off in line 2: 'EWR,Newark"),
    (f"{HEADER}\n{AIRPORT}\nJFK,Kenn", "airports.csv breaks off in line 3: 'JFK,Kenn'"),
    (f"{HEADER}\n{AIRPORT}\nJFK,Kennedy\n", "airports.csv: .*Expected 8 columns, got 2: JFK,Kennedy"),
    (f"{HEADER}\n{AIRPORT.replace('18', 'high')}\n", "airports.csv: .*invalid value 'high'"),
    (f"{HEADER}\n{AIRPORT.replace('18', '18.5')}\n", "airports.csv: .*invalid value '18.5'"),
    (f"{HEADER}\n{AIRPORT}\nNA,Nowhere,1,2,3,4,A,NA\n", "airports.csv has no faa in line 3"),
    (f"{HEADER.replace('lat', 'latitude')}\n{AIRPORT}\n", "no column 'lat' in airports.csv\n  .* dst, faa, latitude"),
    ("", "airports.csv breaks off in line 1: ''"),
    (f"{HEADER}\n", None)])
def test_damaged_files_are_refused_with_what_is_wrong(tmp_path, text, message):
    if message is None: assert read(tmp_path, text).empty
    else:
        with pytest.raises(MlopsError, match=message): read(tmp_path, text)


def test_a_zip_that_was_cut_is_refused_wherever_it_was(tmp_path):
    whole = tmp_path / "airlines.csv.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("airlines.csv", "carrier,name\n9E,Endeavor\n")
    data = whole.read_bytes()
    assert len(ingest.read_source_file(whole, "airlines")) == 1
    for size in range(0, len(data), 7):
        whole.write_bytes(data[:size])
        with pytest.raises(MlopsError, match="airlines.csv.zip cannot be unzipped"):
            ingest.read_source_file(whole, "airlines")


def test_a_zip_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "airlines.csv.zip"
    with zipfile.ZipFile(path, "w") as z: z.writestr("airlines.csv", "carrier,name\n9E,Endeavor\n")
    data = bytearray(path.read_bytes())
    data[data.index(b"Endeavor")] ^= 1
    path.write_bytes(data)
    with pytest.raises(MlopsError, match="cannot be unzipped: Bad CRC-32"): ingest.read_source_file(path, "airlines")


def test_source_files_are_located_by_name(tmp_path):
    for name in ingest.SOURCES: (tmp_path / f"{name}.csv").touch()
    assert {p.name for p in ingest.source_files(str(tmp_path)).values()} == {f"{n}.csv" for n in ingest.SOURCES}
    (tmp_path / "flights.csv.zip").touch()
    with pytest.raises(MlopsError, match="holds both flights.csv and flights.csv.zip"):
        ingest.source_files(str(tmp_path))
    for path in tmp_path.glob("flights*"): path.unlink()
    (tmp_path / "flight.csv").touch()
    with pytest.raises(MlopsError, match="no file 'flights.csv' in .*\n  did you mean 'flight.csv'"):
        ingest.source_files(str(tmp_path))
    with pytest.raises(MlopsError, match="neither a folder nor an installed package"):
        ingest.source_files("no-such-thing")


def test_a_changed_file_of_the_package_is_refused(tmp_path, monkeypatch):
    from importlib.metadata import FileHash, PackagePath

    class Installed(PackagePath):
        hash = FileHash("sha256=5hhM4Q4mYTT9z6QB6PGpUAW81PGNFrYrdXMj4oM_6ak")  # of the text "uv"
        def locate(self): return tmp_path / self.name

    monkeypatch.setattr(ingest, "files", lambda package: [Installed("data/airlines.csv")])
    (tmp_path / "airlines.csv").write_text("uv")
    ingest.check_fingerprints("some-package")
    (tmp_path / "airlines.csv").write_text("uw")
    with pytest.raises(MlopsError, match="airlines.csv is not the file that some-package installed"):
        ingest.check_fingerprints("some-package")


# ---- values

@often
@given(st.integers(-100, 3000))
def test_a_clock_shows_hours_and_minutes(number):
    good = 0 <= number <= 2400 and number % 100 < 60
    assert ingest.is_invalid_clock(pd.Series([number])).tolist() == [not good]


def test_impossible_values_are_named_by_line_and_key():
    flights = few_flights().assign(distance=[1400, 0, 1400, 99_999])
    with pytest.raises(MlopsError) as caught: ingest.check_limits("flights.csv", flights, "flights")
    assert caught.value.message.splitlines()[0] == "flights.csv: distance outside 1 to 12500"
    assert [line.strip()[:7] for line in caught.value.message.splitlines()[1:]] == ["line 1:", "line 3:"]
    assert "carrier=UA, flight=2" in caught.value.message and "distance=99999" in caught.value.message


@pytest.mark.parametrize("column, value", [("hour", 6), ("minute", 16), ("day", 2), ("sched_dep_time", 1715),
                                           ("time_hour", pd.Timestamp("2013-01-01T11:00Z"))])
def test_contradicting_departure_columns_are_refused(column, value):
    flights = few_flights()
    ingest.check_clocks("flights.csv", flights)
    flights.loc[2, column] = value
    with pytest.raises(MlopsError, match="contradict each other\n    line 2: "):
        ingest.check_clocks("flights.csv", flights)


@often
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=6))
def test_duplicate_keys_are_refused(keys):
    frame = pd.DataFrame(keys, columns=["k", "j"])
    if len(set(keys)) == len(keys): ingest.check_unique_rows("f.csv", frame, ["k", "j"])
    else:
        with pytest.raises(MlopsError, match="rows share one key .k, j."):
            ingest.check_unique_rows("f.csv", frame, ["k", "j"])


def test_many_wrong_rows_are_counted_and_three_shown():
    frame = pd.DataFrame({"k": np.zeros(1000, int)})
    with pytest.raises(MlopsError) as caught: ingest.check_unique_rows("f.csv", frame, ["k"])
    assert len(caught.value.message.splitlines()) == 5 and caught.value.message.endswith("and 997 more")


def test_airports_of_the_file_take_precedence_over_our_own():
    airports = ingest.MISSING_AIRPORTS.head(1).assign(name="from the file")
    whole = ingest.complete_airports(airports)
    assert whole.faa.tolist() == ["BQN", "PSE", "SJU", "STT"] and whole.name.tolist()[0] == "from the file"
