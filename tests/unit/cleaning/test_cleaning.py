"""The plan of `mlops clean` on made-up facts: what is removed, and what no plan may ever contain."""
import json
import random
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from typer.testing import CliRunner

from mlops_nb import cli, doctor
from mlops_nb.cleaning import clean, mlflow_files, references, removals, run_folders, table_files
from mlops_nb.cleaning.references import EVIDENCE, ModelFacts, StoreFacts, TrackedRun, VersionFacts
from mlops_nb.cleaning.removals import DiskUse, Kept
from mlops_nb.cleaning.run_folders import RunFacts
from mlops_nb.data.lakehouse import stored_tables
from mlops_nb.deployment import approval
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import run_page, run_store

CUTOFF = 100
RUNS = st.integers(0, 12)


def run_id(number): return f"{number:032x}"


def model_id(number): return f"m-{number + 4096:032x}"


def names(plan, kind): return {removal.name for removal in plan.removals if removal.kind == kind}


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("30d", 720), ("8w", 1344), ("1H", 1), ("036524d", 876_576)])
def test_a_period_is_hours_days_or_weeks(text, hours):
    assert removals.read_period(text) == hours * 3_600_000


@pytest.mark.parametrize("text", ["0h", "-1d", "1.5d", "30", "d", "1y", "1d2h", "forever", "٣d", "1d\n2", "6000w",
                                  "9" * 30 + "h"])
def test_another_period_is_refused_with_the_forms_that_exist(text):
    with pytest.raises(MlopsError, match="period to keep is .*\n.*--keep 12h, --keep 30d or --keep 8w"):
        removals.read_period(text)


@settings(max_examples=60)
@given(st.lists(st.tuples(RUNS, RUNS), max_size=15))
def test_families_are_connected_components(links):
    groups = removals.families(range(13), links)
    first, second = np.array(links, dtype=int).reshape(-1, 2).T
    _, labels = connected_components(coo_array((np.ones(len(links)), (first, second)), shape=(13, 13)), directed=False)
    assert groups == sorted(tuple(np.flatnonzero(labels == label)) for label in set(labels))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), min_size=1, max_size=13),
       st.lists(st.tuples(RUNS, RUNS), max_size=8))
def test_a_run_folder_goes_only_if_all_related_runs_are_old_and_ended(entries, links):
    runs = {number: RunFacts(number, is_active, changed, DiskUse(7, 1))
            for number, (is_active, changed) in enumerate(entries)}
    plan = run_folders.plan_run_folders(runs, links, Path("runs"), CUTOFF)
    expected = set()
    for family in removals.families(runs, links):
        if not any(runs[number].is_active or runs[number].last_change >= CUTOFF for number in family):
            expected |= set(family)
    assert names(plan, "run folder") == set(map(str, expected)) and plan.bytes == 7 * len(expected)
    old = {str(number) for number, run in runs.items() if run.last_change < CUTOFF}
    assert {kept.name for kept in plan.kept} == old - names(plan, "run folder")  # each with its reason


def store_facts(seed: int) -> StoreFacts:
    "A random store: 12 runs in parents, searches and comparisons, 12 logged models, two experiments, three versions."
    rng = random.Random(seed)
    runs, models = {}, {}
    for number in range(12):
        tags = {}
        if rng.random() < 0.3: tags["mlflow.parentRunId"] = run_id(rng.randrange(12))
        if rng.random() < 0.3: tags["automl_trial"] = f"/s/automl/search{rng.randrange(3)}/trials/{number}"
        if rng.random() < 0.2: tags["challenger"] = f"dev.s.m v{rng.randrange(1, 6)}"
        runs[run_id(number)] = TrackedRun(rng.choice("12"), rng.choice(["FINISHED", "FINISHED", "KILLED", "RUNNING"]),
                                          rng.randrange(200), rng.choice([None, None, rng.randrange(200)]), tags)
        models[model_id(number)] = ModelFacts(rng.choice("12"), rng.choice([None, run_id(rng.randrange(14))]),
                                              rng.randrange(200))
    versions = [VersionFacts("dev.s.m", 1, (f"models:/{model_id(rng.randrange(12))}", run_id(rng.randrange(12)))),
                VersionFacts("dev.s.m", 2, (f"file:///a/models/{model_id(rng.randrange(12))}/artifacts",)),
                VersionFacts("dev.s.m", 3, (f"the trial is run `{run_id(rng.randrange(12))}`.",))]
    ids = [*runs, *models, run_id(77), model_id(78)]
    folders = {name: (Path(name), DiskUse(1, rng.randrange(200))) for name in ids}
    own = {"1", "2"} if rng.random() < 0.7 else {"1"}
    return StoreFacts(versions, runs, models, {"2": rng.randrange(200)}, own, folders)


@settings(max_examples=150)
@given(st.integers(0, 10**6))
def test_a_plan_never_contains_what_a_version_needs_nor_what_is_young_or_of_another_target(seed):
    facts = store_facts(seed)
    plan = references.plan_store(facts, CUTOFF, {"search1"})
    for version in facts.versions:
        text = " ".join(version.texts)
        for model in names(plan, "logged model"):
            assert model not in text and facts.models[model].run_id not in version.texts
        for run in names(plan, "MLflow run"):
            assert run not in text and not version.labels & set(facts.runs[run].tags.values())
    for name in names(plan, "logged model"):
        model, run = facts.models[name], facts.runs.get(facts.models[name].run_id, TrackedRun("1"))
        assert max(model.updated, run.ended) < CUTOFF and run.status != "RUNNING"
        assert model.experiment_id in facts.own_experiments and "search1" not in run.tags.get("automl_trial", "")
    for name in names(plan, "MLflow run"):
        run = facts.runs[name]
        assert run.deleted is not None and run.deleted < CUTOFF and run.experiment_id in facts.own_experiments
        remaining = set(facts.models) - names(plan, "logged model")
        assert not any(facts.models[model].run_id == name for model in remaining)
    for name in names(plan, "MLflow experiment"):
        rest = [entry for entries in (facts.runs, facts.models) for key, entry in entries.items()
                if entry.experiment_id == name and key not in names(plan, "MLflow run") | names(plan, "logged model")]
        assert not rest and facts.deleted_experiments[name] < CUTOFF
    for name in names(plan, "artifact folder"):
        assert name in (run_id(77), model_id(78)) and facts.folders[name][1].newest < CUTOFF


def test_relatives_of_a_versions_run_stay_although_they_are_deleted():
    parent = {"mlflow.parentRunId": run_id(1)}
    facts = StoreFacts([VersionFacts("dev.s.m", 1, (run_id(2),))], {
        run_id(1): TrackedRun("1", deleted=5), run_id(2): TrackedRun("1", deleted=5, tags=parent),
        run_id(3): TrackedRun("1", deleted=5, tags=parent), run_id(4): TrackedRun("1", deleted=5),
        run_id(5): TrackedRun("1", deleted=5), run_id(6): TrackedRun("1", deleted=5, is_elsewhere=True)},
        {model_id(3): ModelFacts("1", run_id(3))}, own_experiments={"1"}, named_runs={run_id(5)})
    plan = references.plan_store(facts, CUTOFF, set())
    assert names(plan, "MLflow run") == {run_id(4)} and not names(plan, "logged model")
    assert {kept.name for kept in plan.kept if kept.reason == EVIDENCE} == {
        model_id(3), *map(run_id, (1, 2, 3, 5))}
    assert [kept.name for kept in plan.kept if "mlflow gc" in kept.reason] == [run_id(6)]


def test_a_removed_name_is_renamed_in_one_step_and_the_rest_is_removed_later(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "7" / name).mkdir(parents=True)
        (tmp_path / "7" / name / "file").write_text("text")
    def half(path):
        (path / "a" / "file").unlink()
        raise OSError("killed")
    monkeypatch.setattr(removals.shutil, "rmtree", half)
    with pytest.raises(OSError, match="killed"): removals.remove_path(tmp_path / "7")
    monkeypatch.undo()
    assert not (tmp_path / "7").exists()
    (leftover,) = removals.interrupted(tmp_path)
    removals.remove_path(leftover.path)
    assert not list(tmp_path.iterdir())


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"12345")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "1").symlink_to(tmp_path / "kept")
    assert removals.disk_use(tmp_path / "runs").bytes == 0
    removals.remove_path(tmp_path / "runs")
    assert (tmp_path / "kept" / "file").read_bytes() == b"12345"


def ended_run(store: run_store.RunStore, end: int, **columns) -> int:
    "A run that failed at a time, with a folder."
    number = run_store.record_run(store, "train", "dev", {}, ["train"])
    run_store.update_run(store, number, start_time=end - 1, end_time=end, life_cycle_state="TERMINATED",
                         result_state="FAILED", **columns)
    (store.path.parent / "runs" / str(number)).mkdir(parents=True)
    return number


def test_a_run_that_is_repaired_after_the_plan_is_not_removed(tmp_path):
    store = run_store.RunStore(tmp_path / "runs.db")
    first, second = ended_run(store, 50), ended_run(store, 60)
    plan = run_folders.plan_runs(tmp_path, "dev", CUTOFF)
    run_store.reopen_run(store, second)
    with pytest.raises(MlopsError, match="run 2 was repaired while the plan was made"):
        run_folders.mark_planned(tmp_path, plan, CUTOFF, 200)
    assert run_store.note_of_removal(store, first) == "" == run_store.note_of_removal(store, second)
    kept = run_folders.plan_runs(tmp_path, "dev", CUTOFF).kept
    assert not kept  # its start is young now, so it needs no reason


def test_a_killed_run_is_as_old_as_the_last_change_in_its_folder(tmp_path):
    store = run_store.RunStore(tmp_path / "runs.db")
    number = run_store.record_run(store, "train", "dev", {}, ["train"])
    (tmp_path / "runs" / str(number)).mkdir(parents=True)
    now = run_store.now() + 10_000
    run_store.update_run(store, number, start_time=50)
    assert run_folders.plan_runs(tmp_path, "dev", now).kept == [Kept("run folder", "1", "run 1 is active")]
    run_store.update_run(store, number, owner="1:0.00")  # killed
    assert not run_folders.plan_runs(tmp_path, "dev", CUTOFF).removals
    assert names(run_folders.plan_runs(tmp_path, "dev", now), "run folder") == {"1"}


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    "An empty state folder, with a folder for temporary files of its own."
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLOPS_LAKEHOUSE", "MLOPS_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "state"


def command(*arguments: str):
    "The result of `mlops` with these arguments."
    return CliRunner().invoke(cli.app, list(arguments))


def test_the_command_shows_a_plan_and_removes_only_with_yes(state):
    store = run_store.RunStore(state / "runs.db")
    ended_run(store, 50)
    (state / "runs" / "1" / "log.txt").write_bytes(b"x" * 1234)
    shown = command("clean", "--keep", "30d")
    assert shown.exit_code == 0 and "run folder" in shown.output
    assert "1.23 kB would be freed; nothing was removed" in shown.output
    assert (state / "runs" / "1" / "log.txt").exists() and run_store.note_of_removal(store, 1) == ""
    removed = command("clean", "--keep", "30d", "--yes")
    assert removed.exit_code == 0 and "1.23 kB freed" in removed.output and not list((state / "runs").iterdir())
    assert "nothing to remove" in command("clean", "--keep", "30d", "--yes").output
    assert "nothing of target dev is older than 30d" in command("clean", "--keep", "30d").output


def test_the_commands_for_runs_say_that_a_folder_was_removed(state):
    store = run_store.RunStore(state / "runs.db")
    ended_run(store, 50)
    assert command("clean", "--keep", "1h", "--yes").exit_code == 0
    note = "the folder of run 1 was removed by `mlops clean` on 20"
    assert note in command("runs", "show", "1").output and "train" in command("runs").output
    for arguments in (("runs", "open", "1"), ("repair", "1")):
        result = command(*arguments)
        assert isinstance(result.exception, MlopsError) and note in str(result.exception), arguments
    with pytest.raises(MlopsError, match="removed by `mlops clean`"): run_page.write_run_page(store, state / "runs", 1)


def test_an_approval_does_not_repair_a_run_whose_folder_was_removed(state):
    store, name = run_store.RunStore(state / "runs.db"), "dev.flights.late_arrival"
    number = ended_run(store, 50, job="deploy", parameters=json.dumps({"model_name": name, "model_version": "2"}))
    run_store.save_task(store, number, "approval_check", 0, life_cycle_state="TERMINATED", result_state="FAILED")
    waiting = "deploy", "dev", name, 2, ["approval_check"]
    assert approval.waiting_run(store, *waiting) == number
    assert command("clean", "--keep", "1h", "--yes").exit_code == 0
    assert approval.waiting_run(store, *waiting) is None


def test_the_command_needs_a_period(state):
    result = command("clean")
    assert "clean needs the period that is kept" in str(result.exception) and not state.exists()


def test_another_mlflow_store_is_left_alone_with_the_reason(state, monkeypatch):
    from mlops_nb.env import load_env
    env = load_env()
    for addresses in ({"tracking_uri": "http://user:secret@host:5000"}, {"registry_uri": "sqlite:////other/mlflow.db"}):
        plan = clean.make_plan(replace(env, **addresses), keep=1, now=CUTOFF)
        assert not plan.removals and "mlflow gc" in plan.kept[0].reason and "secret" not in plan.kept[0].name


def test_a_damaged_mlflow_store_is_a_sentence_also_for_a_plan(state):
    state.mkdir()
    (state / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(MlopsError, match="the MLflow store .*mlflow.db cannot be read: the file is damaged"):
        clean.make_plan(load_env("dev"), 3_600_000, run_store.now())


def test_a_plan_undoes_half_a_transaction_of_a_killed_process(state):
    # a writer that is killed with dirty pages in the file leaves a hot journal
    writer = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.executescript("create table versions (a); pragma cache_size = 1; create table model_version_tags "
                         "(name, version, key, value); create table tags (run_uuid, key, value); create table inputs "
                         "(source_type, source_id, destination_type, destination_id); create table datasets "
                         "(dataset_uuid, dataset_source, dataset_source_type)")
connection.execute("begin")
connection.executemany("insert into model_version_tags values ('m', 1, 'read_versions', ?)", [('{"a.b.c": 1}',)] * 5000)
os._exit(9)
"""
    file = state / "mlflow.db"
    state.mkdir()
    subprocess.run([sys.executable, "-c", writer, str(file)], check=False)
    assert Path(f"{file}-journal").stat().st_size
    assert list(table_files.names_of_models(file, set())) == []
    assert not Path(f"{file}-journal").exists()


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_state_that_cannot_be_read_has_no_empty_plan(tmp_path, monkeypatch, kind):
    place = tmp_path / "place"
    if kind == "file": place.write_text("not a folder")
    else: place.symlink_to(tmp_path / "missing")
    monkeypatch.setenv("MLOPS_STATE", str(place))
    env, cause = load_env("dev"), "is a file, not a folder" if kind == "file" else "is a link whose target is missing"
    with pytest.raises(MlopsError, match=cause): clean.make_plan(env, 3_600_000, run_store.now())
    with pytest.raises(MlopsError, match=cause): stored_tables(env, "dev")
    assert all("the check failed" not in check.observation for check in doctor.project_checks(env))


def test_a_damaged_table_is_kept_with_one_sentence(state):
    import pyarrow as pa
    from deltalake import write_deltalake
    folder = state / "lakehouse" / "dev" / "flights" / "plane"
    folder.mkdir(parents=True)
    write_deltalake(str(folder), pa.table({"number": [1]}))
    next((folder / "_delta_log").glob("*.json")).write_text("{bad")
    env, now = load_env("dev"), run_store.now()
    sentence = "table dev.flights.plane cannot be read: its log is damaged"
    assert [entry.reason for entry in clean.make_plan(env, 3_600_000, now).kept] == [sentence]
    assert table_files.plan_table(env, "dev.flights.plane", None, 1).kept[0].reason == f"not examined: {sentence}"


@pytest.mark.slow
def test_a_plan_for_a_moved_state_knows_its_own_artifacts_before_their_addresses_change(state, tmp_path):
    from mlops_nb.models import registry
    client = registry.client(load_env("dev"))
    experiment = client.create_experiment("/dev/flights", artifact_location=f"{state}/artifacts/dev/flights")
    own, other = client.create_run(experiment).info.run_id, client.create_run(experiment).info.run_id
    with sqlite3.connect(state / "mlflow.db") as connection:
        connection.execute("update runs set artifact_uri = 's3://bucket/x' where run_uuid = ?", (other,))
    connection.close()
    moved = state.rename(tmp_path / "moved")
    runs = mlflow_files.read_store(moved / "mlflow.db", moved / "artifacts", "dev").runs
    assert {run_id: run.is_elsewhere for run_id, run in runs.items()} == {own: False, other: True}
