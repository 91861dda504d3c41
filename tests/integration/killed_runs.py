"""A process that runs one job again and again in forks, each killed at another write to the store of runs.

`python killed_runs.py PROJECT FIRST LAST` prints a line of JSON for each kill: where, and what the store holds."""
import json
import os
import shutil
import signal
import sqlite3
import sys
from functools import partial
from pathlib import Path

from mlops_nb import env
from mlops_nb.bundle.load import load_bundle
from mlops_nb.jobs import beginning, run_store, runner
from mlops_nb.jobs.home import Home


class KilledConnection(sqlite3.Connection):
    "Counts the writes of runs, with their commits, and kills this process before or after one of them."
    writes, fatal, wrote = 0, (0, "before"), False  # `wrote`: the transaction has written a run

    def execute(self, statement, *values):
        if statement == "begin immediate": self.wrote = False
        is_run = statement.startswith(("insert or replace into runs", "update runs"))
        is_counted = is_run or (statement == "commit" and self.wrote)
        self.wrote = self.wrote or is_run
        if is_counted: KilledConnection.writes += 1
        self.kill(is_counted, "before")
        cursor = super().execute(statement, *values)
        self.kill(is_counted, "after")
        return cursor

    def kill(self, is_counted, moment):
        if is_counted and (KilledConnection.writes, moment) == self.fatal: os.kill(os.getpid(), signal.SIGKILL)


def in_fork(work):
    "Run the function in a fork; returns whether it was killed."
    pid = os.fork()
    if pid: return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally: os._exit(code)


def run_killed(place, fatal):
    KilledConnection.fatal = fatal
    run_store.sqlite3.connect = partial(sqlite3.connect, factory=KilledConnection)
    runner.finish_run(beginning.begin_run(place, "parent", {"stamp": "{{job.run_id}}"}))


def repair(place):
    row = run_store.get_run(place.store, 1)
    if row["result_state"] != "SUCCESS": runner.finish_run(runner.reopen(place, 1))


def content(place):
    "The rows of all runs, and the results of their tasks."
    rows = place.store.rows("select * from runs order by run_id")
    return [{name: row[name] for name in ("job", "result_state", "parameters", "tasks", "parent_run_id")}
            | {"results": {key: task["result_state"] for key, task
                           in run_store.latest_attempts(place.store, row["run_id"]).items()}} for row in rows]


def main(root, first, last):
    for number in range(first, last + 1):
        for moment in ("before", "after"):
            for file in (root / ".mlops").glob("runs*"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            place = Home(env.load_env(root=root), load_bundle(root))
            is_killed = in_fork(partial(run_killed, place, (number, moment)))
            killed = content(place)
            if killed: in_fork(partial(repair, place))
            print(json.dumps({"write": [number, moment], "is_killed": is_killed, "killed": killed,
                              "repaired": content(place)}), flush=True)


if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
