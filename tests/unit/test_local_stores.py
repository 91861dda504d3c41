"""Stores that cannot be read or written: the sentence about each, and that reading writes nothing."""
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from broken_states import as_nobody, fill, listing, make_read_only, make_state, needs_root, state_on_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import thinned

from mlops_nb import cli
from mlops_nb.env import load_env, make_store
from mlops_nb.jobs import run_store
from mlops_nb.jobs.run_store import RunStore
from mlops_nb.local_stores import StoreError, check_mlflow_store, mlflow_changes, select_together
from mlops_nb.models import registry

ROOT = Path(__file__).parents[2]
DAMAGES = {
    "zero": (lambda file: os.truncate(file, 0), "the file is damaged: it has 0 bytes"),
    "garbage": (lambda file: file.write_bytes(b"no database " * 999), "the file is damaged: file is not a database"),
    "truncated": (lambda file: os.truncate(file, 5000), "the file is damaged: database disk image is malformed"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "is a folder, not a file"),
    "other tables": (lambda file: other_tables(file), "the file is damaged: no such table: "),
    "dangling link": (lambda file: (file.unlink(), file.symlink_to("none")), "is a link whose target is missing"),
}


def other_tables(file):
    file.unlink()
    with closing(sqlite3.connect(file)) as connection: connection.execute("create table other (a)")


@pytest.fixture
def state(tmp_path, empty_store, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(ROOT)
    return make_state(tmp_path / "state", empty_store)


def command(monkeypatch, capsys, *words) -> tuple[int, str]:
    "The exit code and the output of a command."
    monkeypatch.setattr(sys, "argv", ["mlops", *words])
    code, mask = 0, os.umask(0o022)
    try: cli.main()
    except SystemExit as end: code = end.code or 0
    finally: os.umask(mask)  # the command changes it, and other tests make files for other users
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("damage", thinned((name,) for name in DAMAGES))
@pytest.mark.parametrize("words", [("runs",), ("runs", "show", "1"), ("repair", "1"), ("run", "train")], ids=" ".join)
def test_a_damaged_run_store_is_a_sentence(state, monkeypatch, capsys, damage, words):
    change, message = DAMAGES[damage]
    change(state / "runs.db")
    before = listing(state)
    code, output = command(monkeypatch, capsys, *words)
    assert code == 2 and f"error the run store {state / 'runs.db'} cannot be" in output and message in output
    assert "Traceback" not in output and len(output.splitlines()) == 2
    assert {name: entry for name, entry in listing(state).items() if name in before and name != str(state)} == {
        name: entry for name, entry in before.items() if name != str(state)}, "the damaged file is kept as it is"


@pytest.mark.parametrize("damage", thinned((name,) for name in DAMAGES))
@pytest.mark.parametrize("words", [("models", "show", "late_arrival/1"), ("models", "history", "late_arrival"),
                                   ("rollback", "late_arrival", "--reason", "r"),
                                   ("clean", "--keep", "1d")], ids=" ".join)
def test_a_damaged_mlflow_store_is_a_sentence(state, monkeypatch, capsys, damage, words):
    change, message = DAMAGES[damage]
    change(state / "mlflow.db")
    before = listing(state)
    code, output = command(monkeypatch, capsys, *words)
    assert code == 2 and f"error the MLflow store {state / 'mlflow.db'} cannot be read: " in output
    assert message in output and "Traceback" not in output and len(output.splitlines()) == 2
    assert listing(state) == before


HALF_TRANSACTION = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("pragma cache_size = 1")  # pages are written to the file before the commit
connection.execute("begin")
for i in range(1000): connection.execute("insert into experiment_tags values (?, ?, 0)", (f"key {i}", "v" * 300))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("words", [("clean", "--keep", "1d"), ("models", "show", "late_arrival/1")], ids=" ".join)
def test_a_half_transaction_of_a_killed_process_is_undone_by_a_reader(state, monkeypatch, capsys, words):
    file, size = state / "mlflow.db", (state / "mlflow.db").stat().st_size
    subprocess.run([sys.executable, "-c", HALF_TRANSACTION, str(file)])
    assert file.stat().st_size > size and Path(f"{file}-journal").stat().st_size > 0
    code, output = command(monkeypatch, capsys, *words)
    assert "Traceback" not in output and "readonly" not in output and code == (0 if words[0] == "clean" else 2)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("select count(*) from experiment_tags where key like 'key %'").fetchone() == (0,)


def test_queries_are_answered_as_of_one_moment(tmp_path):
    file = tmp_path / "store.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("pragma journal_mode = wal")
        writer.execute("create table a (b)")
        writer.execute("insert into a values (0)")
        stop = threading.Event()

        def count_up():
            with closing(sqlite3.connect(file, isolation_level=None)) as connection:
                while not stop.is_set(): connection.execute("update a set b = b + 1")
        thread = threading.Thread(target=count_up)
        thread.start()
        try:
            for _ in range(100):
                first, other = select_together(file, ("select b from a", ()), ("select b from a where b >= ?", (0,)))
                assert tuple(first[0]) == tuple(other[0])
        finally:
            stop.set()
            thread.join()


@given(place=st.integers(0, 28671), length=st.integers(1, 9000))
@settings(max_examples=25, deadline=None)
def test_bytes_overwritten_anywhere_give_rows_or_a_sentence(tmp_path_factory, place, length):
    file = tmp_path_factory.mktemp("store") / "runs.db"
    run_store.record_run(RunStore(file), "train", "dev", {}, ["train"])
    content = file.read_bytes()
    file.write_bytes((content[:place] + b"\xa5" * length + content[place + length:])[:len(content)])
    for use in (lambda: run_store.list_tasks(RunStore(file), 1), lambda: RunStore(file).rows("select run_id from runs"),
                lambda: run_store.update_run(RunStore(file), 1, owner="1:1.00")):
        try: use()
        except StoreError as error: assert str(file) in error.message and error.hint


READS = [("runs",), ("runs", "show", "1"), ("models", "show", "late_arrival/1"), ("models", "history", "late_arrival"),
         ("models", "compare", "late_arrival/1", "late_arrival/2"), ("rollback", "late_arrival", "--reason", "r"),
         ("approve", "late_arrival", "1", "--as", "Ann")]


@pytest.mark.parametrize("words", [*READS, ("repair", "2")], ids=" ".join)
def test_what_reads_writes_nothing(state, monkeypatch, capsys, words):
    before = listing(state)
    code, output = command(monkeypatch, capsys, *words)
    assert code == (0 if words[0] == "runs" else 2) and "Traceback" not in output
    assert listing(state) == before


@pytest.mark.parametrize("words", [*READS, ("repair", "1"), ("tables",)], ids=" ".join)
def test_what_reads_does_not_create_the_state(tmp_path, monkeypatch, capsys, words):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "a/state with spaces"))
    monkeypatch.chdir(ROOT)
    code, output = command(monkeypatch, capsys, *words)
    assert code == (0 if words in (("runs",), ("tables",)) else 2) and ("no " in output)
    assert not (tmp_path / "a").exists()


def test_a_reader_sees_the_rows_of_a_writer_that_holds_the_store(state):
    store, reader = RunStore(state / "runs.db"), RunStore(state / "runs.db")
    with store.connect() as connection:
        connection.execute("update runs set job = 'deploy'")
        begin = time.monotonic()
        assert reader.rows("select job from runs") == [{"job": "train"}]  # before the commit
        assert time.monotonic() - begin < 5
    assert reader.rows("select job from runs") == [{"job": "deploy"}]


def test_readers_beside_writers_see_every_commit_in_order(tmp_path):
    store, results, ended = RunStore(tmp_path / "runs.db"), [], threading.Event()
    run_store.record_run(store, "train", "dev", {}, ["train"])

    def read():
        reader = RunStore(tmp_path / "runs.db")
        while not ended.is_set():
            row = reader.rows("select trigger_time as a, end_time as b from runs")[0]
            results.append((row["a"], row["b"]))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers: reader.start()
    for number in range(150): run_store.update_run(store, 1, trigger_time=number, end_time=number)
    ended.set()
    for reader in readers: reader.join()
    numbers = [a for a, b in results if b is not None]
    assert results and all(a == b for a, b in results if b is not None), "both columns are of one commit"
    assert max(numbers) <= 149
    assert RunStore(tmp_path / "runs.db").rows("select end_time from runs") == [{"end_time": 149}]


def env_on(disk):
    "The settings of the project with its state on a disk."
    store = f"sqlite:///{disk}/mlflow.db"
    return replace(load_env("dev", root=ROOT), state=disk, tracking_uri=store, registry_uri=store)


@needs_root
def test_a_read_only_disk(tmp_path, empty_store, monkeypatch, capsys):
    with state_on_disk(tmp_path / "state", "4m", empty_store, make_read_only) as disk:
        monkeypatch.setenv("MLOPS_STATE", str(disk))
        monkeypatch.chdir(ROOT)
        code, output = command(monkeypatch, capsys, "runs")
        assert code == 0 and "FAILED" in output
        for words in (("repair", "1"), ("run", "train")):
            code, output = command(monkeypatch, capsys, *words)
            message = f"the run store {disk / 'runs.db'} cannot be written: the file system of {disk} is read-only"
            assert code == 2 and output.splitlines()[0] == f"error {message}" and len(output.splitlines()) == 2
        with pytest.raises(StoreError, match="the MLflow store .*new.db cannot be written: .* is read-only"):
            make_store(disk / "new.db")
        env = env_on(disk)
        with pytest.raises(StoreError, match="the MLflow store .*mlflow.db cannot be written: .* is read-only"):
            with registry.registry_errors(env): registry.client(env).create_registered_model("dev.flights.a")
        with pytest.raises(StoreError, match="the lock .*a.lock cannot be written: .* is read-only"):
            with registry.lock(env, "a"): pass


@needs_root
def test_a_full_disk(tmp_path, empty_store, monkeypatch, capsys):
    with state_on_disk(tmp_path / "state", "3m", empty_store, fill) as disk:
        monkeypatch.setenv("MLOPS_STATE", str(disk))
        monkeypatch.chdir(ROOT)
        code, output = command(monkeypatch, capsys, "runs")
        assert code == 0 and "FAILED" in output
        code, output = command(monkeypatch, capsys, "run", "train")
        assert code == 2 and f"{disk / 'runs.db'} cannot be written: the disk is full" in output.splitlines()[0]
        env = env_on(disk)
        with pytest.raises(StoreError, match="the MLflow store .*mlflow.db cannot be written: the disk is full"):
            with registry.registry_errors(env): registry.client(env).create_registered_model("dev.flights.a")
        with pytest.raises(StoreError, match="the MLflow store .*new.db cannot be written: the disk is full"):
            make_store(disk / "new.db")


@needs_root
def test_the_state_of_another_user(tmp_path, empty_store):
    for folder in (tmp_path, *tmp_path.parents):  # another user can enter it
        mode = folder.stat().st_mode & 0o7777
        if mode & 0o055 != 0o055: folder.chmod(mode | 0o055)
    state = make_state(tmp_path / "state", empty_store)
    store, before = RunStore(state / "runs.db"), listing(state)

    def read_and_write():
        try: run_store.update_run(store, 1, job="deploy")
        except StoreError as error: return [RunStore(store.path).rows("select job from runs"), str(error)]

    rows, message = as_nobody(read_and_write)
    assert rows == [{"job": "train"}] and listing(state) == before
    assert f"the run store {state / 'runs.db'} cannot be written: {state} belongs to user root" in message
    assert "run mlops as root" in message
    os.chmod(state, 0o700)

    def read():
        try: return RunStore(store.path).rows("select job from runs")
        except StoreError as error: return error.message

    assert as_nobody(read).endswith(f"cannot be read: {state} belongs to user root, and user nobody may not read it")


def test_a_store_that_was_removed_stays_removed(state):
    store = RunStore(state / "runs.db")
    run_store.update_run(store, 1, job="deploy")
    (state / "runs.db").unlink()
    for use in (lambda: run_store.update_run(store, 1, job="train"), lambda: store.rows("select 1 from runs")):
        with pytest.raises(StoreError, match="runs.db was removed while it was in use"): use()
    assert not (state / "runs.db").exists()
    run_store.record_run(RunStore(state / "runs.db"), "train", "dev", {}, ["train"])  # of another process
    with pytest.raises(StoreError, match="was replaced by another file"): run_store.update_run(store, 1, job="deploy")
    assert RunStore(state / "runs.db").rows("select job from runs") == [{"job": "train"}]


def test_the_last_change_of_the_mlflow_store_is_that_of_mlflow(state):
    from mlflow.store.db.utils import _get_latest_schema_revision
    assert mlflow_changes()[1] == {_get_latest_schema_revision()}
    check_mlflow_store(state / "mlflow.db")
    older = sorted(mlflow_changes()[0] - mlflow_changes()[1])[0]
    for change, message in ((older, "made by an older MLflow"), ("ffffffffffff", "made by a newer MLflow")):
        with closing(sqlite3.connect(state / "mlflow.db")) as connection, connection:
            connection.execute("update alembic_version set version_num = ?", (change,))
        with pytest.raises(StoreError, match=message): check_mlflow_store(state / "mlflow.db")
