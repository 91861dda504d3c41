"""`mlops clean` on a real MLflow store, real Delta tables and run folders: what goes, and what can still be read."""
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from mlops_nb.cleaning import clean
from mlops_nb.cleaning.removals import UNITS
from mlops_nb.deployment import lineage
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import run_store
from mlops_nb.models import fingerprint, registry

ROOT = Path(__file__).parents[2]
MODEL, TABLE = "dev.flights.late_arrival", "dev.flights.plane"
KEEP = 30 * UNITS["d"]


def place(state: Path):
    "Target dev in a state folder."
    return replace(load_env("dev", root=ROOT), state=state, lakehouse=str(state / "lakehouse"),
                   tracking_uri=f"sqlite:///{state / 'mlflow.db'}", registry_uri=f"sqlite:///{state / 'mlflow.db'}")


def logged_model(env, mlflow, experiment: str, tags: dict) -> tuple[str, str]:  # run id, model id
    "A finished run with settings and a logged model."
    run_id = mlflow.create_run(experiment, tags=tags).info.run_id
    mlflow.log_dict(run_id, {"held_out_days": 28}, "conf/train.json")
    mlflow.log_metric(run_id, "log_loss", 0.5)
    model = mlflow.create_logged_model(experiment, name="late_arrival", source_run_id=run_id)
    folder = env.state / "artifacts" / "dev" / "late_arrival" / "models" / model.model_id / "artifacts"
    folder.mkdir(parents=True)
    (folder / "MLmodel").write_text("model")
    mlflow.finalize_logged_model(model.model_id, "READY")
    mlflow.set_terminated(run_id)
    return run_id, model.model_id


def write_versions(env, full: str, values, column: str = "seats"):
    "Write a Delta table once for each value."
    for value in values:
        write_deltalake(f"{env.lakehouse}/{full.replace('.', '/')}", pa.table({column: [value]}), mode="overwrite")


def fill(env) -> dict[str, str]:  # ids by name
    """A version with evidence, a logged model of no version, a deleted run, an orphan folder, an ended run.

    A table with versions 0 to 3 of which the model names 1, one that a prediction names, and one that nothing names."""
    mlflow = registry.client(env)
    experiment = registry.experiment_id(env, "late_arrival")
    names = json.dumps({TABLE: 1})
    used = logged_model(env, mlflow, experiment, {"fingerprint": "used", "read_versions": names})
    unused = logged_model(env, mlflow, experiment, {"fingerprint": "unused", "read_versions": json.dumps({TABLE: 0})})
    mlflow.create_registered_model(MODEL)
    mlflow.create_model_version(MODEL, f"models:/{used[1]}", used[0], tags={"read_versions": names}, model_id=used[1])
    mlflow.set_registered_model_alias(MODEL, "champion", "1")
    deleted, comparison = (mlflow.create_run(experiment, tags=tags).info.run_id
                           for tags in ({}, {"challenger": f"{MODEL} v1"}))
    for run_id in (deleted, comparison):
        mlflow.log_text(run_id, "text", "rule.json")
        mlflow.delete_run(run_id)
    orphan = env.state / "artifacts" / "dev" / "late_arrival" / ("0" * 32)
    (orphan / "artifacts").mkdir(parents=True)
    (orphan / "artifacts" / "file").write_text("text")
    write_versions(env, TABLE, range(4))
    write_versions(env, "dev.flights.airport", range(3))
    write_versions(env, "dev.flights.weather", range(3))
    write_versions(env, "prod.flights.weather", range(3))
    write_versions(env, "prod.flights.predictions", [json.dumps({"dev.flights.airport": 1})], "read_versions")
    store = run_store.RunStore(env.state / "runs.db")
    run_id = run_store.record_run(store, "train", "dev", {}, ["train"])
    run_store.update_run(store, run_id, life_cycle_state="TERMINATED", result_state="FAILED", end_time=run_store.now())
    (env.state / "runs" / str(run_id) / "train" / "0").mkdir(parents=True)
    (env.state / "runs" / str(run_id) / "train" / "0" / "log.txt").write_text("text")
    return {"run": used[0], "model": used[1], "unused run": unused[0], "unused model": unused[1],
            "deleted": deleted, "comparison": comparison, "orphan": orphan.name}


@pytest.fixture(scope="module")
def filled(tmp_path_factory, empty_store) -> tuple[Path, dict]:
    "A state folder that is only copied, and the ids in it."
    state = tmp_path_factory.mktemp("filled") / "state"
    state.mkdir()
    shutil.copy(empty_store, state / "mlflow.db")
    return state, fill(place(state))


@pytest.fixture
def own(filled, tmp_path, monkeypatch):
    "A copy of the filled state at another place, as after `cp -r`, whose store names the artifacts of the copy."
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shutil.copytree(filled[0], tmp_path / "state")
    readdress(tmp_path / "state", filled[0])
    return place(tmp_path / "state")


def readdress(state: Path, original: Path):
    "Change the addresses in a copied store."
    with sqlite3.connect(state / "mlflow.db") as connection:
        for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location"),
                              ("experiments", "artifact_location"), ("model_versions", "storage_location")):
            connection.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(original), str(state)))
    connection.close()


def later(days: int = 60) -> int:
    "A time by which everything in the state is old, in milliseconds."
    return run_store.now() + days * UNITS["d"]


def cleaned(env, now: int) -> dict[str, set[str]]:
    "The names that a clean removed, by kind."
    removed = {}
    for removal in clean.clean(env, KEEP, now, lambda plan, removal: None).removals:
        removed.setdefault(removal.kind, set()).add(removal.name)
    return removed


def readable(env, full: str) -> dict[int, object]:
    "The value of each version of a table; None if its file is gone."
    path, values = f"{env.lakehouse}/{full.replace('.', '/')}", {}
    for version in range(DeltaTable(path).version() + 1):
        try: values[version] = DeltaTable(path, version=version).to_pyarrow_table().to_pylist()[0]["seats"]
        except FileNotFoundError: values[version] = None
    return values


def test_what_nothing_needs_goes_and_the_evidence_stays(own, filled):
    ids = filled[1]
    assert clean.make_plan(own, KEEP, run_store.now()).removals == []  # everything is young
    assert cleaned(own, later()) == {
        "run folder": {"1"}, "logged model": {ids["unused model"]}, "MLflow run": {ids["deleted"]},
        "artifact folder": {ids["orphan"]}, "table files": {TABLE, "dev.flights.airport", "dev.flights.weather"}}
    artifacts = own.state / "artifacts" / "dev" / "late_arrival"
    assert {path.name for path in artifacts.iterdir()} == {"models", ids["run"], ids["unused run"], ids["comparison"]}
    assert {path.name for path in (artifacts / "models").iterdir()} == {ids["model"]}
    version = registry.get_alias(own, MODEL, "champion")
    assert lineage.training_record(own, version) == ({TABLE: 1}, {"held_out_days": 28}, {"log_loss": 0.5})
    assert (artifacts / "models" / ids["model"] / "artifacts" / "MLmodel").read_text() == "model"
    assert readable(own, TABLE) == {0: None, 1: 1, 2: 2, 3: 3, 4: 3, 5: 3}  # two entries of the log say VACUUM
    assert readable(own, "dev.flights.airport") == {0: None, 1: 1, 2: 2, 3: 2, 4: 2}
    assert readable(own, "dev.flights.weather") == {0: None, 1: None, 2: 2, 3: 2, 4: 2}
    assert readable(own, "prod.flights.weather") == {0: 0, 1: 1, 2: 2}  # dev may not write prod
    assert cleaned(own, later()) == {}  # also no further entry in the logs of the tables
    assert DeltaTable(f"{own.lakehouse}/dev/flights/plane").version() == 5


def test_training_finds_a_run_completely_or_not_at_all(own, filled):
    ids, experiment = filled[1], registry.experiment_id(own, "late_arrival")
    assert fingerprint.find_run(own, experiment, "unused").info.run_id == ids["unused run"]
    cleaned(own, later())
    assert fingerprint.find_run(own, experiment, "unused") is None
    assert fingerprint.find_run(own, experiment, "used").info.run_id == ids["run"]
    assert registry.client(own).get_run(ids["unused run"]).data.metrics == {"log_loss": 0.5}  # the run itself stays
    assert registry.find_alias(own, MODEL, "champion").run_id == ids["run"]


def test_a_copy_of_a_state_folder_never_cleans_the_original(filled, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(filled[0].rglob("*"))
    shutil.copytree(filled[0], tmp_path / "state")
    env = place(tmp_path / "state")  # its store still names the original's artifacts
    cleaned(env, later())
    assert sorted(filled[0].rglob("*")) == before


def test_a_model_that_is_deleted_no_longer_keeps_its_run_and_its_table_versions(own, filled):
    registry.client(own).delete_registered_model(MODEL)
    removed = cleaned(own, later())
    assert removed["logged model"] == {filled[1]["model"], filled[1]["unused model"]}
    assert readable(own, TABLE) == {0: None, 1: None, 2: None, 3: 3, 4: 3, 5: 3}


def test_a_young_model_and_what_it_was_trained_from_stay(own):
    with sqlite3.connect(own.state / "mlflow.db") as connection:
        connection.execute("update logged_models set last_updated_timestamp_ms = ?", (later(),))
    connection.close()
    removed = cleaned(own, later())
    assert "logged model" not in removed and TABLE not in removed["table files"]  # its run names version 0
    assert readable(own, TABLE) == {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.mark.parametrize("text", ["", "not json", '{"dev.flights.plane": "latest"}'])
def test_names_that_cannot_be_read_keep_all_table_files(own, text):
    registry.client(own).set_model_version_tag(MODEL, "1", "read_versions", text)
    plan = clean.make_plan(own, KEEP, later())
    kept = [kept.reason for kept in plan.kept if kept.kind == "table files"]
    assert len(kept) == 1 and f"{MODEL} v1" in kept[0]
    assert not any(removal.kind == "table files" for removal in plan.removals)


def test_a_table_that_cannot_be_read_keeps_all_table_files(own):
    log = Path(own.lakehouse, "prod", "flights", "predictions", "_delta_log")
    for file in log.glob("*.json"): file.write_text("{")
    plan = clean.make_plan(own, KEEP, later())
    assert not any(removal.kind == "table files" for removal in plan.removals)
    assert any("prod.flights.predictions cannot be read" in kept.reason for kept in plan.kept)


def test_short_periods_do_not_shorten_the_retention_of_table_files(own):
    plan = clean.make_plan(own, keep=1, now=run_store.now() + UNITS["h"])
    kinds = {removal.kind for removal in plan.removals}
    assert kinds == {"run folder", "logged model", "MLflow run", "artifact folder"}


def test_a_running_training_is_waited_for(own, monkeypatch):
    monkeypatch.setattr(clean, "LOCK_SECONDS", 0.1)
    (own.state / "locks").mkdir(exist_ok=True)
    file = own.state / "locks" / f"{MODEL}.lock"
    code = f"from filelock import FileLock\nwith FileLock({str(file)!r}): print('held', flush=True), input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as training:
        assert training.stdout.readline() == b"held\n"
        with pytest.raises(MlopsError, match=f"another process has held the lock of {MODEL}"): cleaned(own, later())
        training.communicate(b"\n")
    assert (own.state / "runs" / "1").exists() and cleaned(own, later())["run folder"] == {"1"}



@pytest.mark.slow
def test_a_clean_that_is_killed_at_any_step_is_finished_by_the_next_one(tmp_path, empty_store):
    """Send SIGKILLs, 20 in full size, at renames, deletions and writes to MLflow's tables.

    No row names files that are half gone, the version can be read, and the next clean leaves what one clean leaves."""
    state = tmp_path / "state"
    state.mkdir()
    shutil.copy(empty_store, state / "mlflow.db")
    fill(place(state))
    script = Path(__file__).with_name("killed_cleaning.py")
    from sizes import by_size  # not found by the script, which imports this file
    count = by_size(20, 6)
    command = [sys.executable, script, str(state), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed") == count, result.stdout


@pytest.mark.slow
@pytest.mark.full
def test_of_two_cleans_at_once_one_removes_everything_and_the_other_nothing(own):
    code = (f"import test_cleaning as example, tempfile; tempfile.tempdir = {str(own.state.parent)!r}\n"
            f"print(len(example.cleaned(example.place(example.Path({str(own.state)!r})), {later()})))")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and sorted(outputs) == ["0\n", "5\n"]
