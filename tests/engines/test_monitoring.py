"""A monitor that is refreshed in steps has the same metrics on Sail and on Apache Spark with Delta."""
import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.full]  # a minute, most of it on Apache Spark


@pytest.fixture(scope="module")
def results(spark_ready, run_on, tmp_path_factory):
    "The results of each engine's steps, each in its own lakehouse."
    folder = tmp_path_factory.mktemp("monitoring")
    for engine in ("sail", "spark"):
        run_on(engine, "monitoring_scenario.py", folder / engine, folder / f"{engine}.json")
    return {engine: json.loads((folder / f"{engine}.json").read_text()) for engine in ("sail", "spark")}


@pytest.mark.parametrize("step", ["first_days", "next_day_with_late_labels", "next_day_with_a_correction"])
def test_both_engines_compute_the_same_metrics(results, step):
    for engine, steps in results.items(): assert "failed" not in steps[step], f"on {engine}: {steps[step]['failed']}"
    sail, spark = results["sail"][step], results["spark"][step]
    assert sail["windows"] == spark["windows"]
    for kind in ("profile", "drift"):
        assert len(sail[kind]) == len(spark[kind]) > 0, kind
        assert [(a, b) for a, b in zip(sail[kind], spark[kind], strict=True) if a != b][:2] == [], kind


def test_only_changed_windows_are_computed(results):
    spark = results["spark"]
    assert spark["first_days"]["windows"] == {"1 day": 3, "1 week": 1}
    assert spark["first_days"]["again"] == {"1 day": 0, "1 week": 0}
    assert spark["next_day_with_late_labels"]["windows"] == {"1 day": 2, "1 week": 1}
    assert 1 <= spark["next_day_with_a_correction"]["windows"]["1 day"] < 5
