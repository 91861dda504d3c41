"""What can be told of a data contract without any data."""
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


def said(**rules) -> list[str]:
    "What is said of one column with these rules, in short."
    return [": ".join(filter(None, [key.removeprefix("t.columns.c").lstrip("."), message]))
            for key, message, _ in contract_problems({"t": {"columns": {"c": rules}}})]


@pytest.mark.parametrize("rules, found", [
    ({"type": "doubel"}, ["type: no type 'doubel'"]),
    ({"typ": "double"}, ["typ: no rule 'typ'", "the column has no type"]),
    ({"type": "string", "min": 0}, ["min: a string has no min"]),
    ({"type": "boolean", "max": True}, ["max: a boolean has no max"]),
    ({"type": "array<int>", "max": 1}, ["max: a array<int> has no max"]),
    ({"type": "double", "min": "0"}, ["min: '0' is no double"]),
    ({"type": "bigint", "min": 0.5}, ["min: 0.5 is no bigint"]),
    ({"type": "int", "max": True}, ["max: True is no int"]),
    ({"type": "double", "min": 1, "max": 0}, ["max: nothing lies between 1 and 0"]),
    ({"type": "date", "min": "2013-02-30"}, ["min: '2013-02-30' is no date"]),
    ({"type": "date", "min": "2013-03-01", "max": "2013-02-01"}, ["max: nothing lies between 2013-03-01 and 2013-02-01"]),
    ({"type": "string", "values": ["a", 1]}, ["values[1]: 1 is no string"]),
    ({"type": "string", "values": "abc"}, ["values: 'abc' is no list of values"]),
    ({"type": "int", "values": []}, ["values: [] is no list of values"]),
    ({"type": "int", "nullable": "no"}, ["nullable: 'no' is neither true nor false"]),
    ({"type": "decimal(9,2)", "min": 0, "max": 9.5}, []), ({"type": "map<string,int>"}, []),
    ({"type": "timestamp", "min": "2013-01-01T00:00:00"}, []), ({"type": "string", "values": ["a"], "nullable": False}, []),
])
def test_rules_that_make_no_sense(rules, found): assert said(**rules) == found


def test_tables_that_make_no_sense():
    found = {key: message for key, message, _ in contract_problems({
        "a": {"columns": {}, "max_age": 1}, "b": {"max_age_minutes": 1}, "c": None, "d": {"columns": {"x": None}, "max_age_minutes": "x"}})}
    assert found == {"a.max_age": "no key 'max_age'", "b": "the table has no columns", "c": "the table has no columns",
                     "d.columns.x": "None stands where rules belong", "d.max_age_minutes": "'x' is no number of minutes"}


def test_everything_is_said_at_once_with_its_line(tmp_path):
    file = tmp_path / "conf/features.yml"
    file.parent.mkdir()
    file.write_text("t:\n  columns:\n    c: {type: strng}\n    d: {type: string, min: 1}\n")
    with pytest.raises(MlopsError, match=r"conf/features.yml:3: t.columns.c.type: no type 'strng'; did you mean 'string'.*\n"
                                         r"conf/features.yml:4: t.columns.d.min: a string has no min"): read_contracts(file)


def test_every_type_has_values_that_fit():
    right = {"boolean": True, "string": "a", "binary": "a", "date": "2013-01-01", "timestamp": "2013-01-01", "timestamp_ntz": "2013-01-01"}
    assert all(fits(right.get(kind, 1), kind) for kind in TYPES)
    assert not any(fits(date(2013, 1, 1), kind) for kind in TYPES)


def test_a_pattern_that_no_column_has_is_told():
    contract = Contract("t", {"a": {"type": "int"}, "a_*": {"type": "int"}, "wind_*": {"type": "double"}})
    assert wrong_types(contract, {"a": "int", "wind_gust": "double"}) == ["there is no column a_*"]


def test_differences_of_every_table_are_told_at_once():
    contracts = {"a": Contract("a", {"x": {"type": "int"}}), "wether": Contract("wether", {}), "c": Contract("c", {"temp": {"type": "double"}})}
    with pytest.raises(MlopsError) as error:
        check_declared(contracts, {"a": {"x": "bigint"}, "weather": {}, "c": {"temperature": "double"}}, "conf/features.yml")
    assert error.value.message.split("\n  - ")[0] == "conf/features.yml does not fit the tables"
    for part in ("no table 'wether'; did you mean 'weather'?", "a: x is bigint, not int", "no contract for table 'weather'",
                 "no column 'temperature' in the contract of c"): assert part in error.value.message


def test_the_projects_contracts_make_sense(): assert read_contracts(ROOT / "conf/features.yml")
