"""The doctor's checks of the online store, and of states that jobs cannot use."""
import os
import shutil
import socket
import sqlite3
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from broken_states import NOBODY, fill, listing, make_read_only, make_state, needs_root, state_on_disk
from typer.testing import CliRunner

from mlops_nb import cli, doctor
from mlops_nb.env import load_env
from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import STORE_KINDS, store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env(tmp_path, monkeypatch):
    for name in ("MLOPS_ONLINE_STORE", "MLOPS_ENGINE", "MLOPS_STATE"): monkeypatch.delenv(name, raising=False)
    return replace(load_env("dev", root=ROOT), engine="sail", state=tmp_path / "state")


def test_the_default_is_sqlite_and_the_check_creates_no_file(env):
    result = doctor.check_online_store(env)
    assert result.state == "ok" and str(env.state / "online.db") in result.observation
    assert "the default" in result.observation and "created by the first publish" in result.observation
    assert not env.state.exists()


def test_a_store_that_answers(env):
    with store(env) as opened:
        opened.begin(layout_of("dev.s.t", pa.schema([("k", pa.int64())]), ("k",)), 1)
    result = doctor.check_online_store(env)
    assert result.state == "ok" and "answers: 1 tables" in result.observation


def test_a_file_that_is_not_a_store(env):
    env.state.mkdir()
    (env.state / "online.db").write_text("not a database, and longer than the header of one" * 30)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and "file is not a database" in result.observation


@pytest.mark.parametrize("scheme, module, extra", [("redis", "redis", "redis"), ("postgresql", "psycopg", "postgres"),
                                                   ("dynamodb", "boto3", "aws"), ("cosmos", "azure.cosmos", "azure")])
def test_a_driver_that_is_not_installed(env, monkeypatch, scheme, module, extra):
    monkeypatch.setenv("MLOPS_ONLINE_STORE", f"{scheme}://host/name")
    monkeypatch.setitem(sys.modules, module, None)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and f"{module!r}" in result.observation
    assert "set by MLOPS_ONLINE_STORE" in result.observation
    assert result.hint == f"uv pip install -e '.[{extra}]'"
    package = doctor.OPTIONAL_PACKAGES[STORE_KINDS[scheme].extra][0]
    assert package.replace("-", ".").split(".")[0] == module.split(".")[0]


@pytest.mark.parametrize("uri, message", [
    ("redsi://host", "no kind of online store 'redsi'"), ("host", "cannot be read"),
    ("redis://:hidden@host", "holds a password")])
def test_an_invalid_address(env, monkeypatch, uri, message):
    monkeypatch.setenv("MLOPS_ONLINE_STORE", uri)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and message in result.observation and "hidden" not in f"{result}"


@pytest.mark.timeout(30)  # half of what the address itself allows
def test_a_server_that_is_down_or_never_answers(env, monkeypatch):
    pytest.importorskip("redis", reason="uv pip install -e '.[redis]'")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLOPS_ONLINE_STORE", f"redis://127.0.0.1:{silent.getsockname()[1]}/0?timeout=60")
        result = doctor.check_online_store(env, 0.5)
        assert result.state == "wrong" and "does not answer within 0.5 s" in result.observation
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and "refused" in result.observation


def test_on_databricks_the_store_is_databricks_own(env):
    assert doctor.check_online_store(replace(env, engine="databricks")).state == "missing"
    named = replace(env, engine="databricks", variables=env.variables | {"online_store": "shop"})
    assert doctor.check_online_store(named).observation == "Databricks' own: shop"


def test_the_command_prints_paths_and_commands_whole(env, monkeypatch, tmp_path):
    state = tmp_path / ("a-long-name-" * 8)
    monkeypatch.setenv("MLOPS_STATE", str(state))
    monkeypatch.chdir(ROOT)
    output = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "80"}).output
    assert f"sqlite://{state}/online.db".replace("sqlite:///", "sqlite:////") in output
    assert any(line.strip().startswith("uv pip install -e '.[spark]'") for line in output.splitlines())


@pytest.fixture
def state(env, empty_store, monkeypatch):
    "A state that is right, also for the command."
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLOPS_STATE", str(env.state))
    monkeypatch.chdir(ROOT)
    return make_state(env.state, empty_store)


def faults(target: str = "dev") -> tuple[int, list[str]]:
    "The exit code of the command, and its lines about the project and its state that are wrong."
    answer = CliRunner().invoke(cli.app, ["doctor", "-t", target])
    assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.exception
    lines = [" ".join(line.split()) for line in answer.output.splitlines()]
    subjects = ("project", "state", "run store", "MLflow store", "disk", "leftovers")
    lines = [line for line in lines if line.removeprefix("wrong ").startswith(subjects)]
    return answer.exit_code, [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]


def test_a_state_that_is_right_has_no_fault_and_stays_as_it_is(state):
    before = listing(state)
    assert faults()[1] == [] and listing(state) == before


def test_a_new_project_has_no_fault_and_no_state(env, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", str(env.state))
    monkeypatch.chdir(ROOT)
    assert faults()[1] == [] and not env.state.exists()


@needs_root
def test_a_read_only_state(env, empty_store, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", str(env.state))
    monkeypatch.chdir(ROOT)
    with state_on_disk(env.state, "4g", empty_store, make_read_only) as disk:
        assert faults() == (1, [f"state the file system of {disk} is read-only"])


@needs_root
def test_a_state_of_another_user(state):
    for path in (state, *state.iterdir()): os.chown(path, NOBODY, NOBODY)
    assert faults() == (1, [f"state {state} belongs to user nobody, but this user is root"])
    os.chown(state, 0, 0)
    assert faults() == (1, [f"state {state / 'mlflow.db'} belongs to user nobody, but this user is root"])


@needs_root
def test_a_full_disk(env, empty_store, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", str(env.state))
    monkeypatch.chdir(ROOT)
    with state_on_disk(env.state, "3m", empty_store, fill) as disk:
        assert faults() == (1, [f"disk 0.0 GiB free at {disk}"])


@pytest.mark.parametrize("subject, name, store", [("run store", "runs.db", "the run store"),
                                                  ("MLflow store", "mlflow.db", "the MLflow store")])
def test_damaged_stores(state, subject, name, store):
    file, content = state / name, (state / name).read_bytes()
    for damage, cause in ((b"", "it has 0 bytes"), (b"no database " * 999, "file is not a database"),
                          (content[:5000], "database disk image is malformed")):
        file.write_bytes(damage)
        assert faults() == (1, [f"{subject} {store} {file} cannot be read: the file is damaged: {cause}"])
    file.unlink()
    with closing(sqlite3.connect(file)) as connection: connection.execute("create table other (a)")
    assert f"{subject} {store} {file} cannot be read: the file is damaged: no such table: " in faults()[1][0]
    file.unlink()
    file.mkdir()
    assert faults() == (1, [f"{subject} {store} {file} cannot be read: {file} is a folder, not a file"])


@pytest.mark.parametrize("subject, name", [("run store", "runs.db"), ("MLflow store", "mlflow.db")])
def test_a_page_that_only_an_entire_check_reads(state, subject, name):
    file = state / name
    with closing(sqlite3.connect(file)) as connection:
        page_size = connection.execute("pragma page_size").fetchone()[0]
        query = "select rootpage from sqlite_master where type = 'index' order by rootpage desc limit 1"
        page = connection.execute(query).fetchone()[0]
    with open(file, "r+b") as opened:
        opened.seek((page - 1) * page_size)
        opened.write(b"\xff" * page_size)
    code, lines = faults()
    assert code == 1 and len(lines) == 1 and lines[0].startswith(f"{subject} "), lines
    assert "is damaged: " in lines[0]


def test_an_mlflow_store_of_a_newer_mlflow(state):
    with closing(sqlite3.connect(state / "mlflow.db")) as connection, connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
    text = "was made by a newer MLflow: the last change 'ffffffffffff' is unknown"
    assert faults() == (1, [f"MLflow store the MLflow store {state / 'mlflow.db'} {text}"])


def test_a_path_that_cannot_be_a_state(state):
    shutil.rmtree(state)
    state.write_text("")
    assert faults()[0] == 1 and f"state {state} is a file, not a folder" in faults()[1]
    state.unlink()
    state.symlink_to("none")
    assert faults()[0] == 1 and f"state {state} is a link whose target is missing" in faults()[1]


def test_a_store_that_is_missing_beside_what_it_describes(state):
    for name, folder in (("runs.db", "runs/1"), ("mlflow.db", "artifacts/dev")):
        (state / name).unlink()
        (state / folder).mkdir(parents=True)
    assert faults() == (1, [
        f"run store {state / 'runs.db'} is missing, but {state / 'runs'} is not empty (1 entries)",
        f"MLflow store {state / 'mlflow.db'} is missing, but {state / 'artifacts'} is not empty (1 entries)"])


def test_leftovers_are_listed_and_are_no_fault(state):
    part = state / "mlflow.db.part"
    part.write_bytes(b"")
    assert doctor.check_leftovers(state) == []  # of a process that may still run
    os.utime(part, (time.time() - 7200,) * 2)
    [result] = doctor.check_leftovers(state)
    assert result.state == "missing" and result.hint == f"remove them: rm {part}" and faults()[1] == []


@pytest.mark.parametrize("text, message", [("a: [", "databricks.yml"), (None, "databricks.yml"),
                                           ("bundle: 3\n", "project ")])
def test_a_bundle_that_cannot_be_read(tmp_path, monkeypatch, text, message):
    if text is not None: (tmp_path / "databricks.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLOPS_ROOT", raising=False)
    answer = CliRunner().invoke(cli.app, ["doctor"])
    assert answer.exit_code == 1 and message in answer.output and "mlflow" in answer.output
    assert "wrong" in answer.output and "Traceback" not in answer.output


def test_a_check_that_fails_is_a_line(env, monkeypatch):
    def check(folder): raise RuntimeError("no such disk")
    monkeypatch.setattr(doctor, "check_disk", check)
    results = {result.subject: result for result in doctor.diagnose(env)}
    assert results["disk"].state == "wrong"
    assert results["disk"].observation == "the check failed: RuntimeError: no such disk"
    assert results["MLflow store"].state == "ok"
