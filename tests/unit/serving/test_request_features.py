"""Features of requests: values of JSON, overrides, keys that are missing, refusals, many rows, threads."""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features import functions as feature_functions
from mlops_nb.features.feature_model import FEATURE_STORE_FOLDER, SPEC
from mlops_nb.features.feature_tables import FeatureTable
from mlops_nb.features.online import OnlineFeatures
from mlops_nb.features.spec import FeatureFunction, FeatureLookup, FeatureSpec, make_spec, to_yaml
from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import OnlineStore, open_store
from mlops_nb.serving.request_features import json_reader, request_features
from mlops_nb.serving.scoring_protocol import Refusal

NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
WEATHER = FeatureTable("dev.flights.weather", ["airport", "ts"], "ts", {
    "airport": "string", "ts": "timestamp", "temperature": "double", "wind": "int", "calm": "boolean",
    "measured": "timestamp", "since": "date", "station": "string"})
RUNWAYS = FeatureTable("dev.flights.runways", ["airport", "number"], None, {
    "airport": "string", "number": "bigint", "length": "float"})
INPUTS = {"flight": "int", "origin": "string", "dest": "string", "day": "date", "leaves": "timestamp",
          "runway": "bigint", "seats": "double"}
LOOKUPS = [
    FeatureLookup(WEATHER.name, "origin", timestamp_lookup_key="leaves", default_values={"wind": 5}),
    FeatureLookup(WEATHER.name, "dest", ["temperature"], {"temperature": "dest_temperature"}, "leaves"),
    FeatureLookup(RUNWAYS.name, ["origin", "runway"])]
ROW = {"origin": "JFK", "dest": "LGA", "day": "2013-07-01", "leaves": "2013-07-01T12:00:00Z", "runway": 4, "seats": 180}
FOUND = {"origin": "JFK", "seats": 180.0, "temperature": 75.5, "wind": 20, "calm": False, "measured": NOON,
         "since": date(1948, 7, 1), "station": "KJFK", "dest_temperature": None, "length": 12079.0, "warmth": 43.5,
         "hours_to_noon": 0.0}


def warmth(temperature: float) -> float:
    "Degrees above freezing."
    return temperature - 32


def hours_to_noon(leaves: datetime, day: date) -> float:
    "Hours from noon."
    return (leaves - day.astype("datetime64[us]")) / np.timedelta64(3600, "s") - 12


def ratio(temperature: float) -> float:
    "A function that fails for some values."
    return 1 / float(temperature) if np.ndim(temperature) == 0 else 1 / temperature


def spec_of(features, excluded=("flight", "dest", "day", "leaves", "runway")) -> FeatureSpec:
    tables = {WEATHER.name: WEATHER, RUNWAYS.name: RUNWAYS}
    functions = {f"dev.flights.{f.__name__}": feature_functions.declare_function(f"dev.flights.{f.__name__}", f)
                 for f in (warmth, hours_to_noon, ratio)}
    return make_spec(INPUTS, features, excluded, tables, functions)


def function(of, **bindings) -> FeatureFunction: return FeatureFunction(f"dev.flights.{of.__name__}", bindings)


SPEC_OF_MODEL = spec_of([*LOOKUPS, function(warmth, temperature="temperature"),
                         function(hours_to_noon, leaves="leaves", day="day")])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A target with an online store and registered functions of its own."
    folder = tmp_path_factory.mktemp("home")
    own = replace(load_env("dev"), home="local", engine="sail", state=folder, lakehouse=str(folder / "lakehouse"),
                  variables={})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLOPS_ONLINE_STORE", raising=False)
        for f in (warmth, hours_to_noon, ratio): feature_functions.register_function(None, own, f)
        yield own


WEATHER_ROWS = pa.table({
    "airport": ["JFK", "EWR", "NAN"], "ts": pa.array([NOON] * 3, pa.timestamp("us", "UTC")),
    "temperature": [75.5, None, float("nan")], "wind": pa.array([20, None, 1], pa.int32()), "calm": [False, None, True],
    "measured": pa.array([NOON, None, NOON], pa.timestamp("us", "UTC")),
    "since": pa.array([date(1948, 7, 1), None, None], pa.date32()), "station": ["KJFK", None, "NaN"]})
RUNWAY_ROWS = pa.table({"airport": ["JFK", "EWR"], "number": [4, 11],
                        "length": pa.array([12079, 0.1], pa.float32())})


def publish_rows(home, version: int = 1) -> None:
    with open_store(f"sqlite:///{home.state}/online.db") as store:
        for table, rows, keys in ((WEATHER, WEATHER_ROWS, ["airport"]),
                                  (RUNWAYS, RUNWAY_ROWS, ["airport", "number"])):
            store.upsert(layout_of(table.name, rows.schema, keys), rows, version)
            store.finish(table.name, version)


@pytest.fixture(scope="module")
def published(home):
    publish_rows(home)
    return home


def folder_of(home, spec: FeatureSpec, name: str = "model") -> Path:
    "The folder of a model with this spec, without the model."
    folder = home.state / name
    (folder / FEATURE_STORE_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FEATURE_STORE_FOLDER / SPEC).write_text(to_yaml(spec))
    return folder


@pytest.fixture(scope="module")
def served(published):
    features = request_features(published, folder_of(published, SPEC_OF_MODEL))
    yield features
    features.close()


def refused(served, *rows) -> str:
    "The message of the refusal of some rows; the sender's fault."
    with pytest.raises(Refusal) as refusal: served.complete(rows)
    assert (refusal.value.status, refusal.value.error_code) == (400, "BAD_REQUEST")
    return refusal.value.message


def test_a_row_of_keys_gets_the_inputs_of_the_model_in_the_order_of_the_spec(served):
    assert served.is_local and served.outputs == tuple(SPEC_OF_MODEL.inputs)
    assert set(served.required) == {"origin", "dest", "day", "leaves", "runway", "seats"}
    (row,) = served.complete([ROW])
    assert row == FOUND and tuple(row) == served.outputs
    assert all(type(row[name]) is type(value) for name, value in FOUND.items())


def test_a_model_without_a_spec_has_no_features(home, tmp_path):
    assert request_features(home, tmp_path) is None


def test_keys_without_a_row_give_nulls_and_defaults(served):
    (row,) = served.complete([ROW | {"origin": "???", "seats": None}])
    assert row == dict.fromkeys(FOUND) | {"origin": "???", "wind": 5, "hours_to_noon": 0.0}
    assert served.complete([ROW | {"origin": None}]) == [row | {"origin": None, "seats": 180.0}]
    (row,) = served.complete([ROW | {"origin": "EWR", "runway": 11, "dest": "JFK"}])  # a row of nulls
    assert (row["wind"], row["temperature"], row["warmth"], row["dest_temperature"]) == (5, None, None, 75.5)
    assert row["length"] == float(np.float32(0.1))


def test_nan_that_is_stored_stays_nan(served):
    (row,) = served.complete([ROW | {"origin": "NAN"}])
    assert np.isnan(row["temperature"]) and row["warmth"] is None
    assert (row["station"], row["calm"], row["measured"]) == ("NaN", True, NOON)


@pytest.mark.parametrize("given_values, expected", [
    ({"temperature": 42}, {"temperature": 42.0, "warmth": 10.0}),  # a function sees it
    ({"temperature": None}, {"temperature": None, "warmth": None}),  # null, as in a batch
    ({"wind": None}, {"wind": None}),  # not the default
    ({"warmth": 1, "measured": "2013-01-01", "since": "2013-01-01T00:00:00", "calm": True},
     {"warmth": 1.0, "measured": datetime(2013, 1, 1, tzinfo=UTC), "since": date(2013, 1, 1), "calm": True}),
    ({"length": 0.1}, {"length": float(np.float32(0.1))}),  # the precision of the table's column
    ({"flight": "not used", "comment": [1]}, {})])
def test_a_value_of_the_request_replaces_the_feature(served, given_values, expected):
    assert served.complete([ROW | given_values]) == [FOUND | expected]


def test_a_request_with_all_features_of_a_lookup_still_gets_the_others(served):
    everything = {name: FOUND[name] for name in ("temperature", "wind", "calm", "station")}
    given_values = everything | {"measured": "2013-07-01T12:00:00Z", "since": "1948-07-01", "length": 1}
    assert served.complete([ROW | given_values]) == [FOUND | {"length": 1.0}]
    assert served.complete([ROW | given_values | {"dest": "JFK"}])[0]["dest_temperature"] == 75.5


@pytest.mark.parametrize("name", ["origin", "dest", "day", "leaves", "runway", "seats"])
def test_a_missing_field_is_named_with_what_needs_it(served, name):
    message = refused(served, {k: v for k, v in ROW.items() if k != name})
    users = {"seats": "the model", "leaves": "hours_to_noon", "day": "hours_to_noon", "runway": RUNWAYS.name,
             "origin": RUNWAYS.name, "dest": WEATHER.name}
    assert message.startswith(f"the request has no {name!r}, which {users[name]} needs; it has: ")
    assert all(other in message for other in ROW if other != name)
    both = refused(served, {k: v for k, v in ROW.items() if k not in (name, "seats")})
    assert "no 'seats', which the model needs" in both and repr(name) in both.partition("; it has: ")[0]


def test_all_missing_fields_are_named_at_once(served):
    assert refused(served, ROW, {}) == (
        f"rows[1] has no 'origin', 'runway', which {RUNWAYS.name} needs, no 'seats', which the model needs, "
        f"no 'leaves', 'day', which hours_to_noon needs, no 'dest', which {WEATHER.name} needs; it has: no field")


@pytest.mark.parametrize("name, value, expected", [
    ("origin", 5, "string, got 5: it takes a string"), ("origin", True, "string, got True"),
    ("origin", "a\0b", "NUL"), ("origin", "\ud800", "surrogate"), ("seats", [1], "it takes a number"),
    ("seats", "180", "double, got '180': it takes a number"), ("seats", False, "double, got False"),
    ("seats", 10**400, "double, got 1000"),
    ("runway", 4.5, "bigint, got 4.5: it takes a whole number that fits"), ("runway", 2**63, "fits"),
    ("runway", "4", "bigint, got '4'"), ("runway", True, "bigint"), ("runway", float("inf"), "bigint, got inf"),
    ("day", "2013-07-32", "date, got '2013-07-32': day is out of range"), ("day", "2013-07-01T12:00:00", "at midnight"),
    ("day", 15887, "write ISO text"), ("leaves", "noon", "timestamp, got 'noon': Invalid isoformat"),
    ("leaves", 1372680000000, "nanoseconds since 1970, and this one is too small: write ISO text"),
    ("leaves", {"at": 1}, "it takes ISO text"), ("leaves", "0001-01-01T00:00:00+14:00", "range"),
    ("leaves", 10**40, "timestamp, got 1"), ("wind", 2**31, "int, got 2147483648"), ("calm", 1, "true or false"),
    ("length", 1e300, "float, got 1e+300: float too large"), ("since", "", "date, got ''"),
    ("Wind", 1, "only in case")])
def test_a_value_of_another_type_is_refused_with_its_field(served, name, value, expected):
    message = refused(served, ROW | {name: value})
    assert message.startswith(f"field {name!r} of the request ") and expected in message and len(message) < 500
    assert refused(served, ROW, ROW | {name: value}).startswith(f"field {name!r} of rows[1] ")


MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1))


@given(MOMENTS, st.integers(-12 * 60, 14 * 60))
def test_timestamps_are_read_in_every_form_that_clients_write(moment, offset):
    read, stamp, utc = json_reader("timestamp"), pd.Timestamp(moment), moment.replace(tzinfo=UTC)
    zone = pd.Timedelta(minutes=offset)
    local = (stamp + zone).tz_localize(offset * 60)
    forms = [moment.isoformat(), str(moment), stamp.isoformat(), utc.isoformat(), f"{moment.isoformat()}Z",
             local.isoformat(), str(local), str(np.datetime64(moment, "ns")), json.loads(json.dumps(stamp.value))]
    assert {read(form) for form in forms} == {utc}
    assert all(read(form).utcoffset().total_seconds() == 0 for form in forms)
    assert json_reader("timestamp_ntz")(local.isoformat()) == moment
    day = moment.date()
    assert json_reader("date")(str(day)) == json_reader("date")(f"{day}T00:00:00.000") == day


@pytest.mark.parametrize("kind, value, expected", [
    ("tinyint", -128, -128), ("int", 600.0, 600), ("bigint", -2**63, -2**63), ("decimal(9,2)", 1, 1.0),
    ("binary", "aGk=", b"hi"), ("array<double>", [1, None, 0.5], [1.0, None, 0.5]), ("array<string>", [], []),
    ("map<string,int>", {"a": 1}, {"a": 1})])
def test_values_of_other_types(kind, value, expected):
    assert json_reader(kind)(value) == expected


@pytest.mark.parametrize("kind, value", [("binary", "not base64"), ("array<int>", [0.5]), ("array<int>", 1),
                                         ("decimal(9,2)", "1")])
def test_values_of_other_types_that_do_not_fit(kind, value):
    with pytest.raises(ValueError): json_reader(kind)(value)


def test_many_rows_are_those_of_single_requests(served):
    rows = [ROW, ROW | {"origin": "???"}, ROW | {"dest": "JFK", "temperature": 1}, ROW, ROW | {"origin": None}]
    assert served.complete(rows) == [served.complete([row])[0] for row in rows]
    assert served.complete([]) == []


def test_stores_without_a_joined_statement_give_the_same(published, served):
    "The reader that servers use, on the rows of SQLite: each table is read once, each key once."
    with open_store(f"sqlite:///{published.state}/online.db") as store:
        store.joined_reader = lambda lookups: OnlineStore.joined_reader(store, lookups)
        reads, get = [], store.get
        def counted(table, keys, columns):
            reads.append((table, sorted(keys)))
            return get(table, keys, columns)
        store.get = counted
        features = OnlineFeatures(published, SPEC_OF_MODEL, store)
        rows = [ROW | {"dest": dest, "origin": origin} for dest in ("LGA", "JFK") for origin in ("JFK", "EWR", None)]
        requests = [served.read_row(row, "a row") for row in rows]
        assert features.inputs(requests) == served.complete(rows)
    assert reads == [(WEATHER.name, [("EWR",), ("JFK",), ("LGA",)]),
                     (RUNWAYS.name, [("EWR", 4), ("JFK", 4)])]


def test_threads_share_it(served):
    rows = [ROW | {"seats": i, "origin": ("JFK", "EWR", "???")[i % 3], "dest": ("LGA", "JFK")[i % 2]}
            for i in range(400)]
    with ThreadPoolExecutor(16) as pool: completed = list(pool.map(lambda row: served.complete([row])[0], rows))
    assert completed == [served.complete([row])[0] for row in rows]
    assert [row["seats"] for row in completed] == [float(i) for i in range(400)]


def test_a_request_sees_what_was_published_last(home, served):
    fresh = WEATHER_ROWS.set_column(2, "temperature", pa.array([1.5, None, None]))
    with open_store(f"sqlite:///{home.state}/online.db") as store:
        for rows, version in ((fresh, 2), (WEATHER_ROWS, 3)):
            store.upsert(layout_of(WEATHER.name, rows.schema, ["airport"]), rows, version)
            assert served.complete([ROW])[0]["temperature"] == rows["temperature"][0].as_py()


def test_rows_expire(published):
    spec = spec_of([replace(lookup) for lookup in LOOKUPS[:1]])
    features = request_features(published, folder_of(published, spec, "expiring"))
    with open_store(f"sqlite:///{published.state}/online.db") as store:
        store.upsert(layout_of(WEATHER.name, WEATHER_ROWS.schema, ["airport"], ttl=1000), WEATHER_ROWS, 4)
        assert features.complete([ROW])[0]["temperature"] == 75.5
        now = features.store.clock()
        features.store.clock = lambda: now + 1001
        assert features.complete([ROW])[0] == {"origin": "JFK", "seats": 180.0, **dict.fromkeys(WEATHER.features),
                                               "wind": 5}
        store.upsert(layout_of(WEATHER.name, WEATHER_ROWS.schema, ["airport"]), WEATHER_ROWS, 5)
    features.close()


def test_a_function_that_fails_is_named(published):
    spec = spec_of([*LOOKUPS[:1], function(ratio, temperature="temperature")])
    features = request_features(published, folder_of(published, spec, "ratio"))
    assert features.complete([ROW])[0]["ratio"] == 1 / 75.5
    message = refused(features, ROW | {"temperature": 0})
    assert message == "feature 'ratio' cannot be computed: ZeroDivisionError: float division by zero"
    features.close()


# ---- what is missing when a model is loaded, and afterwards

def test_tables_that_are_not_published_are_an_error_with_the_job_that_publishes_them(home, tmp_path):
    own = replace(home, state=tmp_path)
    folder = folder_of(own, SPEC_OF_MODEL)
    message = (f"table {WEATHER.name}, which the model looks up, does not exist in the online store sqlite:.*\n"
               "  the job features publishes the tables of the use case: mlops run features -t dev")
    with pytest.raises(MlopsError, match=message): request_features(own, folder)
    with open_store(f"sqlite:///{tmp_path}/online.db") as store:
        store.upsert(layout_of(WEATHER.name, WEATHER_ROWS.schema, ["airport"]), WEATHER_ROWS, 1)
        with pytest.raises(MlopsError, match="is not complete in the online store"): request_features(own, folder)
        store.finish(WEATHER.name, 1)
        with pytest.raises(MlopsError, match=f"table {RUNWAYS.name}, .* does not exist"): request_features(own, folder)


def test_a_column_that_is_not_published_is_an_error(home, tmp_path):
    own = replace(home, state=tmp_path)
    publish_rows(own)
    lookup = FeatureLookup(WEATHER.name, "origin", ["wind"], {}, "leaves")
    spec = spec_of([lookup])
    newer = replace(spec, columns=tuple(replace(c, feature_name="humidity") if c.feature_name else c
                                        for c in spec.columns))
    with pytest.raises(MlopsError, match="has no column humidity, which the model looks up\n.*mlops run features"):
        request_features(own, folder_of(own, newer))


def test_other_keys_in_the_store_are_an_error(home, tmp_path):
    own = replace(home, state=tmp_path)
    with open_store(f"sqlite:///{tmp_path}/online.db") as store:
        store.upsert(layout_of(WEATHER.name, WEATHER_ROWS.schema, ["airport", "ts"]), WEATHER_ROWS, 1)
        store.finish(WEATHER.name, 1)
    with pytest.raises(MlopsError, match="is published with the keys airport, ts, and the model looks it up by origin"):
        request_features(own, folder_of(own, spec_of(LOOKUPS[:1])))


def test_a_function_that_is_not_registered_is_an_error(published, tmp_path):
    other = replace(published, lakehouse=str(tmp_path / "other"))
    with pytest.raises(MlopsError, match="no function 'dev.flights.warmth' in the catalog\n.*mlops run features"):
        request_features(other, folder_of(published, SPEC_OF_MODEL))


def test_a_store_that_fails_later_is_no_fault_of_the_sender(home, tmp_path):
    own = replace(home, state=tmp_path)
    publish_rows(own)
    features = request_features(own, folder_of(own, SPEC_OF_MODEL))
    with open_store(f"sqlite:///{tmp_path}/online.db") as store: store.drop(RUNWAYS.name)
    for rows in ([ROW], [ROW, ROW]):
        with pytest.raises(Refusal) as refusal: features.complete(rows)
        assert (refusal.value.status, refusal.value.error_code) == (503, "TEMPORARILY_UNAVAILABLE")
        assert refusal.value.message == ("the features cannot be looked up in the online store: no such table: "
                                         f"{RUNWAYS.name}")
    publish_rows(own)
    assert features.complete([ROW]) == [FOUND]
    features.close()
