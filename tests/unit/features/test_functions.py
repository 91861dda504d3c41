"""Feature functions: the same numbers for a column, for one request, and by the body that Unity Catalog gets."""
import math
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features import functions as ff
from mlops_nb.flights import feature_engineering


@pytest.fixture
def env(tmp_path): return replace(load_env("dev"), engine="sail", lakehouse=str(tmp_path))


FUNCTIONS = {f.__name__: ff.declare_function(f"dev.flights.{f.__name__}", f, uses)
             for f, uses in feature_engineering.REQUEST_FUNCTIONS.items()}
VALUES = {
    "BIGINT": st.integers(0, 2359), "DOUBLE": st.floats(-180, 180),
    "DATE": st.dates(date(2012, 6, 1), date(2014, 6, 1)),
    "TIMESTAMP": st.datetimes(datetime(2013, 1, 1), datetime(2013, 12, 31), timezones=st.sampled_from(
        [UTC, timezone(timedelta(hours=-5))]))}


def by_unity_catalog(function: ff.Function, values: dict):
    "Return the result of the registered SQL function's body, run as on Databricks: its parameters are local names."
    body = ff.create_function_sql(function).split("$$")[1]
    lines = "\n".join("    " + line for line in body.splitlines())
    namespace = {}
    exec(f"def udf({', '.join(function.parameters)}):\n{lines}", namespace)
    return namespace["udf"](**values)


def is_same(value, other) -> bool: return value is other is None or value == pytest.approx(other, abs=1e-12)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_column_a_request_and_unity_catalog_agree(name, data):
    function = FUNCTIONS[name]
    types = function.parameters.items()
    request = st.fixed_dictionaries({parameter: st.one_of(st.none(), VALUES[kind]) for parameter, kind in types})
    requests = data.draw(st.lists(request, min_size=1, max_size=4))
    columns = {}
    for parameter, kind in types:
        dtype = "float64" if kind in ("BIGINT", "DOUBLE") else object
        columns[parameter] = pd.Series([request[parameter] for request in requests], dtype=dtype)
    batch = np.asarray(ff.call(function, columns), float)
    for request, in_batch in zip(requests, batch, strict=True):
        online = ff.call_online(function, request)
        assert is_same(online, None if np.isnan(in_batch) else float(in_batch))
        assert is_same(online, by_unity_catalog(function, request))
        if None in request.values(): assert online is None


def test_the_flights_functions_by_plain_python():
    def call(name, **values): return ff.call_online(FUNCTIONS[name], values)
    assert call("hour_sin", sched_dep_time=1545) == pytest.approx(math.sin(math.radians(15.75 * 15)))
    assert call("weekday", flight_day=date(2013, 2, 8)) == date(2013, 2, 8).weekday() == 4
    assert [call("days_to_holiday", flight_day=date(2013, 11, d)) for d in (10, 11, 28, 29)] == [1, 0, 0, 1]
    minute = datetime(2013, 3, 10, 6, 59, tzinfo=UTC)  # a minute before New York's clocks change
    assert call("scheduled_minutes", scheduled_departure=minute, scheduled_arrival=minute + timedelta(minutes=90)) == 90
    assert call("great_circle", lat=0.0, lon=0.0, other_lat=0.0, other_lon=180.0) == pytest.approx(3958.8 * math.pi)


def first(code: str) -> str:
    "The first letter."
    return np.char.ljust(np.asarray(code, str), 1).astype("U1") if isinstance(code, np.ndarray) else code[:1]


def many(seats: int) -> bool:
    "Whether there are many."
    return seats > 200


def test_results_can_be_strings_and_booleans(env):
    assert ff.call_online(ff.register_function(None, env, first), {"code": "JFK"}) == "J"
    function = ff.register_function(None, env, many)
    assert ff.call_online(function, {"seats": 300}) is True and ff.call_online(function, {"seats": 3}) is False
    assert ff.call(function, {"seats": pd.Series([3, 300])}).tolist() == [False, True]


def test_registering_a_function_again_replaces_it(env):
    old = ff.register_function(None, env, many)
    assert ff.register_function(None, env, many) == old == ff.get_function(env, "many")
    assert ff.function_names(env, "many") == ["dev.flights.many"]


def untyped(a, b: int) -> float: return b
def odd(a: list) -> float: return a
def silent(a: int): return a


@pytest.mark.parametrize("function, message", [
    (untyped, "parameter 'a' of untyped has no annotation"),
    (odd, "parameter 'a' of odd has the annotation <class 'list'>"),
    (silent, "the result of silent has no annotation")])
def test_a_function_without_types_is_refused(env, function, message):
    with pytest.raises(MlopsError, match=message): ff.register_function(None, env, function)
    assert ff.function_names(env, "any") == []


def test_a_target_registers_in_its_own_catalog_only(env, tmp_path):
    prod = replace(env, catalog="prod", write=("prod",), read=("prod",))
    assert ff.register_function(None, prod, many).name == "prod.flights.many"
    with pytest.raises(MlopsError, match="write"): ff.register_function(None, replace(env, catalog="prod"), many)
    with pytest.raises(MlopsError, match="no function 'dev.flights.mani'"): ff.get_function(env, "mani")
