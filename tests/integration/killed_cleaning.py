"""Kill `mlops clean` at its steps, in processes forked from one that has the imports done; run by test_cleaning.

    python killed_cleaning.py STATE KILLS
"""
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import pyarrow.compute
import pyarrow.dataset
import test_cleaning as example
from mlflow.store.tracking import sqlalchemy_store

from mlops_nb.cleaning import clean, mlflow_files, run_folders, table_files

IMPORTED = (mlflow.pyfunc, pyarrow.compute, pyarrow.dataset, sqlalchemy_store)  # once, before the forks
EVENTS = ("os.rename", "os.remove", "os.rmdir")  # Python reports each of these calls to audit hooks


class Steps:
    "Counts the steps of a clean, and kills this process before the step with a number."
    def __init__(self, last: int | None): self.count, self.last, self.counts = 0, last, False

    def step(self, *_):
        if not self.counts: return
        self.count += 1
        if self.count == self.last: os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable) -> Callable:
        "The function, with a step before and after it."
        def counted(*arguments):
            self.step()
            result = function(*arguments)
            self.step()
            return result
        return counted


def clean_in_steps(state: Path, now: int, last: int | None) -> int:  # how many steps it took
    "Clean, and be killed before a step."
    steps = Steps(last)
    sys.addaudithook(lambda event, arguments: steps.step() if event in EVENTS else None)
    for module, name in ((mlflow_files, "remove_row"), (mlflow_files, "forget_fingerprint"),
                         (run_folders, "mark_removed"), (table_files, "remove_table_files")):
        setattr(module, name, steps.around(getattr(module, name)))
    env = example.place(state)
    steps.counts = True
    clean.clean(env, example.KEEP, now, lambda plan, removal: None)
    return steps.count


def in_child(function: Callable, *arguments) -> int:  # exit status as of os.waitpid, or what the function returned
    "Call a function in a forked process; its number is the exit code."
    pid = os.fork()
    if not pid:
        try: os._exit(function(*arguments) or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(255)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def rows(state: Path, query: str) -> list:
    "The first column of a query of MLflow's tables."
    connection = sqlite3.connect(state / "mlflow.db")
    values = [row[0] for row in connection.execute(query)]
    connection.close()
    return sorted(values)


def content(state: Path) -> list:
    "All files but locks, journals and logs, and the rows of runs and logged models."
    files = [str(path.relative_to(state)) for path in sorted(state.rglob("*"))
             if "_delta_log" not in path.parts and "locks" not in path.parts and ".db" not in path.name]
    return [files, rows(state, "select run_uuid from runs"), rows(state, "select model_id from logged_models"),
            rows(state, "select run_uuid from tags where key = 'fingerprint'")]


def check_killed(state: Path) -> None:
    "Whatever a row names is complete, and the named versions of a table can be read."
    artifacts = state / "artifacts" / "dev" / "late_arrival"
    for model in rows(state, "select model_id from logged_models"):
        assert (artifacts / "models" / model / "artifacts" / "MLmodel").exists(), model
    for run in rows(state, "select run_uuid from runs"):
        assert list((artifacts / run / "artifacts").rglob("*.json")), run
    tagged = rows(state, "select source_run_id from logged_models")
    assert set(rows(state, "select run_uuid from tags where key = 'fingerprint'")) <= set(tagged)
    values = example.readable(example.place(state), example.TABLE)
    assert [values[version] for version in (1, 2, 3)] == [1, 2, 3], values


def check_and_clean(state: Path, now: int) -> None:
    "Check what a killed clean left, and clean again."
    check_killed(state)
    clean_in_steps(state, now, None)


def main(state: Path, kills: int) -> None:
    tempfile.tempdir = str(state.parent)
    original, now = state.with_name("original"), example.later()
    shutil.copytree(state, original)
    total = in_child(clean_in_steps, state, now, None)
    expected = content(state)
    assert kills <= total < 255, f"{total} steps"
    for number in range(kills):
        last = 1 + number * total // kills
        shutil.rmtree(state)
        shutil.copytree(original, state)
        status = in_child(clean_in_steps, state, now, last)
        assert status == -signal.SIGKILL, f"step {last} of {total}: exit status {status}"
        assert in_child(check_and_clean, state, now) == 0, f"killed before step {last} of {total}"
        assert content(state) == expected, f"killed before step {last} of {total}: {content(state)} {expected}"
        print("killed before step", last, "of", total)


if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]))
