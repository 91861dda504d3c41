"""Execute `mlops run job` in forks, each killed at its n-th connection to the run store; repair some of the runs."""
import json
import os
import signal
import sys
from contextlib import contextmanager

import papermill.clientwrap  # noqa: F401  imported once for all forks

from mlops_nb import cli, conf_checks, env  # noqa: F401
from mlops_nb.bundle import checks  # noqa: F401
from mlops_nb.commands import app  # noqa: F401
from mlops_nb.jobs import process, progress, run_store, runner, warm  # noqa: F401
from mlops_nb.jobs.run_store import RunStore


def kill_at(number):
    "Make this process kill itself before its n-th connection to the run store."
    connect, count = RunStore.connect, iter(range(1, 1_000_000))

    @contextmanager
    def counted(store):
        if next(count) == number: os.kill(os.getpid(), signal.SIGKILL)
        with connect(store) as connection: yield connection

    RunStore.connect = counted


class Cold:
    "In place of the warm process: its imports would take most of the time of this test."
    def starter(self, environment):
        return lambda folder, spec, own: process.Supervised(folder, spec, environment | own)
    def __enter__(self): return self
    def __exit__(self, *_): ...


def in_fork(arguments, kill_number=None):  # -> its exit code, or minus the signal that killed it
    "Execute the command in a fork."
    pid = os.fork()
    if not pid:
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
        if kill_number: kill_at(kill_number)
        warm.warm_for_jobs = Cold
        sys.argv, code = ["mlops", *arguments], 1
        try: cli.main()
        except SystemExit as error: code = error.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def main():
    kills, repair_every = json.loads(sys.argv[1]), int(sys.argv[2])
    for index, number in enumerate(kills):
        store, code, repaired = RunStore(env.load_env().state / "runs.db"), in_fork(["run", "job"], number), None
        run_id = max((row["run_id"] for row in store.rows("select * from runs where job = 'job'")), default=None)
        if run_id and index % repair_every == 0: repaired = in_fork(["repair", str(run_id)])
        print(json.dumps({"signal": -code, "run_id": run_id, "repaired": repaired}), flush=True)
    in_fork(["run", "called"])  # the next run removes what the killed ones have left


main()
