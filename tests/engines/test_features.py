"""Features are equal to the last digit on Sail and on Apache Spark with Delta."""
import ast
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("features_scenario.py")
STEPS = [node.name for node in ast.parse(SCRIPT.read_text()).body
         if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "step" for d in node.decorator_list)]


@pytest.fixture(scope="module")
def results(spark_ready, run_on, tmp_path_factory):
    "The results of each engine's steps, each in its own lakehouse."
    folder, python = tmp_path_factory.mktemp("features"), str(Path(__file__).parents[2] / ".venv-spark/bin/python")
    for engine in ("sail", "spark"):  # Spark's Python workers must be able to import this project too
        run_on(engine, SCRIPT.name, folder / engine, folder / f"{engine}.json", PYSPARK_PYTHON=python)
    return {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in ("sail", "spark")}


@pytest.mark.parametrize("step", STEPS)
def test_both_engines_give_the_same_result(results, step):
    for engine, steps in results.items(): assert "failed" not in steps[step], f"on {engine}: {steps[step]['failed']}"
    result = results["spark"][step]
    for part in result if isinstance(result, dict) else range(len(result)):
        sail, spark = results["sail"][step][part], results["spark"][step][part]
        assert len(sail) == len(spark) > 0, part
        assert [(a, b) for a, b in zip(sail, spark, strict=True) if a != b][:3] == [], part


def test_a_run_computes_what_changed_and_gives_what_one_run_over_everything_gives(results):
    step = results["spark"]["next_day_and_a_correction"]
    sail, spark = results["sail"], results["spark"]
    assert sail["own tables"] == spark["own tables"]
    assert {number for _, number in sail["next_day_and_a_correction"]["differences"]} == {0}
    corrections, first = step["first"]
    assert corrections > 10 and first == "2013-01-03T17:00:00+00:00"  # the hour, three hours before the first of them
    next_day, corrected, again = (dict(pairs) for pairs in step["changed"])
    assert set(again.values()) == {0}
    for name in ("airport_recent", "aircraft_recent", "route_daily"):
        rows = spark["own tables"][f"dev.flights.{name}"]["rows"]
        assert 0 < corrected[name] < len(rows) / 3 and next_day[name] > 0, name
    assert {corrected[name] for name in ("weather_hourly", "plane", "airport")} == {0}
    assert dict(step["progress"])["airport_recent"] == "2013-01-05T05:00:00+00:00"  # midnight in New York


def test_the_compared_results_are_not_empty(results):
    spark = results["spark"]
    assert {name: len(rows) > 150 for name, rows in spark["feature_tables"].items()} == {
        name: name != "carrier_daily" for name in spark["feature_tables"]}
    assert len(spark["model_input"]["input"]) > 900 and len(spark["model_input"]["labels"]) > 1500
    joined = spark["join_in_time"]
    assert [row["value"] for row in joined["moments"]] == [None, 1, None, 5, None, None, None]
    assert [row["note"] for row in joined["moments"]] == [None, "first", None, "b", None, None, None]
    assert [row["note"] for row in joined["recent"]] == [None, "first", None, None, None, None, None]
    assert joined["refused"] == ["more than one row with k = b, ts = 2013-03-10 07:00:01"]
