"""Checks of data contracts that need no data."""
import json
from datetime import date
from pathlib import Path

import pytest

from mlops_nb.data.contracts import (
    TYPES,
    Contract,
    check_declared,
    contract_problems,
    fits,
    read_contracts,
    wrong_types,
)
from mlops_nb.errors import MlopsError

ROOT = Path(__file__).parents[3]


def messages_of(**rules) -> list[str]:
    "The problems of one column with these rules, without hints and without the prefix of the key."
    problems = contract_problems({"t": {"columns": {"c": rules}}})
    return [f"{key}: {message}".removeprefix("t.columns.c").lstrip(".: ") for key, message, _ in problems]


@pytest.mark.parametrize("rules, messages", [
    ({"type": "doubel"}, ["type: no type 'doubel'"]),
    ({"typ": "double"}, ["typ: no rule 'typ'", "the column has no type"]),
    ({"type": "string", "min": 0}, ["min: type string does not support min"]),
    ({"type": "boolean", "max": True}, ["max: type boolean does not support max"]),
    ({"type": "array<int>", "max": 1}, ["max: type array<int> does not support max"]),
    ({"type": "double", "min": "0"}, ["min: '0' is not a valid double"]),
    ({"type": "bigint", "min": 0.5}, ["min: 0.5 is not a valid bigint"]),
    ({"type": "int", "max": True}, ["max: True is not a valid int"]),
    ({"type": "double", "min": 1, "max": 0}, ["max: the range from 1 to 0 is empty"]),
    ({"type": "date", "min": "2013-02-30"}, ["min: '2013-02-30' is not a valid date"]),
    ({"type": "date", "min": "2013-03-01", "max": "2013-02-01"},
     ["max: the range from 2013-03-01 to 2013-02-01 is empty"]),
    ({"type": "string", "values": ["a", 1]}, ["values[1]: 1 is not a valid string"]),
    ({"type": "string", "values": "abc"}, ["values: 'abc' is not a list of values"]),
    ({"type": "int", "values": []}, ["values: [] is not a list of values"]),
    ({"type": "double", "min": float("nan")}, ["min: nan is not a valid double"]),
    ({"type": "double", "max": float("inf")}, ["max: inf is not a valid double"]),
    ({"type": "float", "max": 1e39, "values": [10**400]},
     ["max: 1e+39 is not a valid float", f"values[0]: {10**400} is not a valid float"]),
    ({"type": "decimal(9,2)", "values": [1e37, 1e38]}, ["values[1]: 1e+38 is not a valid decimal(9,2)"]),
    ({"type": "int", "nullable": "no"}, ["nullable: 'no' is neither true nor false"]),
    ({"type": "decimal(9,2)", "min": 0, "max": 9.5}, []), ({"type": "map<string,int>"}, []),
    ({"type": "timestamp", "min": "2013-01-01T00:00:00"}, []),
    ({"type": "string", "values": ["a"], "nullable": False}, []),
])
def test_invalid_rules(rules, messages): assert messages_of(**rules) == messages


def test_invalid_tables():
    contracts = {"a": {"columns": {}, "max_age": 1}, "b": {"max_age_minutes": 1}, "c": None,
                 "d": {"columns": {"x": None}, "max_age_minutes": "x"},
                 "e": {"columns": {}, "max_age_minutes": float("inf")}}
    assert {key: message for key, message, _ in contract_problems(contracts)} == {
        "a.max_age": "no key 'max_age'", "b": "the table has no columns", "c": "the table has no columns",
        "d.columns.x": "None is not a mapping of rules", "d.max_age_minutes": "'x' is not a number of minutes",
        "e.max_age_minutes": "inf is not a number of minutes"}


def test_all_problems_are_reported_with_their_lines(tmp_path):
    file = tmp_path / "conf/features.yml"
    file.parent.mkdir()
    file.write_text("t:\n  columns:\n    c: {type: strng}\n    d: {type: string, min: 1}\n")
    message = (r"conf/features.yml:3: t.columns.c.type: no type 'strng'\n  did you mean 'string'.*\n"
               r"conf/features.yml:4: t.columns.d.min: type string does not support min")
    with pytest.raises(MlopsError, match=message): read_contracts(file)
    file.write_text("t:\n  columns:\n    c: {type: double, max: .inf}\n")
    with pytest.raises(MlopsError, match="max: inf is not a valid double\n  write a finite number, or remove max"):
        read_contracts(file)


def test_every_type_has_values_that_fit():
    values = {"boolean": True, "string": "a", "binary": "a", "date": "2013-01-01", "timestamp": "2013-01-01",
              "timestamp_ntz": "2013-01-01"}
    assert all(fits(values.get(kind, 1), kind) for kind in TYPES)
    assert not any(fits(date(2013, 1, 1), kind) for kind in TYPES)


def test_a_pattern_without_a_matching_column_is_reported():
    contract = Contract("t", {"a": {"type": "int"}, "a_*": {"type": "int"}, "wind_*": {"type": "double"}})
    assert wrong_types(contract, {"a": "int", "wind_gust": "double"}) == ["there is no column a_*"]


def test_differences_of_all_tables_are_reported_together():
    contracts = {"a": Contract("a", {"x": {"type": "int"}}), "wether": Contract("wether", {}),
                 "c": Contract("c", {"temp": {"type": "double"}})}
    declared = {"a": {"x": "bigint"}, "weather": {}, "c": {"temperature": "double"}}
    with pytest.raises(MlopsError) as error: check_declared(contracts, declared, "conf/features.yml")
    assert error.value.message.split("\n  - ")[0] == "conf/features.yml does not match the tables"
    for part in ("no table 'wether'; did you mean 'weather'?", "a: x is bigint, not int",
                 "no contract for table 'weather'", "no column 'temperature' in the contract of c"):
        assert part in error.value.message


def test_the_projects_contracts_are_valid(): assert read_contracts(ROOT / "conf/features.yml")


@pytest.mark.parametrize("name", ["wind.speed", "a[0]", "what?", "*", "it's", "a`b", "select"])
def test_a_column_of_any_name_fits_the_contract_that_names_it(name, tmp_path):
    file = tmp_path / "contracts.yml"
    file.write_text(json.dumps({"t": {"columns": {name: {"type": "int", "max": 5}, "k": {"type": "int"}}}}))
    contract = read_contracts(file)["t"]
    assert wrong_types(contract, {name: "int", "k": "int"}) == []
    assert wrong_types(contract, {name: "double", "k": "int"}) == [f"{name} is double, not int"]
    file.write_text(file.read_text().replace('"max": 5', '"max": "x"'))
    with pytest.raises(MlopsError) as error: read_contracts(file)
    assert f"contracts.yml:1: t.columns.{name}.max: 'x' is not a valid int" in str(error.value)
