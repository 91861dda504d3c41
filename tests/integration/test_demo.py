"""The year of production that `make demo` shows, run once on all flights and looked at afterwards."""
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest

ROOT, MLOPS = Path(__file__).parents[2], Path(sys.executable).parent / "mlops"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    "The state that the demo leaves, and what it printed."
    state = tmp_path_factory.mktemp("demo") / "state"
    done = subprocess.run([MLOPS, "run", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLOPS_", "SPARK_"))}
                          | {"MLOPS_STATE": str(state), "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    return state, done.stdout


def rows(state: Path, name: str):
    from deltalake import DeltaTable
    return ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris()).to_table()


@pytest.fixture(scope="module")
def model(demo):
    from mlflow import MlflowClient
    store, name = f"sqlite:///{demo[0] / 'mlflow.db'}", "dev.flights.late_arrival"
    client = MlflowClient(store, registry_uri=store)  # without it, MLflow takes the registry that another test had named
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    return client, versions, {a: int(v) for a, v in client.get_registered_model(name).aliases.items()}


def test_every_later_flight_of_the_year_is_scored_once(demo):
    predictions = rows(demo[0], "predictions")
    assert len(predictions) == 255_987
    assert pc.min(predictions["flight_day"]).as_py().isoformat() == "2013-04-01"
    assert set(predictions["model_version"].to_pylist()) == {1}  # the Challenger came later
    values = predictions["prediction"].to_numpy()
    assert ((values > 0) & (values < 1)).all()


def test_the_first_champion_beats_the_heuristic_on_weeks_it_has_not_seen(model):
    client, versions, _ = model
    metrics = client.get_run(versions[1].run_id).data.metrics
    assert versions[1].tags["model_validation_status"] == "PASSED"
    assert metrics["log_loss"] <= 0.88 * metrics["baseline_log_loss"] and metrics["roc_auc"] >= 0.74, metrics
    assert versions[1].tags["trained_through"] < versions[1].tags["held_out_from"]
    inputs = {i.dataset.name for i in client.get_run(versions[1].run_id).inputs.dataset_inputs}
    assert any("bronze_flights" in name for name in inputs), inputs


def test_the_challenger_met_the_champion_and_the_move_is_recorded(demo, model):
    _, versions, aliases = model
    assert sorted(versions) == [1, 2]
    log = rows(demo[0], "deployment_log").to_pylist()
    champions = [m["to_version"] for m in sorted(log, key=lambda m: m["move"]) if m["alias"] == "champion"]
    assert champions[0] == 1 and aliases["champion"] == champions[-1]
    if aliases["champion"] == 2: assert aliases["previous_champion"] == 1


def test_summer_and_december_stand_out_against_september(demo):
    said = sqlite3.connect(demo[0] / "runs.db").execute("select exit_value from tasks where task_key = 'monitor' and exit_value != ''")
    text, = said.fetchone()
    flagged = {month for month in ("2013-06", "2013-07", "2013-12", "2013-09") if month in text}
    assert {"2013-06", "2013-07", "2013-12"} <= flagged and "2013-09" not in flagged, text


def test_what_is_printed_tells_a_person_what_happened(demo):
    _, printed = demo
    for said in ("255,987 flights", "log loss", "mlops runs show 1", "mlflow ui"): assert said in printed, printed
