"""conf/features.yml against the columns of the feature tables, which Spark derives from their queries without rows.

Limits and decimal literals of expressions are computed as doubles, as Apache Spark does."""
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlops_nb.data.contracts import Contract, check_contract, check_declared, read_contracts
from mlops_nb.data.csv_files import to_spark
from mlops_nb.data.sql import with_double_literals
from mlops_nb.errors import MlopsError
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.feature_engineering import FEATURE_TABLES
from mlops_nb.workflow.feature_jobs import feature_rows
from mlops_nb.workflow.rows import CONTRACTS

FILE = Path(__file__).parents[2] / CONTRACTS


@pytest.fixture(scope="module")
def declared(spark) -> dict[str, dict[str, str]]:
    "The columns of each feature table, by type."
    def empty(name: str):
        return to_spark(spark, ingest.FILES[name], pd.DataFrame(columns=list(ingest.FILES[name].table_types)))
    bronze = {f"bronze_{name}": empty(name) for name in ("flights", "weather", "planes", "airports")}
    cut = CALENDAR.midnight(date(2013, 4, 1))
    return {table.name: dict(feature_rows(spark, table.sql(cut), bronze).dtypes) for table in FEATURE_TABLES}


def test_the_contracts_fit_the_feature_tables(declared):
    check_declared(read_contracts(FILE), declared, CONTRACTS)


def test_a_misspelt_name_is_reported_without_rows(declared):
    contracts = read_contracts(FILE)
    contracts["wether_hourly"] = contracts.pop("weather_hourly")
    daily = contracts["carrier_daily"]
    columns = {name.replace("carrier_labels", "carrier_lables"): rules for name, rules in daily.columns.items()}
    contracts["carrier_daily"] = replace(daily, columns=columns)
    message = (r"(?s)no table 'wether_hourly'; did you mean 'weather_hourly'.*"
               "no column 'carrier_labels' in the contract")
    with pytest.raises(MlopsError, match=message):
        check_declared(contracts, declared, CONTRACTS)


# ---- double literals, against NumPy

NUMBERS = [1e-17, -1e-17, -0.0, 0.0, 0.1, float(np.float32(0.1)), 0.1000000000000001, 0.49999999999999994, 0.5, 1e20,
           np.inf, -np.inf, np.nan]


def violations(spark, kind: str, number: float, rules: dict) -> set[str]:
    "The rules that a contract reports for one number."
    df = spark.createDataFrame([(number,)], f"x {kind}")
    try: check_contract(Contract("t", {"x": {"type": kind, **rules}}), df, ["x"])
    except MlopsError as error: return {line.split(" where x ")[1].split(":")[0]
                                        for line in error.message.splitlines() if " where " in line}
    return set()


@pytest.mark.parametrize("kind, number, expected", [
    ("double", 1e-17, {"is not one of 0.1"}), ("double", -1e-17, {"< 0.0", "is not one of 0.1"}),
    ("double", 0.1, set()), ("double", 0.1000000000000001, {"is not one of 0.1"}),
    ("double", np.nextafter(0.5, 1), {"> 0.5", "is not one of 0.1"}),
    ("double", 1e20, {"> 0.5", "is not one of 0.1"}), ("double", -np.inf, {"< 0.0", "is not one of 0.1"}),
    ("double", np.nan, {"> 0.5", "is NaN", "is not one of 0.1"}),
    ("float", 0.1, set()), ("float", float(np.nextafter(np.float32(0.1), np.float32(1))), {"is not one of 0.1"})])
def test_limits_are_values_of_the_columns_type(spark, kind, number, expected):
    "A float column has no 0.1 but the nearest float, which the contract means."
    assert violations(spark, kind, number, {"min": 0.0, "max": 0.5, "values": [0.1]}) == expected


def above(x, limit): return (x > limit) | np.isnan(x)  # in Spark, NaN is larger than any number


EXPRESSIONS = {  # by SQL: the value by NumPy
    "x > 0.0": lambda x: above(x, 0.0), "x < .5": lambda x: x < 0.5, "x >= 1.e2": lambda x: above(x, 99.0),
    "x = 0.1": lambda x: x == 0.1, "x IN (0.1, 0.5)": lambda x: (x == 0.1) | (x == 0.5),
    "x BETWEEN 0.0 AND 0.5": lambda x: (x >= 0) & (x <= 0.5), "x > -0.5": lambda x: above(x, -0.5),
    "CASE WHEN x > 0.0 THEN x ELSE 0.0 END": lambda x: np.where(above(x, 0), x, 0), "coalesce(x, 0.0)": lambda x: x,
    "greatest(x, 0.001)": lambda x: np.maximum(x, 0.001), "nullif(x, 0.5)": lambda x: np.where(x == 0.5, None, x),
    "x < 12345678901234567890": lambda x: x < 12345678901234567890.0}


def test_decimal_literals_beside_a_double_are_computed_as_numpy_does(spark):
    df = spark.createDataFrame([(i, number) for i, number in enumerate(NUMBERS)], "k INT, x DOUBLE")
    columns = [f"{with_double_literals(sql, dict(df.dtypes))} AS `{i}`" for i, sql in enumerate(EXPRESSIONS)]
    table, x = df.selectExpr("k", *columns).toArrow().sort_by("k"), np.array(NUMBERS)
    for i, (sql, by_numpy) in enumerate(EXPRESSIONS.items()):
        np.testing.assert_array_equal(np.array(table[str(i)].to_pylist(), object).astype(float),
                                      by_numpy(x).astype(float), sql)
