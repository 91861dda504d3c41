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


FUNCTIONS = {f.__name__: ff.declare_function(f"dev.flights.{f.__name__}", f, uses) for f, uses in feature_engineering.ON_DEMAND.items()}
VALUES = {
    "BIGINT": st.integers(0, 2359), "DOUBLE": st.floats(-180, 180),
    "DATE": st.dates(date(2012, 6, 1), date(2014, 6, 1)),
    "TIMESTAMP": st.datetimes(datetime(2013, 1, 1), datetime(2013, 12, 31), timezones=st.sampled_from(
        [UTC, timezone(timedelta(hours=-5))]))}


def by_unity_catalog(function: ff.Function, values: dict):
    "What the body of the registered SQL function returns, run as Databricks does: the parameters are names in it."
    body = ff.create_function_sql(function).split("$$")[1]
    lines = "\n".join("    " + line for line in body.splitlines())
    space = {}
    exec(f"def udf({', '.join(function.parameters)}):\n{lines}", space)
    return space["udf"](**values)


def same(one, other) -> bool: return one is other is None or one == pytest.approx(other, abs=1e-12)


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_column_a_request_and_unity_catalog_agree(name, data):
    function = FUNCTIONS[name]
    kinds = function.parameters.items()
    requests = data.draw(st.lists(st.fixed_dictionaries({p: st.one_of(st.none(), VALUES[k]) for p, k in kinds}), min_size=1, max_size=4))
    column = lambda p, kind: pd.Series([r[p] for r in requests], dtype={"BIGINT": "float64", "DOUBLE": "float64"}.get(kind, object))
    batch = np.asarray(ff.call(function, {p: column(p, kind) for p, kind in kinds}), float)
    for request, found in zip(requests, batch, strict=True):
        online = ff.call_online(function, request)
        assert same(online, None if np.isnan(found) else float(found))
        assert same(online, by_unity_catalog(function, request))
        if None in request.values(): assert online is None


def test_the_flights_functions_by_plain_python():
    call = lambda name, **values: ff.call_online(FUNCTIONS[name], values)
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


def test_texts_and_booleans_are_values_too(env):
    assert ff.call_online(ff.register_function(None, env, first), {"code": "JFK"}) == "J"
    made = ff.register_function(None, env, many)
    assert ff.call_online(made, {"seats": 300}) is True and ff.call_online(made, {"seats": 3}) is False
    assert ff.call(made, {"seats": pd.Series([3, 300])}).tolist() == [False, True]


def test_a_function_is_registered_again_in_its_place(env):
    old = ff.register_function(None, env, many)
    assert ff.register_function(None, env, many) == old == ff.get(env, "many") and ff.function_names(env, "many") == ["dev.flights.many"]


def untyped(a, b: int) -> float: return b
def odd(a: list) -> float: return a
def silent(a: int): return a


@pytest.mark.parametrize("function, message", [
    (untyped, "parameter 'a' of untyped has no annotation"), (odd, "parameter 'a' of odd has the annotation <class 'list'>"),
    (silent, "the result of silent has no annotation")])
def test_a_function_without_types_is_refused(env, function, message):
    with pytest.raises(MlopsError, match=message): ff.register_function(None, env, function)
    assert ff.function_names(env, "any") == []


def test_a_target_registers_in_its_own_catalog_only(env, tmp_path):
    assert ff.register_function(None, replace(env, catalog="prod", write=("prod",), read=("prod",)), many).name == "prod.flights.many"
    with pytest.raises(MlopsError, match="write"): ff.register_function(None, replace(env, catalog="prod"), many)
    with pytest.raises(MlopsError, match="no function 'dev.flights.mani'"): ff.get(env, "mani")
