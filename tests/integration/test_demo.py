"""The year of production of `make demo`, run once on all flights; then a worse version, and a rollback."""
import re
import sqlite3
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from states import client_of, copy_state, mlops, registered

pytestmark = [pytest.mark.slow, pytest.mark.full]  # `make integration` runs the same jobs in every build


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    "The state after the demo, and its output."
    state = tmp_path_factory.mktemp("demo") / "state"
    return state, mlops(state, "run", "demo")


def rows(state: Path, name: str):
    from deltalake import DeltaTable
    return ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris()).to_table()


@pytest.fixture(scope="module")
def model(demo):
    "The registry's client, the versions by number, and the aliases after the demo."
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
    metrics = client.get_run(versions[2].run_id).data.metrics  # on the same four weeks of June
    reason = champions[1]["reason"]
    assert f"log_loss {metrics['log_loss']:.4f} against" in reason and "better" in reason
    page = versions[2].description
    assert f"Promoted: {reason}" in page and "| metric | v2 | v1 |" in page


def test_no_month_exceeds_the_noise_of_four_held_out_weeks(demo):
    query = "select exit_value from tasks where task_key = 'monitor' and exit_value != ''"
    text, = sqlite3.connect(demo[0] / "runs.db").execute(query).fetchone()
    assert text == "none of 9 windows with 255,987 predictions violates a threshold"


def test_the_output_summarises_the_year(demo):
    _, printed = demo
    for words in ("255,987 rows", "log loss", "mlops runs show 1", "mlops ui"): assert words in printed, printed


def test_its_results_open_as_one_page(demo):
    page = Path(mlops(demo[0], "runs", "open", "1").strip())
    text = page.read_text()
    assert page == demo[0] / "runs/1/page.html"
    assert text.index("data:image/png") < text.index("Definitions and examples")
    assert "Run 1: demo, target dev" in text and "255,987 rows" in text


def test_two_versions_are_compared_by_a_command(demo, tmp_path):
    state = copy_state(demo[0], tmp_path / "state")
    printed = mlops(state, "models", "compare", "late_arrival/2", "late_arrival@previous_champion")
    assert "of dev.flights.late_arrival v1 on 25,368 rows" in printed and "log_loss" in printed
    assert next((state / "comparisons").glob("*.png")).read_bytes().startswith(b"\x89PNG")
    printed = mlops(state, "models", "compare", "late_arrival/2", "late_arrival@champion", code=2)
    assert "both references name dev.flights.late_arrival v2" in printed and "Traceback" not in printed


def test_a_plausible_version_of_an_older_smaller_window_is_refused_with_its_reasons(demo, tmp_path):
    "As of May, after a Champion as of July: it passes all checks on its own weeks, and is worse in June, new to both."
    state = copy_state(demo[0], tmp_path / "state")
    printed = mlops(state, "run", "train", "--param", "as_of=2013-05-01")
    client, (versions, aliases) = client_of(state), registered(state)
    assert aliases == {"champion": 2, "challenger": 3, "previous_champion": 1}
    assert "v3 is not clearly better, v2 stays Champion" in printed
    training_rows = [int(client.get_run(versions[n].run_id).data.params["training_rows"]) for n in (2, 3)]
    tags = versions[3].tags
    assert training_rows[1] < training_rows[0]
    assert tags["as_of"] == "2013-05-01" and tags["model_validation_status"] == "PASSED"
    metrics, decision = client.get_run(versions[2].run_id).data.metrics, tags["deployment_decision"]
    assert decision.startswith("keep: log_loss 0.")
    assert re.search(r", [0-9.]+% worse \(95% interval: [0-9.]+% worse to [0-9.]+% worse\); ", decision)
    assert decision.endswith("; 0.5% better is required, and an interval that is better throughout")
    assert f"against {metrics['log_loss']:.4f} of v2 on {metrics['example_count']:,.0f} rows" in decision
    page = versions[3].description
    assert "## Validation" in page and f"## Deployment\n\nRefused: {decision.removeprefix('keep: ')}" in page
    assert "| metric | v3 | v2 |" in page and f" | {metrics['log_loss']:.4f} |" in page


def test_a_rollback_restores_the_champion_of_april_and_the_history_has_the_reason(demo, tmp_path):
    state, reason = copy_state(demo[0], tmp_path / "state"), "warns of every flight from Newark"
    printed = mlops(state, "rollback", "late_arrival", "--reason", reason)
    assert f"dev.flights.late_arrival v1 is Champion again, v2 is out of production: {reason}" in printed
    versions, aliases = registered(state)
    assert (aliases["champion"], aliases["previous_champion"]) == (1, 2) and versions[2].tags["rolled_back"] == reason
    last = mlops(state, "models", "history", "late_arrival").splitlines()[-1]
    assert "champion" in last and f"rollback: {reason}" in last
    assert last.split().index("v2") < last.split().index("v1")
