"""What fires and when: against an enumeration of fire times, with clocks that jump, kills, and two schedulers."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.jobs import fires, run_store
from mlops_nb.jobs.fires import Scheduled
from mlops_nb.jobs.hosted_runs import RunHost
from mlops_nb.jobs.run_store import RunStore
from mlops_nb.jobs.schedule_view import schedule_rows
from mlops_nb.jobs.scheduler import CommandStarter, JobStarter, Scheduler, Surroundings, alert_command
from mlops_nb.jobs.schedules import ScheduleReader, Schedules
from mlops_nb.jobs.triggers import Trigger, due_time, next_due, read_triggers

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


class Starts(list):
    "A starter that keeps the fire times; `error` is raised in place of a start."
    error = None

    def is_free(self, item): return True

    def start(self, fire):
        if self.error: raise self.error
        self.append((fire.key, fire.time))

    def watch(self): pass

    def close(self): pass


def trigger_of(**declared) -> Trigger:
    [trigger], problems = read_triggers(declared)
    assert not problems
    return trigger


def cron(expression: str, zone: str = "UTC", **more) -> Trigger:
    return trigger_of(schedule={"quartz_cron_expression": expression, "timezone_id": zone, **more})


class Place:
    "A state folder, a clock, and triggers of jobs; schedulers of it share all of them."

    def __init__(self, folder: Path, **jobs: Trigger):
        self.folder, self.store, self.clock, self.starts = folder, RunStore(folder / "runs.db"), [0], Starts()
        self.surroundings = Surroundings(folder / "volumes", str(folder / "lakehouse"))
        self.declare(**jobs)

    def declare(self, **jobs: Trigger | str) -> None:
        self.schedules = Schedules([Scheduled("job", key, "prod", one) for key, one in jobs.items()])

    def scheduler(self, **starters) -> Scheduler:
        return Scheduler(self.store, lambda: self.schedules, self.surroundings, {"job": self.starts} | starters,
                         lambda: self.clock[0], poll_seconds=0)

    def at(self, scheduler: Scheduler, *times: int) -> list[int]:
        "The fire times of ticks at these times."
        before = len(self.starts)
        for self.clock[0] in times: scheduler.tick()
        return [time for _, time in self.starts[before:]]


@pytest.fixture
def place(tmp_path): return Place(tmp_path)


# The pure rule

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["0 */7 * * * ?", "0 0 3 * * ?", "0 5,50 2-4 ? * MON-FRI", "0 0 0 1 * ?"]),
       st.integers(0, 40 * DAY), st.integers(0, 3 * DAY), st.integers(0, 3 * DAY))
def test_the_newest_fire_time_after_what_is_handled_is_due(expression, since, handled, elapsed):
    trigger, handled, now = cron(expression), since + handled, since + handled + elapsed
    matching, minute = [], (handled // MINUTE + 1) * MINUTE
    minute_of = {"0 */7 * * * ?": lambda t: t.minute % 7 == 0, "0 0 3 * * ?": lambda t: (t.hour, t.minute) == (3, 0),
                 "0 5,50 2-4 ? * MON-FRI": lambda t: t.minute in (5, 50) and 2 <= t.hour <= 4 and t.isoweekday() < 6,
                 "0 0 0 1 * ?": lambda t: (t.day, t.hour, t.minute) == (1, 0, 0)}[expression]
    while minute <= now:
        if minute_of(datetime.fromtimestamp(minute / 1000, UTC)): matching.append(minute)
        minute += MINUTE
    assert due_time(trigger, since, handled, now) == (matching[-1] if matching else None)
    following = next_due(trigger, since, now)
    assert following > now and minute_of(datetime.fromtimestamp(following / 1000, UTC))


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(-3 * HOUR, 5 * HOUR), min_size=1, max_size=15), st.sampled_from([10, 60, 24 * 60]))
def test_a_clock_that_jumps_fires_no_time_twice_and_none_that_has_not_come(tmp_path_factory, jumps, minutes):
    place = Place(tmp_path_factory.mktemp("clock"), report=trigger_of(
        trigger={"periodic": {"interval": minutes, "unit": "MINUTES"}}))
    schedulers, now = [place.scheduler(), place.scheduler()], 100 * DAY
    for i, jump in enumerate([0, *jumps]):
        now += jump
        started = place.at(schedulers[i % 2], now)
        assert len(started) <= 1 and all(time <= now for time in started)
    times = [time for _, time in place.starts]
    assert len(times) == len(set(times))


# Recorded state

def test_after_a_downtime_one_run_makes_up_for_all_that_was_missed(place):
    place.declare(report=cron("0 0 * * * ?"))
    assert place.at(place.scheduler(), 30 * MINUTE, HOUR, HOUR + 1, 2 * HOUR) == [HOUR, 2 * HOUR]
    assert place.at(place.scheduler(), 20 * HOUR + 5) == [20 * HOUR]  # another process, much later
    assert place.at(place.scheduler(), 20 * HOUR + 10) == []


def test_a_new_and_an_unpaused_trigger_do_not_fire_for_the_past(place):
    running, hourly, paused = place.scheduler(), cron("0 0 * * * ?"), cron("0 0 * * * ?", pause_status="PAUSED")
    assert place.at(running, 10 * HOUR) == []
    place.declare(report=hourly)
    assert place.at(running, 10 * HOUR + 1, 11 * HOUR) == [11 * HOUR]
    place.declare(report=paused)
    assert place.at(running, 11 * HOUR + 1, 15 * HOUR) == []
    place.declare(report=hourly)
    assert place.at(running, 15 * HOUR + 1, 16 * HOUR) == [16 * HOUR]
    place.declare()  # removed, and back later
    assert place.at(running, 16 * HOUR + 1, 18 * HOUR) == []
    place.declare(report=hourly)
    assert place.at(running, 18 * HOUR + 1, 19 * HOUR) == [19 * HOUR]


def test_a_clock_that_was_wrong_for_a_while_does_not_stop_the_schedule(place):
    place.declare(report=cron("0 0 * * * ?"))
    running = place.scheduler()
    assert place.at(running, 0, HOUR) == [HOUR]
    assert place.at(running, 365 * DAY) == [365 * DAY]  # a year too far
    assert place.at(running, HOUR + 1, 2 * HOUR, 3 * HOUR) == [2 * HOUR, 3 * HOUR]


def test_the_triggers_of_a_target_that_cannot_be_read_wait_and_make_up(place):
    running, hourly = place.scheduler(), cron("0 0 * * * ?")
    place.declare(report=hourly)
    assert place.at(running, 0, HOUR) == [HOUR]
    place.declare()
    place.schedules.unreadable = {"prod": "databricks.yml: invalid"}
    assert place.at(running, 2 * HOUR, 5 * HOUR) == []
    place.declare(report=hourly)
    assert place.at(running, 5 * HOUR + 1) == [5 * HOUR]


def test_one_trigger_with_an_error_leaves_the_others_alone_and_is_logged_once(place, caplog):
    place.declare(report=cron("0 0 * * * ?"), broken=cron("0 0 * * * ?"))
    running = place.scheduler()
    due = running.by_clock
    def fails(item, state, now):
        if item.key == "broken": raise OSError("the disk is gone")
        due(item, state, now)
    running.by_clock = fails
    assert place.at(running, 0, HOUR, 2 * HOUR) == [HOUR, 2 * HOUR]
    assert [record.message for record in caplog.records] == ["job broken prod: OSError('the disk is gone')"]


def test_a_job_that_cannot_start_is_recorded_and_fires_again_at_its_next_time(place):
    place.declare(report=cron("0 0 * * * ?"))
    running = place.scheduler()
    place.starts.error = MlopsError("the bundle has 2 problem(s)")
    assert place.at(running, 0, HOUR, HOUR + 1) == []
    assert [(row["state"], row["message"]) for row in place.store.rows("select * from fires")] == [
        ("FAILED", "the bundle has 2 problem(s)")]
    place.starts.error = None
    assert place.at(running, HOUR + 2, 2 * HOUR) == [2 * HOUR]
    row, = schedule_rows(place.schedules, place.store, 2 * HOUR)
    assert (row.status, row.last_fire, row.next_fire) == ("ACTIVE", "1970-01-01 02:00 started", "1970-01-01 03:00")


# Files and tables

def arrivals(**timers) -> Trigger:
    return trigger_of(trigger={"file_arrival": {"url": "/Volumes/dev/sales/landing/in/", **timers}})


def test_only_new_files_fire_at_any_depth_and_once_for_all_of_them(place):
    folder = place.folder / "volumes/dev/sales/landing/in"
    place.declare(load=arrivals())
    running = place.scheduler()
    assert place.at(running, 1) == []  # the folder does not exist
    (folder / "2013/04").mkdir(parents=True)
    for name in ("a.csv", "2013/04/b.csv"): (folder / name).write_text("1")
    (folder.parent / "beside.csv").write_text("1")
    assert place.at(running, 2, 3) == [2]
    details = json.loads(place.store.rows("select details from fires")[0]["details"])
    assert details == {"file_arrival": {"location": "/Volumes/dev/sales/landing/in/"}}
    (folder / "a.csv").write_text("overwritten")
    assert place.at(running, 4) == []
    (folder / "a.csv").unlink()
    assert place.at(running, 5) == []
    (folder / "a.csv").write_text("back")
    assert place.at(place.scheduler(), 6, 7) == [6]  # another process


def test_files_wait_for_the_last_change_and_for_the_time_between_two_runs(place):
    folder = place.folder / "volumes/dev/sales/landing/in"
    folder.mkdir(parents=True)
    place.declare(load=arrivals(wait_after_last_change_seconds=60, min_time_between_triggers_seconds=600))
    running = place.scheduler()
    def new_file(name, now):
        (folder / name).write_text(name)
        return place.at(running, now)
    assert place.at(running, MINUTE) == [] == new_file("a", 2 * MINUTE) == new_file("b", int(2.5 * MINUTE))
    assert place.at(running, 3 * MINUTE) == []  # the last file came half a minute ago
    assert place.at(running, int(3.5 * MINUTE)) == [int(3.5 * MINUTE)]
    assert new_file("c", 5 * MINUTE) == [] == place.at(running, 13 * MINUTE)
    assert place.at(running, int(13.5 * MINUTE)) == [int(13.5 * MINUTE)]


def commit(place: Place, table: str, version: int, is_change: bool = True) -> None:
    log = place.folder / "lakehouse" / table.replace(".", "/") / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    actions = [{"commitInfo": {"timestamp": version}}, {"add": {"path": "x", "dataChange": is_change}}]
    (log / f"{version:020d}.json").write_text("\n".join(map(json.dumps, actions)))


def updates(condition: str, **timers) -> Trigger:
    return trigger_of(trigger={"table_update": {"table_names": ["dev.sales.orders", "dev.sales.customers"],
                                                "condition": condition, **timers}})


def test_any_update_of_data_fires_and_a_missing_table_is_waited_for(place, caplog):
    commit(place, "dev.sales.orders", 0)
    place.declare(report=updates("ANY_UPDATED"))
    running = place.scheduler()
    assert place.at(running, 1, 2) == []
    assert "no table dev.sales.customers" in caplog.text
    commit(place, "dev.sales.orders", 1, is_change=False)  # such as OPTIMIZE
    assert place.at(running, 3) == []
    commit(place, "dev.sales.orders", 2)
    commit(place, "dev.sales.orders", 3, is_change=False)
    assert place.at(running, 4, 5) == [4]
    details = json.loads(place.store.rows("select details from fires")[0]["details"])["table_update"]
    assert details["updated_tables"] == ["dev.sales.orders"] and details["dev.sales.orders"] == {
        "version": 2, "commit_timestamp": "1970-01-01T00:00:00.002000+00:00"}
    commit(place, "dev.sales.customers", 0)
    assert place.at(place.scheduler(), 6, 7) == [6]


def test_all_updated_waits_for_the_last_table(place):
    for table in ("dev.sales.orders", "dev.sales.customers"): commit(place, table, 0)
    place.declare(report=updates("ALL_UPDATED"))
    running = place.scheduler()
    assert place.at(running, 1) == []
    commit(place, "dev.sales.orders", 1)
    commit(place, "dev.sales.orders", 2)
    assert place.at(running, 2) == []
    commit(place, "dev.sales.customers", 1)
    assert place.at(running, 3, 4) == [3]
    commit(place, "dev.sales.customers", 2)
    assert place.at(running, 5) == []


def test_the_versions_are_those_that_deltalake_writes(place):
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake
    path = str(place.folder / "lakehouse/dev/sales/orders")
    place.declare(report=trigger_of(trigger={"table_update": {"table_names": ["dev.sales.orders"]}}))
    running = place.scheduler()
    assert place.at(running, 1) == []
    write_deltalake(path, pa.table({"id": [1]}))
    assert place.at(running, 2, 3) == [2]
    write_deltalake(path, pa.table({"id": [2]}), mode="append")
    assert place.at(running, 4) == [4]
    DeltaTable(path).optimize.compact()
    DeltaTable(path).create_checkpoint()
    assert DeltaTable(path).version() == 2 and place.at(running, 5) == []


# Runs

def write_run(place: Place, result: str | None, end: int, key: str = "feed") -> int:
    "A run that the starter has begun."
    number = run_store.record_run(place.store, key, "prod", {}, ["a"])
    run_store.update_run(place.store, number, life_cycle_state="TERMINATED" if result else "RUNNING",
                         result_state=result, end_time=end if result else None)
    return number


def test_a_continuous_job_always_has_one_run_and_waits_longer_after_each_failure(place):
    place.declare(feed=trigger_of(continuous={"pause_status": "UNPAUSED"}))
    results, running, seconds = [None], place.scheduler(), []
    def start(fire):
        seconds.append(place.clock[0] // 1000)
        return write_run(place, results[0], place.clock[0])
    place.starts.start = start
    def look(last): place.at(running, *range((place.clock[0] // 1000 + 1) * 1000, (last + 1) * 1000, 1000))
    look(5)
    assert seconds == [1]  # one runs
    run_store.update_run(place.store, 1, life_cycle_state="TERMINATED", result_state="SUCCESS", end_time=5_000)
    results[0] = "FAILED"
    look(6 + 10 + 20 + 40 + 3)
    assert seconds == [1, 6, 16, 36, 76]
    results[0] = "SUCCESS"
    look(76 + 80 + 2)
    assert seconds == [1, 6, 16, 36, 76, 156, 157, 158]  # the failures are over


def test_a_continuous_job_waits_for_a_run_that_a_person_has_started(place):
    place.declare(feed=trigger_of(continuous={}))
    by_hand = write_run(place, None, 0)
    running = place.scheduler()
    assert place.at(running, 1000, 2000) == []
    run_store.update_run(place.store, by_hand, life_cycle_state="TERMINATED", result_state="SUCCESS", end_time=2000)
    assert len(place.at(running, 3000)) == 1


def test_a_failed_task_of_a_continuous_job_runs_again_while_another_one_runs(project, monkeypatch):
    from mlops_nb.jobs import beginning, runner
    from mlops_nb.jobs.execute import Outcome
    ran, go_on = [], threading.Event()
    def run_notebook(step):
        ran.append(step.key)
        if step.key == "slow": return Outcome("SUCCESS") if go_on.wait(20) else Outcome("FAILED")
        if ran.count("bad") > 3: go_on.set()
        return Outcome("FAILED", "no")
    monkeypatch.setitem(runner.TASK_RUNNERS, "notebook_task", run_notebook)
    tasks = [{"task_key": key, "notebook_task": project.notebook("any", "1")} for key in ("slow", "bad")]
    project.job("job", tasks, continuous={"task_retry_mode": "ON_FAILURE"})
    run = beginning.begin_run(project.home(), "job", {}, trigger=run_store.RunTrigger("CONTINUOUS"))
    assert runner.finish_run(run) == "FAILED" and ran.count("bad") == 4


def test_the_references_of_a_scheduled_run_have_the_fire_time_and_what_has_fired(project, monkeypatch):
    from mlops_nb.jobs import runner
    from mlops_nb.jobs.execute import Outcome
    seen = []
    def run_notebook(step):
        texts = ["{{job.trigger.type}}", "{{job.trigger.time.iso_date}}", "{{job.trigger.table_update.updated_tables}}",
                 "{{job.trigger.table_update.`a.b.c`.version}}"]
        seen.append([step.run.parameters["day"], *step.resolve(texts)])
        return Outcome("SUCCESS")
    monkeypatch.setitem(runner.TASK_RUNNERS, "notebook_task", run_notebook)
    project.job("job", [{"task_key": "a", "notebook_task": project.notebook("any", "1")}],
                parameters=[{"name": "day", "default": "{{job.trigger.time.iso_date}}"}])
    home = project.home()
    host = RunHost(lambda target, variables, job: project.home(), home.store)
    details = {"table_update": {"updated_tables": ["a.b.c"], "a.b.c": {"version": 7}}}
    at = int(datetime(2013, 4, 1, 23, 30, tzinfo=UTC).timestamp() * 1000)
    fire = fires.Fire("job", "job", home.bundle.target, "table_update-1", at, details)
    starter = JobStarter(home.store, host.begin)
    number = starter.start(fire)
    wait_until(lambda: number not in host.running)
    assert seen == [["2013-04-01", "TABLE", "2013-04-01", '["a.b.c"]', "7"]]
    assert run_store.get_run(home.store, number)["trigger_time"] == at
    assert starter.start(fire) == number and len(seen) == 1  # the same token
    host.close()


def test_a_job_whose_runs_pile_up_is_not_started_again(place):
    for _ in range(10): run_store.record_run(place.store, "report", "prod", {}, ["a"])
    place.declare(report=cron("0 0 * * * ?"))
    running = place.scheduler(job=JobStarter(place.store, lambda *_, **__: pytest.fail("started")))
    place.at(running, 0, HOUR)
    assert "10 runs of the job are waiting" in place.store.rows("select message from fires")[0]["message"]


# Kills and two schedulers

def test_two_schedulers_that_see_the_same_files_start_one_run(place):
    folder = place.folder / "volumes/dev/sales/landing/in"
    folder.mkdir(parents=True)
    place.declare(load=arrivals())
    both = [place.scheduler(), place.scheduler()]
    for now, name in enumerate(("a", "b"), 1):
        for one in both: assert place.at(one, 10 * now) == []
        (folder / name).write_text(name)
        started = place.at(both[0], 10 * now + 1) + place.at(both[1], 10 * now + 2) + place.at(both[0], 10 * now + 3)
        assert started == [10 * now + 1]
        both.reverse()


def test_two_schedulers_keep_one_run_of_a_continuous_job(place):
    place.declare(feed=trigger_of(continuous={}))
    both = [place.scheduler(), place.scheduler()]
    place.starts.start = lambda fire: write_run(place, None, 0)
    for now in range(1000, 5000, 500):
        for one in both: place.at(one, now)
    assert len(place.store.rows("select * from runs")) == 1


def test_old_fire_times_are_forgotten_once_a_day_and_the_newest_of_a_trigger_stays(place):
    place.declare(often=cron("0 0 0 * * ?"), rare=cron("0 0 0 1 1 ?"))
    running = place.scheduler()
    place.at(running, *(day * DAY for day in range(360, 500)))
    rows = place.store.rows("select job, fire_time / 86400000 as day from fires order by day")
    assert [row["day"] for row in rows if row["job"] == "rare"] == [365]
    assert [row["day"] for row in rows if row["job"] == "often"] == list(range(409, 500))


SCHEDULER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_scheduler import Place, Starts, cron
from mlops_nb.jobs import run_store
place = Place(Path({folder!r}), **{{f"job{{i}}": cron("0 0 * * * ?") for i in range({jobs})}})
class Begins(Starts):
    def start(self, fire):
        if {kill!r} == "before": os.kill(os.getpid(), 9)
        number = run_store.record_run(place.store, fire.key, fire.target, {{}}, ["a"], trigger=fire.trigger,
                                      request={{"user_name": "", "token": fire.token}})
        if {kill!r} == "after": os.kill(os.getpid(), 9)
        return number
running = place.scheduler(job=Begins())
print("ready", flush=True)
sys.stdin.readline()
for place.clock[0] in {times!r}: running.tick()
"""


def start_process(folder: Path, times: list[int], kill: str = "", jobs: int = 1) -> subprocess.Popen:
    code = SCHEDULER.format(tests=str(Path(__file__).parent), folder=str(folder), kill=kill, times=times, jobs=jobs)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kill", ["before", "after"])
def test_a_kill_between_claim_and_start_leaves_one_run(tmp_path, kill):
    place = Place(tmp_path, job0=cron("0 0 * * * ?"))
    place.at(place.scheduler(), 1)
    killed = start_process(tmp_path, [HOUR], kill)
    killed.communicate("go\n", timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert [row["state"] for row in place.store.rows("select state from fires")] == ["CLAIMED"]
    assert len(place.store.rows("select * from runs")) == (kill == "after")
    class Begins(Starts):
        def start(self, fire):
            from mlops_nb.jobs.hosted_runs import run_with_token
            self.append(fire.time)
            if number := run_with_token(place.store, fire.token, fire.key, fire.target): return number
            return run_store.record_run(place.store, fire.key, fire.target, {}, ["a"], trigger=fire.trigger,
                                        request={"user_name": "", "token": fire.token})
    place.at(place.scheduler(job=Begins()), HOUR + 1, HOUR + 2)
    runs = place.store.rows("select * from runs")
    assert [(run["trigger_type"], run["trigger_time"]) for run in runs] == [("PERIODIC", HOUR)]
    assert [(row["state"], row["run_id"]) for row in place.store.rows("select * from fires")] == [("STARTED", 1)]


def test_two_processes_on_one_state_start_one_run_for_each_fire_time(tmp_path):
    Place(tmp_path).store.prepare()
    times = [0] + [hour * HOUR + step for hour in range(1, 6) for step in (0, 1)]
    processes = [start_process(tmp_path, times, jobs=2) for _ in range(2)]
    for process in processes:  # at the same time
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes: assert process.wait(60) == 0
    runs = RunStore(tmp_path / "runs.db").rows("select job, trigger_time from runs")
    assert sorted((run["job"], run["trigger_time"]) for run in runs) == [
        (f"job{i}", hour * HOUR) for i in range(2) for hour in range(1, 6)]
    for process in processes: process.communicate()


def test_a_claim_whose_trigger_was_removed_or_paused_is_not_started(tmp_path):
    place = Place(tmp_path, job0=cron("0 0 * * * ?"))
    place.at(place.scheduler(), 1)
    start_process(tmp_path, [HOUR], "before").communicate("go\n", timeout=30)
    place.declare(job0=cron("0 0 * * * ?", pause_status="PAUSED"))
    assert place.at(place.scheduler(), HOUR + 1) == []
    assert [row["state"] for row in place.store.rows("select state from fires")] == ["SKIPPED"]


# Alerts

ALERT = """
import sys, time
from pathlib import Path
Path({log!r}).open("a").write(" ".join(sys.argv[1:]) + "\\n")
while Path({wait!r}).exists(): time.sleep(0.02)
print("evaluated", flush=True)
sys.exit({code})
"""


def wait_until(holds: Callable, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 3])
def test_an_alert_is_evaluated_by_a_command_one_at_a_time(place, code):
    file = place.folder / "fake.py"
    calls, wait = place.folder / "calls.txt", place.folder / "wait"
    wait.touch()
    file.write_text(ALERT.format(log=str(calls), wait=str(wait), code=code))
    commands = CommandStarter(place.store, alert_command([sys.executable, str(file)]), place.folder / "log.txt",
                              dict(os.environ), place.folder)
    hourly = read_triggers({"schedule": {"quartz_cron_schedule": "0 0 * * * ?", "timezone_id": "UTC"}})[0][0]
    place.schedules = Schedules([Scheduled("alert", "losses", "prod", hourly)])
    running = place.scheduler(alert=commands)
    place.at(running, 0, HOUR, 2 * HOUR, 3 * HOUR)  # the first evaluation takes until the third
    wait_until(calls.exists)
    wait.unlink()
    wait_until(lambda: commands.running["alert", "losses", "prod"][0].poll() is not None)
    place.at(running, 3 * HOUR + 1)
    wait_until(lambda: len(calls.read_text().splitlines()) == 2)
    assert calls.read_text().splitlines() == [
        f"alerts evaluate -t prod --alert losses --at 1970-01-01T0{hour}:00:00Z" for hour in (1, 3)]
    wait_until(lambda: commands.running["alert", "losses", "prod"][0].poll() is not None)
    commands.watch()
    states = [row["state"] for row in place.store.rows("select state from fires order by fire_time")]
    assert states == (["STARTED"] * 2 if code == 0 else ["FAILED"] * 2)
    assert (place.folder / "log.txt").read_text().count("evaluated") == 2


# Declarations

def test_the_declarations_of_a_project_are_read_again_when_they_change(project):
    task = [{"task_key": "a", "notebook_task": project.notebook("any", "1")}]
    schedule = {"quartz_cron_expression": "0 0 1 * * ?", "timezone_id": "UTC"}
    project.job("nightly", task, schedule=schedule)
    project.job("many", task, triggers=[{"schedule": schedule}, {"periodic": {"interval": 1, "unit": "DAYS"},
                                                                 "pause_status": "PAUSED"}])
    reader = ScheduleReader(project.root, project.home().store)
    shown = {(item.key, item.trigger.kind, item.trigger.is_paused) for item in reader.read().items}
    assert shown == {("nightly", "schedule", False), ("many", "schedule", False), ("many", "periodic", True)}
    assert reader.read() is reader.read()
    project.job("nightly", task, schedule=schedule | {"timezone_id": "Mars/Olympus"})
    (key, [text]), *_ = reader.read().problems.items()
    assert key[:2] == ("job", "nightly") and "no time zone" in text
    project.path("resources/jobs.yml").write_text("resources: [")
    assert reader.read().unreadable


@pytest.mark.parametrize("declared, message", [
    ({"trigger": {"file_arrival": {"url": "s3://bucket/folder"}}}, "no folder of a volume"),
    ({"trigger": {"file_arrival": {"url": "/Volumes/dev/sales/../x"}}}, "no folder of a volume"),
    ({"trigger": {"table_update": {"table_names": ["orders"]}}}, "table_names"),
    ({"trigger": {"table_update": {"table_names": ["a.b.c"], "condition": "SOME"}}}, "no condition 'SOME'"),
    ({"trigger": {"model": {"condition": "MODEL_CREATED"}}}, "no trigger 'model'"),
    ({"schedule": "daily"}, "0 fields"),
    ({"trigger": {"periodic": {"interval": 0, "unit": "DAYS"}}}, "interval is 0"),
    ({"trigger": {"periodic": {"interval": 1, "unit": "DAYS"}, "sql_condition": {}}}, "sql_condition")])
def test_what_is_wrong_in_a_trigger_is_a_sentence(declared, message):
    triggers, problems = read_triggers(declared)
    assert triggers == [] and len(problems) == 1 and message in problems[0]
