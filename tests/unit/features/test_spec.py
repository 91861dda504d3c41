"""What can be declared as features, and how it is stored with a model."""
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.features.feature_tables import FeatureTable
from mlops_nb.features.functions import Function
from mlops_nb.features.online import default_of
from mlops_nb.features.spec import (
    Column,
    FeatureFunction,
    FeatureLookup,
    FeatureSpec,
    from_yaml,
    make_spec,
    to_dict,
    to_yaml,
)

HOURS = FeatureTable("dev.s.hours", ["place", "kind", "ts"], "ts", {
    "place": "string", "kind": "int", "ts": "timestamp", "level": "double", "count": "bigint"})
PLACES = FeatureTable("dev.s.places", ["place"], None, {"place": "string", "height": "double"})
DAYS = FeatureTable("dev.s.days", ["day"], None, {"day": "date", "holiday": "boolean"})
TABLES = {t.name: t for t in (HOURS, PLACES, DAYS)}
COLUMNS = {"id": "bigint", "place": "string", "kind": "int", "at": "timestamp", "day": "date", "other": "string"}
TOTAL = Function("dev.s.total", {"a": "DOUBLE", "b": "DOUBLE"}, "DOUBLE", "def total(a, b): return a + b")
HOURS_LOOKUP = FeatureLookup("dev.s.hours", ["place", "kind"], timestamp_lookup_key="at")
PLACES_LOOKUP = FeatureLookup("dev.s.places", "place")


def hours(**change) -> FeatureLookup: return replace(HOURS_LOOKUP, **change)
def total(a: str, b: str, name=None) -> FeatureFunction: return FeatureFunction("dev.s.total", {"a": a, "b": b}, name)


def spec_of(*features, exclude=()) -> FeatureSpec:
    return make_spec(COLUMNS, features, exclude, TABLES, {"dev.s.total": TOTAL})


def test_columns_come_in_an_order_in_which_they_can_be_computed():
    features = [total("first", "height", "second"), total("level", "height", "first"), hours(), PLACES_LOOKUP]
    spec = spec_of(*features, exclude=["id", "at", "height"])
    assert [c.name for c in spec.columns] == [*COLUMNS, "level", "count", "height", "first", "second"]
    assert spec.inputs == ["place", "kind", "day", "other", "level", "count", "first", "second"]
    assert from_yaml(to_yaml(spec), "x") == spec


def test_the_yaml_has_the_fields_of_the_contract():
    lookup = hours(feature_names="count", rename_outputs={"count": "n"}, default_values={"n": 7},
                   lookback_window=timedelta(hours=6))
    content = to_dict(spec_of(lookup, total("n", "n"), exclude="id"))
    columns = {name: values for entry in content["input_columns"] for name, values in entry.items()}
    assert list(content) == ["input_columns", "input_tables", "input_functions", "workspace_id",
                             "feature_store_client_version", "serialization_version"]
    assert columns["n"] == {"data_type": "long", "source": "feature_store", "topological_ordering": 6,
                            "table_name": "dev.s.hours", "feature_name": "count", "lookup_key": ["place", "kind"],
                            "timestamp_lookup_key": ["at"], "default_value": "7"}
    assert columns["total"] == {"data_type": "double", "source": "on_demand_feature", "topological_ordering": 7,
                                "udf_name": "dev.s.total", "input_bindings": {"a": "n", "b": "n"}}
    assert columns["id"] == {"data_type": "long", "source": "training_data", "topological_ordering": 0,
                             "include": False}
    assert content["input_tables"] == [{"dev.s.hours": {"lookback_window": 21600.0}}]
    assert content["input_functions"] == [{"dev.s.total": {}}]


@pytest.mark.parametrize("features, message", [
    ([hours(lookup_key=["kind", "place"])], "column 'kind' is int, but key 'place' of table dev.s.hours is string"),
    ([hours(lookup_key="place")],
     "lookup_key of dev.s.hours is place\n.*one column for each of: place, kind, in this order"),
    ([hours(lookup_key=["plcae", "kind"])], "no column 'plcae' in the input rows\n.*did you mean 'place'"),
    ([hours(timestamp_lookup_key="day")], "column 'day' is date, but key 'ts' of table dev.s.hours is timestamp"),
    ([hours(timestamp_lookup_key=None)],
     "dev.s.hours has the timeseries_column ts, and timestamp_lookup_key is None"),
    ([replace(PLACES_LOOKUP, timestamp_lookup_key="at")],
     "dev.s.places has no timeseries_column, and timestamp_lookup_key is 'at'"),
    ([FeatureLookup("dev.s.days", "day")], "primary key 'day' of dev.s.days is a date\n.*timeseries_column"),
    ([hours(feature_names=["level", "depth"])], "no feature 'depth' in dev.s.hours"),
    ([hours(rename_outputs={"lvl": "x"})], "no feature 'lvl' in dev.s.hours\n.*did you mean 'level'"),
    ([hours(default_values={"depth": 1})], "no feature 'depth' in default_values of dev.s.hours"),
    ([hours(), hours()], "feature 'level' of dev.s.hours: dev.s.hours has a feature of that name"),
    ([hours(rename_outputs={"level": "id"})],
     "feature 'id' of dev.s.hours: the input rows have a column of that name"),
    ([hours(feature_names="level", lookback_window=timedelta(days=1)), hours(feature_names="count")],
     "two lookups of dev.s.hours have lookback_window 1 day, 0:00:00 and None"),
    ([FeatureFunction("dev.s.total", {"a": "id"})], "input_bindings of dev.s.total lack b"),
    ([FeatureFunction("dev.s.total", {"a": "id", "b": "id", "c": "id"})], "no parameter 'c' in dev.s.total"),
    ([total("place", "id")], "parameter 'a' of dev.s.total is DOUBLE, and column 'place' is string"),
    ([total("x", "id", "y"), total("y", "id", "x")], "no column 'x' in the possible inputs of function y")])
def test_declarations_that_do_not_fit_are_refused(features, message):
    with pytest.raises(MlopsError, match=message): spec_of(*features)


DAY, NOON = date(2013, 1, 1), datetime(2013, 1, 1, 12)
DEFAULTS = {  # by type: values that a feature can have, and values that it cannot have
    "tinyint": ([3, -128], [128, 1.5, True, "3", None]), "int": ([2**31 - 1, np.int64(3)], [2**31, 0.5]),
    "bigint": ([2**40], [2**63, NOON]), "double": ([1, 0.5, float("nan"), np.float32(1)], ["calm", False, None, DAY]),
    "decimal(9,2)": ([Decimal("0.5"), 1], ["1", True]), "boolean": ([True], ["true", 1, None]),
    "string": (["a", ""], [1, None, b"a"]), "date": ([DAY], ["2013-01-01", NOON]),
    "timestamp": ([NOON], ["2013-01-01", DAY, 0]), "array<int>": ([], [[1], 1])}


def with_default(kind: str, value) -> Column:
    "Return a looked-up column of this type with this default."
    lookup = FeatureLookup("dev.s.t", "place", rename_outputs={"x": "y"}, default_values={"y": value})
    table = FeatureTable("dev.s.t", ["place"], None, {"place": "string", "x": kind})
    return make_spec(COLUMNS, [lookup], (), {"dev.s.t": table}, {}).of("feature_store")[0]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_default_of_another_type_is_refused_before_anything_is_computed(kind):
    valid, invalid = DEFAULTS[kind]
    assert [with_default(kind, value).default_value for value in valid] == [str(value) for value in valid]
    for value in invalid:
        with pytest.raises(MlopsError, match="the default of feature 'y' of dev.s.t is .*, and the feature is"):
            with_default(kind, value)


@pytest.mark.parametrize("kind, value, online", [
    ("boolean", True, True), ("boolean", False, False), ("tinyint", 3, 3), ("double", 3, 3.0), ("date", DAY, DAY),
    ("timestamp", NOON, NOON.replace(tzinfo=UTC)), ("string", "a", "a")])
def test_a_default_is_the_same_online_and_in_a_batch(kind, value, online):
    default = default_of(with_default(kind, value))
    assert default == online and type(default) is type(online)


def test_excluding_a_column_that_does_not_exist_is_refused():
    with pytest.raises(MlopsError, match="no column 'ids' in exclude_columns"): spec_of(hours(), exclude=["ids"])


def test_a_negative_lookback_is_refused():
    with pytest.raises(MlopsError, match="lookback_window of dev.s.hours is -1 day"):
        hours(lookback_window=timedelta(days=-1))


def test_another_version_of_the_format_is_refused():
    with pytest.raises(MlopsError, match="version 3 of its format"):
        from_yaml("serialization_version: 3", "feature_spec.yaml")


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None, database=None)
@given(names=st.lists(NAMES, min_size=3, max_size=3, unique_by=str.lower),
       window=st.timedeltas(timedelta(0), timedelta(seconds=2**32)))  # 136 years
@example(names=["no", "<<", "1e5"], window=timedelta(microseconds=1))
@example(names=["a.b: c", "long " * 40, "# x"], window=timedelta(milliseconds=500))
@example(names=["=", "~", "2013-01-01"], window=timedelta.max)
def test_the_yaml_keeps_every_name_and_the_microseconds_of_a_window(names, window):
    key, time, feature = names
    table = FeatureTable("dev.s.odd", [key, time], time, {key: "string", time: "timestamp", feature: "double"})
    lookup = FeatureLookup(table.name, "place", timestamp_lookup_key="at", rename_outputs={feature: feature + "?"},
                           lookback_window=window)
    spec = make_spec(COLUMNS, [lookup, total(feature + "?", feature + "?", feature + "!")], [], {table.name: table},
                     {"dev.s.total": TOTAL})
    assert from_yaml(to_yaml(spec), "x") == spec
    assert yaml.safe_load(to_yaml(spec)) == to_dict(spec)  # as Databricks' client reads it


def test_names_that_differ_only_in_case_are_one_name():
    for lookup in (hours(rename_outputs={"level": "Place"}), hours(rename_outputs={"level": "COUNT"})):
        with pytest.raises(MlopsError, match="of that name\n.*column names are not case-sensitive"): spec_of(lookup)
