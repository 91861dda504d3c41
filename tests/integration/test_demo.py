"""The year of production that `make demo` shows, run once on all flights and looked at afterwards; then a worse version, and a rollback."""
import sqlite3
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from states import client_of, copy_state, mlops, registered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    "The state that the demo leaves, and what it printed."
    state = tmp_path_factory.mktemp("demo") / "state"
    return state, mlops(state, "run", "demo")


def rows(state: Path, name: str):
    from deltalake import DeltaTable
    return ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris()).to_table()


@pytest.fixture(scope="module")
def model(demo):
    "The registry's client, the versions by number, and the aliases, as the demo has left them."
    return client_of(demo[0]), *registered(demo[0])


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


def test_the_better_challenger_was_promoted_and_the_move_is_recorded(demo, model):
    client, versions, aliases = model
    assert sorted(versions) == [1, 2] and aliases == {"champion": 2, "challenger": 2, "previous_champion": 1}
    log = sorted(rows(demo[0], "deployment_log").to_pylist(), key=lambda m: m["move"])
    champions = [m for m in log if m["alias"] == "champion"]
    assert [m["to_version"] for m in champions] == [1, 2] and {m["state"] for m in log} == {"done"}
    judged = client.get_run(versions[2].run_id).data.metrics  # on the same four weeks of June
    assert f"log_loss {judged['log_loss']:.4f} against" in champions[1]["reason"] and "better" in champions[1]["reason"]
    assert f"Promoted: {champions[1]['reason']}" in versions[2].description and "| metric | v2 | v1 |" in versions[2].description


def test_summer_and_december_stand_out_against_september(demo):
    said = sqlite3.connect(demo[0] / "runs.db").execute("select exit_value from tasks where task_key = 'monitor' and exit_value != ''")
    text, = said.fetchone()
    flagged = {month for month in ("2013-06", "2013-07", "2013-12", "2013-09") if month in text}
    assert {"2013-06", "2013-07", "2013-12"} <= flagged and "2013-09" not in flagged, text


def test_what_is_printed_tells_a_person_what_happened(demo):
    _, printed = demo
    for said in ("255,987 flights", "log loss", "mlops runs show 1", "mlflow ui"): assert said in printed, printed


@pytest.mark.full
def test_a_plausible_version_of_an_older_smaller_window_is_refused_and_says_why(demo, tmp_path):
    "As of May, after a Champion as of July: it passes every check on its own weeks, and is worse in June, which neither has learnt from."
    state = copy_state(demo[0], tmp_path / "state")
    printed = mlops(state, "run", "train", "--param", "as_of=2013-05-01")
    client, (versions, aliases) = client_of(state), registered(state)
    assert aliases == {"champion": 2, "challenger": 3, "previous_champion": 1} and "v3 is not better, v2 stays Champion" in printed
    learnt = [int(client.get_run(versions[n].run_id).data.params["training_rows"]) for n in (2, 3)]
    assert learnt[1] < learnt[0] and versions[3].tags["as_of"] == "2013-05-01" and versions[3].tags["model_validation_status"] == "PASSED"
    judged, decision = client.get_run(versions[2].run_id).data.metrics, versions[3].tags["deployment_decision"]
    assert decision.startswith("keep: log_loss 0.") and "% worse (95% interval of the change +" in decision and decision.endswith("0.5% better is required")
    assert f"against {judged['log_loss']:.4f} of v2 on {judged['example_count']:,.0f} rows" in decision
    page = versions[3].description
    assert "## Validation" in page and f"## Deployment\n\nRefused: {decision.removeprefix('keep: ')}" in page
    assert "| metric | v3 | v2 |" in page and f" | {judged['log_loss']:.4f} |" in page


def test_back_to_the_champion_of_april_in_one_command_and_the_history_tells_why(demo, tmp_path):
    state = copy_state(demo[0], tmp_path / "state")
    said = mlops(state, "rollback", "late_arrival", "--reason", "warns of every flight from Newark")
    assert "dev.flights.late_arrival v1 is Champion again, v2 is out of production: warns of every flight from Newark" in said
    versions, aliases = registered(state)
    assert (aliases["champion"], aliases["previous_champion"]) == (1, 2) and versions[2].tags["rolled_back"] == "warns of every flight from Newark"
    last = mlops(state, "models", "history", "late_arrival").splitlines()[-1]
    assert "champion" in last and "rollback: warns of every flight from Newark" in last and last.split().index("v2") < last.split().index("v1")
