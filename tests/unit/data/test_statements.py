"""What is written on engines that the other unit tests do not start."""
import sys
from dataclasses import replace as changed
from pathlib import Path

from mlops_nb.data.progress import hash_sql
from mlops_nb.data.schemas import create_table_sql
from mlops_nb.data.tables import compact
from mlops_nb.env import load_env

ROOT = Path(__file__).parents[3]


def column(name: str, nullable: bool = True):
    from pyspark.sql.types import DoubleType, StructField
    return StructField(name, DoubleType(), nullable)


def test_databricks_has_no_package_deltalake(monkeypatch):
    monkeypatch.setitem(sys.modules, "deltalake", None)
    monkeypatch.setitem(sys.modules, "deltalake.exceptions", None)
    for engine in ("databricks", "spark"):
        assert compact(changed(load_env("dev", root=ROOT), engine=engine), "dev.flights.plane") is False


def test_a_clustered_table_of_databricks_has_statistics_of_all_columns():
    on_databricks = changed(load_env("dev", root=ROOT), engine="databricks")
    columns = [column(f"c{number}") for number in range(40)]
    sql = create_table_sql(on_databricks, "dev.flights.wide", columns, (), (), "", cluster_by=("c39",))
    assert "CLUSTER BY (`c39`)" in sql and "'delta.dataSkippingNumIndexedCols' = '-1'" in sql
    assert "TBLPROPERTIES" not in create_table_sql(on_databricks, "dev.flights.wide", columns, (), (), "")


def test_a_time_has_statistics_if_its_name_needs_no_quotes():
    at_home = changed(load_env("dev", root=ROOT), engine="sail")
    for name, is_listed in (("ts", True), ("1st", False), ("a.b", False), ("zeit_ä", False)):
        sql = create_table_sql(at_home, "dev.flights.t", [column(name)], (), (), "", timeseries=name)
        assert (f"'delta.dataSkippingStatsColumns' = '{name}'" in sql) is is_listed
        assert "'delta.dataSkippingNumIndexedCols' = '0'" in sql


def test_a_null_has_a_place_in_the_hash():
    assert hash_sql([column("a"), column("b", nullable=False)]) == (
        "pmod(xxhash64(`a`, `b`, `a` IS NULL), 2147483647)")
