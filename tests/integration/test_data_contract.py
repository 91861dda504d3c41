"""conf/features.yml against the columns of the feature tables, which Spark derives from their queries without rows."""
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from mlops_nb.data.contracts import check_declared, read_contracts
from mlops_nb.errors import MlopsError
from mlops_nb.flights import feature_engineering, ingest
from mlops_nb.flights.days import midnight

FILE = Path(__file__).parents[2] / feature_engineering.CONTRACTS
TIMES = ("scheduled_departure", "scheduled_arrival", "departure_known_at", "arrival_known_at")  # of bronze_flights


@pytest.fixture(scope="module")
def declared(spark) -> dict[str, dict[str, str]]:
    "The columns of each feature table, by type."
    def empty(name: str):
        columns = ingest.file_columns(name)
        if name == "flights": columns |= dict.fromkeys(TIMES, "moment")
        types = {column: ingest.SPARK_TYPES[kind.rstrip("?")] for column, kind in columns.items()}
        rows = spark.createDataFrame([], ", ".join(f"{column} {kind}" for column, kind in types.items()))
        return rows.selectExpr("*", "make_date(year, month, day) AS flight_day") if name == "flights" else rows
    bronze = {name: empty(name) for name in ("flights", "weather", "planes", "airports")}
    queries = feature_engineering.queries(midnight(date(2013, 4, 1))).items()
    return {table: dict(feature_engineering.feature_rows(spark, query, bronze).dtypes) for table, query in queries}


def test_the_contracts_fit_the_feature_tables(declared):
    check_declared(read_contracts(FILE), declared, feature_engineering.CONTRACTS)


def test_a_misspelt_name_is_reported_without_rows(declared):
    contracts = read_contracts(FILE)
    contracts["wether_hourly"] = contracts.pop("weather_hourly")
    daily = contracts["carrier_daily"]
    columns = {name.replace("carrier_labels", "carrier_lables"): rules for name, rules in daily.columns.items()}
    contracts["carrier_daily"] = replace(daily, columns=columns)
    message = (r"(?s)no table 'wether_hourly'; did you mean 'weather_hourly'.*"
               "no column 'carrier_labels' in the contract")
    with pytest.raises(MlopsError, match=message):
        check_declared(contracts, declared, feature_engineering.CONTRACTS)
