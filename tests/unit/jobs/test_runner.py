"""The rules of a job's graph, with notebooks replaced by functions; tests/integration runs real ones."""
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.jobs import beginning, run_store, runner
from mlops_nb.jobs.execute import Outcome
from mlops_nb.local_stores import StoreError


@pytest.fixture
def acts(monkeypatch):
    "What each task does: task_key -> function of its step; other tasks succeed. `ran` lists the tasks in order."
    behaviour, ran = {}, []

    def run_notebook(step):
        ran.append(step.key)
        act = behaviour.get(step.task["task_key"], lambda step: Outcome("SUCCESS"))
        return act(step)

    monkeypatch.setitem(runner.TASK_RUNNERS, "notebook_task", run_notebook)
    behaviour["ran"] = ran
    return behaviour


def task(project, key, *after, **settings):
    return {"task_key": key, "notebook_task": project.notebook("any", "1"),
            "depends_on": [a if isinstance(a, dict) else {"task_key": a} for a in after]} | settings


def fails(step): return Outcome("FAILED", "no reason")


def sets_values(**values):
    def act(step):
        step.folder.mkdir(parents=True)
        (step.folder / "values.json").write_text(json.dumps(values))
        return Outcome("SUCCESS")
    return act


def run(project, key="job", given=None, **options):
    job_run = beginning.begin_run(project.home(), key, given or {}, **options)
    return job_run, runner.finish_run(job_run)


def test_a_failure_stops_what_depends_on_it_and_nothing_else(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c"),
                        task(project, "d", "b", "c", run_if="ALL_DONE")])
    acts["a"] = fails
    job_run, result = run(project)
    assert job_run.record.states == {"a": "FAILED", "b": "UPSTREAM_FAILED", "c": "SUCCESS", "d": "SUCCESS"}
    assert result == "SUCCESS_WITH_FAILURES"  # the only leaf succeeded
    assert job_run.record.row["result_state"] == result and "no reason" in job_run.record.row["state_message"]


def test_a_task_that_waits_for_a_person_fails_nothing_and_a_repair_continues(project, acts):
    project.job("child", [task(project, "approval", max_retries=3), task(project, "go", "approval", run_if="ALL_DONE")])
    project.job("job", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}},
                        task(project, "after", "call"), task(project, "other")])
    acts["approval"] = lambda step: Outcome("WAITING", "v2 waits for approval", "WaitingError")
    job_run, result = run(project)
    assert result == "WAITING" and job_run.record.states == {"call": "WAITING", "after": "WAITING", "other": "SUCCESS"}
    assert acts["ran"].count("approval") == 1 and "go" not in acts["ran"]
    assert "v2 waits for approval" in job_run.record.row["state_message"]
    acts["approval"] = lambda step: Outcome("SUCCESS")
    repaired = runner.reopen(project.home(), job_run.run_id)
    assert runner.finish_run(repaired) == "SUCCESS" and acts["ran"].count("other") == 1


def test_retries_count_attempts_and_the_last_one_decides(project, acts):
    project.job("job", [task(project, "a", max_retries=2)])
    acts["a"] = lambda step: Outcome("SUCCESS" if step.attempt == 2 else "FAILED", f"attempt {step.attempt}")
    job_run, result = run(project)
    assert result == "SUCCESS" and acts["ran"] == ["a", "a", "a"]
    attempts = run_store.list_tasks(job_run.home.store, job_run.run_id)
    assert [attempt["result_state"] for attempt in attempts] == ["FAILED", "FAILED", "SUCCESS"]


def test_a_timeout_is_retried_only_with_retry_on_timeout(project, acts):
    project.job("job", [task(project, "a", max_retries=1), task(project, "b", max_retries=1, retry_on_timeout=True)])
    acts["a"] = acts["b"] = lambda step: Outcome("TIMEDOUT")
    run(project)
    assert sorted(acts["ran"]) == ["a", "b", "b"]


def test_values_reach_conditions_and_the_chosen_branch_runs(project, acts):
    project.job("job", [
        task(project, "check"),
        {"task_key": "bad", "depends_on": [{"task_key": "check"}], "condition_task":
         {"left": "{{tasks.check.values.violations}}", "op": "GREATER_THAN", "right": "2"}},
        task(project, "alarm", {"task_key": "bad", "outcome": "true"}),
        task(project, "rest", {"task_key": "bad", "outcome": "false"})])
    acts["check"] = sets_values(violations=10)
    job_run, result = run(project)
    assert job_run.record.states == {"check": "SUCCESS", "bad": "SUCCESS", "alarm": "SUCCESS", "rest": "EXCLUDED"}
    assert result == "SUCCESS"


def test_for_each_runs_every_element_and_names_those_that_failed(project, acts):
    inner = {"task_key": "airport", "notebook_task": project.notebook("any", "1")}
    for_each = {"inputs": '["EWR", "JFK", "LGA"]', "concurrency": 2, "task": inner}
    project.job("job", [{"task_key": "each", "for_each_task": for_each}])
    acts["airport"] = lambda step: Outcome("FAILED", "no runway") if step.input == "JFK" else Outcome("SUCCESS")
    job_run, result = run(project)
    assert sorted(acts["ran"]) == ["each[0]", "each[1]", "each[2]"] and result == "FAILED"
    assert "1 of 3 elements failed\n  each[1] (JFK): no runway" in job_run.record.row["state_message"]


def test_a_called_job_gets_its_parameters_and_its_failure_is_the_callers(project, acts):
    project.job("child", [task(project, "inside")], parameters=[{"name": "version", "default": "0"}])
    call = {"job_id": "${resources.jobs.child.id}", "job_parameters": {"version": "{{tasks.make.values.version}}"}}
    project.job("job", [task(project, "make"),
                        {"task_key": "call", "depends_on": [{"task_key": "make"}], "run_job_task": call}])
    acts["make"], child_runs = sets_values(version=7), []
    acts["inside"] = lambda step: child_runs.append(step.run) or Outcome("FAILED", "no such version")
    job_run, result = run(project)
    [child_run] = child_runs
    assert child_run.parameters == {"version": "7"} and child_run.calling_tasks == ("call",) and result == "FAILED"
    child = run_store.list_runs(job_run.home.store, "child")[0]
    assert child["parent_run_id"] == job_run.run_id and child["trigger_type"] == "RUN_JOB_TASK"
    assert "no such version" in job_run.record.row["state_message"]


def test_a_reference_to_a_missing_value_fails_its_task(project, acts):
    condition = {"left": "{{tasks.a.values.sum}}", "op": "EQUAL_TO", "right": "1"}
    project.job("job", [task(project, "a"),
                        {"task_key": "b", "depends_on": [{"task_key": "a"}], "condition_task": condition}])
    acts["a"] = sets_values(total=1)
    job_run, result = run(project)
    message = job_run.record.row["state_message"]
    assert result == "FAILED" and "sum" in message and "total" in message


def test_only_runs_the_selected_tasks(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c", "b")])
    run(project, only=["b+"])
    assert acts["ran"] == ["b", "c"]
    with pytest.raises(MlopsError, match="no task 'bb'"): run(project, only=["bb"])


def test_repair_runs_failed_tasks_and_those_after_them_with_the_earlier_values(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c", "b")])
    acts["a"], acts["b"] = sets_values(x=1), fails
    job_run, result = run(project)
    assert result == "FAILED"
    acts["b"] = lambda step: Outcome("SUCCESS" if step.run.record.values("a") == {"x": 1} else "FAILED")
    repaired = runner.reopen(project.home(), job_run.run_id)
    assert runner.finish_run(repaired) == "SUCCESS" and acts["ran"] == ["a", "b", "b", "c"]
    row = run_store.get_run(repaired.home.store, job_run.run_id)
    assert (row["result_state"], row["repair_count"]) == ("SUCCESS", 1)
    with pytest.raises(MlopsError, match="succeeded: nothing to repair"): runner.reopen(project.home(), job_run.run_id)


def test_repair_continues_the_called_job(project, acts):
    project.job("child", [task(project, "first"), task(project, "second", "first")])
    project.job("job", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}}])
    acts["second"] = fails
    job_run, _ = run(project)
    del acts["second"]
    assert runner.finish_run(runner.reopen(project.home(), job_run.run_id)) == "SUCCESS"
    assert acts["ran"] == ["first", "second", "second"]
    assert len(run_store.list_runs(job_run.home.store, "child")) == 1


@pytest.mark.parametrize("repaired_alone", [True, False])
def test_a_repair_calls_a_job_again_only_if_its_call_succeeded(project, acts, repaired_alone):
    "A called run that a person repaired before its caller counts; one that succeeded before a failed task runs anew."
    project.job("child", [task(project, "inside")])
    call = {"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}, "run_if": "ALL_DONE"}
    project.job("job", [task(project, "before"), call | {"depends_on": [{"task_key": "before"}]}])
    acts["inside" if repaired_alone else "before"] = fails
    job_run, _ = run(project)
    del acts["inside" if repaired_alone else "before"]
    if repaired_alone: assert runner.finish_run(runner.reopen(project.home(), 2)) == "SUCCESS"
    runner.finish_run(runner.reopen(project.home(), job_run.run_id))
    assert run_store.get_run(job_run.home.store, job_run.run_id)["result_state"] == "SUCCESS"
    assert acts["ran"].count("inside") == 2
    child_runs = run_store.list_runs(job_run.home.store, "child")
    assert [row["result_state"] for row in child_runs] == ["SUCCESS"] * (1 if repaired_alone else 2)


def test_a_second_run_waits_for_the_first_or_is_skipped(project, acts):
    running, free = threading.Event(), threading.Event()
    acts["a"] = lambda step: running.set() or free.wait(20) and Outcome("SUCCESS")
    project.job("job", [task(project, "a")])
    project.job("impatient", [task(project, "a")], queue={"enabled": False})
    for key, expected in (("job", "SUCCESS"), ("impatient", "MAXIMUM_CONCURRENT_RUNS_REACHED")):
        running.clear(), free.clear()
        first, second = (beginning.begin_run(project.home(), key, {}) for _ in range(2))
        results = {}
        def finish(name, job_run, results): results[name] = runner.finish_run(job_run)
        threads = [threading.Thread(target=finish, args=("first", first, results)),
                   threading.Thread(target=finish, args=("second", second, results))]
        threads[0].start(); assert running.wait(10)
        threads[1].start(); time.sleep(0.3)
        assert acts["ran"].count("a") == (1 if key == "job" else 3)  # the second has not begun
        free.set()
        for thread in threads: thread.join(20)
        assert results == {"first": "SUCCESS", "second": expected}


def test_a_job_is_stopped_at_its_timeout(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a")], timeout_seconds=1)
    def wait_for_stop(step):
        while not step.run.stop_signal.reason: time.sleep(0.05)
        return Outcome("CANCELED")
    acts["a"] = wait_for_stop
    job_run, result = run(project)
    assert result == "TIMEDOUT" and job_run.record.states == {"a": "CANCELED", "b": "CANCELED"}


def test_an_unsupported_task_type_is_refused_before_anything_starts(project, acts):
    project.job("child", [{"task_key": "query", "sql_task": {"warehouse_id": "w", "query": {"query_id": "q"}}}])
    project.job("job", [task(project, "a"),
                        {"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}}])
    message = "task 'query' of job 'child' is a sql_task, which cannot run on this machine"
    with pytest.raises(MlopsError, match=message): run(project)
    assert run_store.list_runs(project.home().store) == [] and acts["ran"] == []


def test_a_misspelt_parameter_leaves_no_run(project, acts):
    project.job("job", [task(project, "a")], parameters=[{"name": "as_of", "default": "latest"}])
    with pytest.raises(MlopsError, match="no parameter 'asof' in job 'job'\n  did you mean 'as_of'"):
        run(project, given={"asof": "1"})
    assert run_store.list_runs(project.home().store) == []


@pytest.fixture
def receiver():
    "A webhook that keeps the bodies of the requests."
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200); self.end_headers()

        def log_message(self, *_): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.bodies = bodies
    yield server
    server.shutdown(); server.server_close()


def test_notifications_are_sent_and_a_dead_receiver_fails_nothing(project, acts, receiver, monkeypatch):
    monkeypatch.delenv("MLOPS_SMTP", raising=False)
    state = project.root / ".mlops"
    state.mkdir(exist_ok=True)
    (state / "destinations.json").write_text(json.dumps({
        "chat": {"url": f"http://127.0.0.1:{receiver.server_port}/hook"}, "dead": {"url": "http://127.0.0.1:9/"}}))
    project.job("job", [task(project, "a"), task(project, "b", webhook_notifications={"on_failure": [{"id": "chat"}]})],
                webhook_notifications={"on_start": [{"id": "chat"}, {"id": "dead"}], "on_failure": [{"id": "chat"}]},
                email_notifications={"on_failure": ["team@example.org"]})
    acts["b"] = fails
    job_run, result = run(project)
    assert result == "FAILED" and job_run.record.states["a"] == "SUCCESS"
    events = [(body["event_type"], body.get("task", {}).get("task_key")) for body in receiver.bodies]
    assert sorted(events, key=str) == [("jobs.on_failure", "b"), ("jobs.on_failure", None), ("jobs.on_start", None)]
    deliveries = {(delivery["destination"], delivery["event"]): delivery["ok"]
                  for delivery in job_run.home.store.rows("select * from deliveries")}
    assert deliveries["dead", "on_start"] == 0 and deliveries["chat", "on_failure"] == 1
    assert ("team@example.org", "on_failure") in deliveries


@pytest.mark.parametrize("nested", [False, True])
def test_a_task_key_that_is_a_path_is_refused_before_anything_is_written(project, acts, nested):
    invalid = task(project, "../../../outside/a")
    job = [{"task_key": "each", "for_each_task": {"inputs": "[1]", "task": invalid}}] if nested else [invalid]
    project.job("job", job)
    with pytest.raises(MlopsError, match="'../../../outside/a' of job 'job' is not a valid task_key"): run(project)
    assert acts["ran"] == [] and run_store.list_runs(project.home().store) == []


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["..", ".", "a", "", "/", "b[3]"]), max_size=6).map("/".join) | st.text(max_size=8),
       st.integers(0, 3))
def test_no_key_leads_out_of_the_folder_of_its_run(tmp_path_factory, key, attempt):
    "The oracle is the path that the system itself would open."
    run_folder = tmp_path_factory.getbasetemp() / "link to state" / "runs" / "1"
    if not run_folder.exists():
        (tmp_path_factory.getbasetemp() / "state").mkdir(exist_ok=True)
        run_folder.parents[1].symlink_to(tmp_path_factory.getbasetemp() / "state")
        run_folder.mkdir(parents=True)
    try: folder = run_store.folder_of_attempt(run_folder, key, attempt)
    except (MlopsError, ValueError): return  # ValueError of the system for a null character
    assert Path(os.path.realpath(folder)).parents[1] == run_folder.resolve()


def test_valid_keys_have_a_folder(tmp_path):
    for key in ("train", "a-b_1", "each[12]", "x" * 100):
        assert run_store.folder_of_attempt(tmp_path, key, 2) == tmp_path / key / "2"


def test_retries_belong_to_the_inner_task_of_a_loop(project, acts):
    inner = task(project, "airport", max_retries=2)
    project.job("job", [{"task_key": "each", "for_each_task": {"inputs": '["EWR", "JFK"]', "task": inner}}])
    acts["airport"] = lambda step: Outcome("FAILED" if step.input == "JFK" and step.attempt < 2 else "SUCCESS")
    job_run, result = run(project)
    assert result == "SUCCESS" and acts["ran"] == ["each[0]", "each[1]", "each[1]", "each[1]"]
    attempts = [(row["task_key"], row["attempt_number"], row["result_state"])
                for row in run_store.list_tasks(job_run.home.store, job_run.run_id)]
    assert sorted(attempts) == [("each", 0, "SUCCESS"), ("each[0]", 0, "SUCCESS"), ("each[1]", 0, "FAILED"),
                                ("each[1]", 1, "FAILED"), ("each[1]", 2, "SUCCESS")]


def test_a_repair_of_a_loop_counts_its_attempts_on(project, acts):
    inner = task(project, "airport", max_retries=1)
    project.job("job", [{"task_key": "each", "for_each_task": {"inputs": '["JFK"]', "task": inner}}])
    acts["airport"] = fails
    job_run, _ = run(project)
    acts["airport"] = lambda step: Outcome("SUCCESS")
    assert runner.finish_run(runner.reopen(project.home(), job_run.run_id)) == "SUCCESS"
    rows = run_store.list_tasks(job_run.home.store, job_run.run_id)
    inner_attempts = {row["attempt_number"]: row["result_state"] for row in rows if row["task_key"] == "each[0]"}
    assert inner_attempts == {0: "FAILED", 1: "FAILED", 2: "SUCCESS"}


def test_a_job_without_slots_skips_its_runs(project, acts):
    project.job("job", [task(project, "a")], max_concurrent_runs=0)
    job_run, result = run(project)
    row = job_run.record.row
    assert result == row["result_state"] == "MAXIMUM_CONCURRENT_RUNS_REACHED" and acts["ran"] == []
    assert row["life_cycle_state"] == "SKIPPED" and row["state_message"] == "max_concurrent_runs of the job is 0"


def test_empty_and_unknown_fields_change_nothing(project, acts):
    project.job("job", [task(project, "a", max_retries=None, condition_task=None, retry_task=1, max_retrys=3)],
                max_concurrent_runs=None, queue=None, parameters=None)
    acts["a"] = fails
    _, result = run(project)
    assert result == "FAILED" and acts["ran"] == ["a"]


def test_an_unexpected_error_of_the_runner_ends_the_run(project, acts, monkeypatch):
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    def broken(run, task): raise RuntimeError("disk full")
    monkeypatch.setattr(runner, "run_task", broken)
    job_run, result = run(project)
    assert result == "FAILED" and job_run.record.states == {"a": "FAILED", "b": "UPSTREAM_FAILED"}


def test_a_stop_ends_the_wait_before_a_retry(project, acts):
    project.job("job", [task(project, "a", max_retries=3, min_retry_interval_millis=600_000)])
    def fails_and_stops(step):
        threading.Timer(0.3, step.run.stop_signal.stop, ["CANCELED"]).start()
        return Outcome("FAILED")
    acts["a"] = fails_and_stops
    start = time.monotonic()
    _, result = run(project)
    assert result == "CANCELED" and time.monotonic() - start < 60


def test_parameters_may_refer_to_the_run_that_they_are_recorded_with(project, acts):
    project.job("job", [task(project, "a")], parameters=[{"name": "start", "default": "{{job.start_time.iso_date}}"},
                                                         {"name": "run", "default": "0"}])
    job_run, _ = run(project, given={"run": "{{job.run_id}}"})
    row = job_run.record.row
    day = time.strftime("%Y-%m-%d", time.gmtime(row["start_time"] / 1000))
    assert json.loads(row["parameters"]) == job_run.parameters == {"start": day, "run": str(job_run.run_id)}
    assert json.loads(row["tasks"]) == ["a"] and row["repair_count"] == 0


@pytest.mark.parametrize("value", ["{{tasks.a.values.y}}", "{{job.parameters.missing}}", "{{job.nonsense}}"])
def test_a_parameter_that_cannot_be_resolved_leaves_no_run(project, acts, value):
    project.job("job", [task(project, "a")], parameters=[{"name": "as_of", "default": "latest"}])
    with pytest.raises(MlopsError): run(project, given={"as_of": value})
    assert run_store.list_runs(project.home().store) == []
    job_run, result = run(project)
    assert (job_run.run_id, result) == (1, "SUCCESS")  # the refused run did not even use a number


def test_a_parameter_that_is_of_the_wrong_type_once_resolved_leaves_no_run(project, acts):
    typed = {"task_key": "a", "notebook_task": project.notebook("typed", "1", parameters="days: int = 1")}
    project.job("job", [typed], parameters=[{"name": "days", "default": "{{job.name}}"}])
    with pytest.raises(MlopsError, match="parameter 'days' must be int, got 'job'"): run(project)
    assert run_store.list_runs(project.home().store) == []


def test_a_called_job_whose_parameter_cannot_be_resolved_leaves_no_run(project, acts):
    project.job("child", [task(project, "inside")], parameters=[{"name": "as_of", "default": "{{tasks.a.values.y}}"}])
    project.job("job", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}}])
    job_run, result = run(project)
    assert result == "FAILED" and acts["ran"] == []
    assert [row["job"] for row in run_store.list_runs(job_run.home.store)] == ["job"]


def test_no_tasks_are_no_run(project, acts):
    project.job("job", [task(project, "a")])
    with pytest.raises(MlopsError, match="no task of job 'job' is selected\n  there is only a"): run(project, only=[])
    store = project.home().store
    with pytest.raises(MlopsError, match="a run of job 'job' without tasks"):
        run_store.record_run(store, "job", "dev", {}, [])
    assert run_store.list_runs(store) == []


@pytest.mark.parametrize("result", [None, "FAILED", "SUCCESS"])
def test_a_run_that_recorded_no_tasks_is_not_repaired(project, acts, result):
    "Older versions recorded a run before its tasks; a repair of what was left of it ran nothing and succeeded."
    project.job("job", [task(project, "a")])
    store = project.home().store
    run_id = run_store.record_run(store, "job", "dev", {}, ["a"])
    state = "TERMINATED" if result else "QUEUED"
    run_store.update_run(store, run_id, tasks="[]", owner="1:0.00", life_cycle_state=state, result_state=result)
    with pytest.raises(MlopsError, match="recorded no tasks: there is nothing to repair\n  start the job again"):
        runner.reopen(project.home(), run_id)
    assert run_store.get_run(store, run_id)["repair_count"] == 0 and acts["ran"] == []


def test_a_repair_of_tasks_that_the_job_has_lost_is_refused_and_changes_nothing(project, acts):
    project.job("job", [task(project, "a"), task(project, "b")])
    acts["a"] = acts["b"] = fails
    job_run, _ = run(project)
    project.job("job", [task(project, "a"), task(project, "c")])
    before = job_run.record.row
    with pytest.raises(MlopsError, match="does not have any more: b\n  there are: a, c; start the job again"):
        runner.reopen(project.home(), job_run.run_id)
    assert job_run.record.row == before


class BrokenDisplay:
    "Raises the error at the event, and knows no other one."

    def __init__(self, event, error): self.event, self.error = event, error

    def __getattr__(self, event):
        def show(*_):
            if event == self.event: raise self.error
        return show


@pytest.mark.parametrize("event", ["run_begins", "task_begins", "task_ends", "run_ends"])
@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1), UnicodeEncodeError("ascii", "…", 0, 1, "no")],
                         ids=["pipe", "exit", "encoding"])
def test_an_error_of_the_display_changes_no_result(project, acts, event, error):
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    home = project.home(display=BrokenDisplay(event, error))
    job_run = beginning.begin_run(home, "job", {})
    assert runner.finish_run(job_run) == "SUCCESS" and home.display.error is error
    assert job_run.record.states == {"a": "SUCCESS", "b": "SUCCESS"}


@pytest.mark.parametrize("part", ["notifications", "payload"])
def test_an_error_before_a_notification_is_logged_and_changes_no_result(project, acts, monkeypatch, part):
    project.job("job", [task(project, "a", email_notifications={"on_success": ["a@example.org"]})])
    def broken(*_, **__): raise KeyError("no such receiver")
    monkeypatch.setattr(runner, part, broken)
    job_run, result = run(project)
    assert result == "SUCCESS" and job_run.record.states == {"a": "SUCCESS"}
    assert "KeyError: 'no such receiver'" in (job_run.record.folder / "errors.log").read_text()


def test_a_delivery_that_cannot_be_recorded_is_logged_and_changes_no_result(project, acts, monkeypatch):
    monkeypatch.delenv("MLOPS_SMTP", raising=False)
    project.job("job", [task(project, "a")], email_notifications={"on_success": ["a@example.org"]})
    def broken(*_): raise OSError("database is locked")
    monkeypatch.setattr(run_store, "save_deliveries", broken)
    job_run, result = run(project)
    assert result == "SUCCESS" and "database is locked" in (job_run.record.folder / "errors.log").read_text()


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), RuntimeError("disk full")])
def test_every_error_of_a_task_arrives_and_is_recorded(project, acts, monkeypatch, error):
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    def broken(*_): raise error
    acts["a"] = broken
    job_run, result = run(project)
    assert result == "FAILED" and type(error).__name__ in job_run.record.row["state_message"]
    monkeypatch.setattr(runner, "run_attempt", broken)
    job_run, result = run(project)
    attempt = run_store.latest_attempts(job_run.home.store, job_run.run_id)["a"]
    assert (result, attempt["life_cycle_state"], attempt["result_state"]) == ("FAILED", "TERMINATED", "FAILED")
    assert type(error).__name__ in job_run.record.row["state_message"]


def test_an_error_of_the_scheduler_stops_the_tasks_and_is_recorded(project, acts, monkeypatch):
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    stopped = threading.Event()
    def wait_for_stop(step):
        while not step.run.stop_signal.reason: time.sleep(0.02)
        stopped.set()
        return Outcome("CANCELED")
    def broken(*_): raise RuntimeError("no decision")
    acts["a"] = wait_for_stop
    decide = runner.graph.decide
    monkeypatch.setattr(runner.graph, "decide", lambda task, *states: broken() if task["task_key"] == "b" else decide(
        task, *states))
    job_run = beginning.begin_run(project.home(), "job", {})
    with pytest.raises(RuntimeError, match="no decision"): runner.finish_run(job_run)
    row = run_store.get_run(job_run.home.store, job_run.run_id)
    assert (row["life_cycle_state"], row["result_state"]) == ("INTERNAL_ERROR", "FAILED") and stopped.wait(10)


def test_a_value_of_an_earlier_task_names_no_secret_and_a_parameter_of_a_person_does(project, acts):
    seen = {}
    def show(step):
        seen[step.run.key, step.key] = step.run.secrets
        return Outcome("SUCCESS")
    acts |= {"choose": sets_values(note="secrets/other/key"), "show": show}
    reference = "{{tasks.choose.values.note}}"
    def call(key, note, *after):
        parameters = {"job_id": "${resources.jobs.child.id}", "job_parameters": {"note": note}}
        return {"task_key": key, "depends_on": [{"task_key": name} for name in after], "run_job_task": parameters}
    project.job("child", [task(project, "show")], parameters=[{"name": "note", "default": ""}])
    project.job("parent", [task(project, "choose"), task(project, "show", "choose"), call("call", reference, "choose")])
    project.job("granting", [call("call", "{{secrets/mail/token}}")])
    assert run(project, "parent")[1] == run(project, "granting")[1] == "SUCCESS"
    assert seen["parent", "show"] == set() and seen["child", "show"] == {("mail", "token")}
    run(project, "parent")
    assert seen["child", "show"] == set()
    run(project, "child", {"note": "redis://host?password=secrets/other/key"})
    assert seen["child", "show"] == {("other", "key")}


def make_foreign(home, run_id):
    "Let a run look as if another host executed it."
    owner = "7:100@elsewhere/m/b/pid:[1]"
    run_store.update_run(home.store, run_id, life_cycle_state="RUNNING", owner=owner)
    run_store.save_task(home.store, run_id, "a", 0, life_cycle_state="RUNNING", start_time=1, owner=owner)


def test_a_run_of_another_host_keeps_its_slot_until_it_is_cancelled_by_force(project):
    from mlops_nb.jobs import progress
    condition = {"condition_task": {"op": "EQUAL_TO", "left": "1", "right": "1"}}
    project.job("job", [{"task_key": "a", **condition}], queue={"enabled": False})
    home = project.home()
    foreign = beginning.begin_run(home, "job", {})
    make_foreign(home, foreign.run_id)
    second = beginning.begin_run(home, "job", {})
    assert runner.finish_run(second) == "MAXIMUM_CONCURRENT_RUNS_REACHED"
    message = second.record.row["state_message"]
    assert "host elsewhere" in message and "mlops runs cancel 1 --force" in message
    assert progress.run_state(run_store.get_run(home.store, 1)) == "UNKNOWN"
    with pytest.raises(MlopsError, match="may still run.*\n.*mlops repair 1 --force"): runner.reopen(home, 1)
    with pytest.raises(MlopsError, match="may still run.*\n.*mlops runs cancel 1 --force"): runner.cancel(home.store, 1)
    runner.cancel(home.store, 1, force=True)
    row, = run_store.list_tasks(home.store, 1)
    assert (row["life_cycle_state"], row["result_state"], bool(row["end_time"])) == ("TERMINATED", "FAILED", True)
    assert run_store.get_run(home.store, 1)["result_state"] == "CANCELED"
    with pytest.raises(MlopsError, match="run 1 has ended: CANCELED"): runner.cancel(home.store, 1)
    assert runner.finish_run(beginning.begin_run(home, "job", {})) == "SUCCESS"


def test_a_forced_repair_takes_over_a_run_of_another_host_and_the_run_it_called(project):
    condition = {"condition_task": {"op": "EQUAL_TO", "left": "1", "right": "1"}}
    project.job("job", [{"task_key": "a", **condition}])
    home = project.home()
    parent = beginning.begin_run(home, "job", {}).run_id
    called = beginning.begin_run(home, "job", {}).run_id
    run_store.update_run(home.store, called, parent_run_id=parent)
    for run_id in (parent, called): make_foreign(home, run_id)
    assert runner.finish_run(runner.reopen(home, parent, force=True)) == "SUCCESS"
    rows = home.store.rows("select life_cycle_state from tasks")
    assert {row["life_cycle_state"] for row in rows} == {"TERMINATED"}
    assert run_store.get_run(home.store, called)["life_cycle_state"] == "INTERNAL_ERROR"


def test_a_called_run_that_had_succeeded_before_the_kill_is_not_run_again(project):
    condition = {"condition_task": {"op": "EQUAL_TO", "left": "1", "right": "1"}}
    project.job("called", [{"task_key": "a", **condition}])
    project.job("job", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.called.id}"}}])
    home = project.home()
    parent = beginning.begin_run(home, "job", {})
    assert runner.finish_run(parent) == "SUCCESS"
    killed = dict(life_cycle_state="RUNNING", result_state=None, end_time=None, owner="1:0.00")
    run_store.update_run(home.store, parent.run_id, **killed)
    run_store.save_task(home.store, parent.run_id, "call", 0, **killed)
    assert runner.finish_run(runner.reopen(home, parent.run_id)) == "SUCCESS"
    called = [row["child_run_id"] for row in run_store.list_tasks(home.store, parent.run_id)]
    assert called == [2, 2] and len(run_store.list_runs(home.store)) == 2


@pytest.mark.parametrize("lost, message", [(".mlops", "the state folder {} was removed"),
                                           (".mlops/runs.db", "the run store {} was removed")])
@pytest.mark.parametrize("in_called_job", [False, True])
def test_a_state_that_is_removed_ends_the_run_with_a_sentence(project, acts, lost, message, in_called_job):
    path = project.root / lost

    def removes(step):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Outcome("SUCCESS")

    acts["a"] = removes
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    calls = {"task_key": "calls", "run_job_task": {"job_id": "${resources.jobs.job.id}"}}
    project.job("outer", [calls])
    with pytest.raises(StoreError) as caught: run(project, "outer" if in_called_job else "job")
    begin = f"run 1 of job {'outer' if in_called_job else 'job'!r} ended: "
    assert caught.value.message == begin + message.format(path) + " while it was in use"
    assert acts["ran"] == ["a"] and not (project.root / ".mlops/runs.db").exists()


def test_a_run_without_its_store_stops_what_runs_beside(project, acts):
    def waits(step):
        while not step.run.stop_signal.reason: time.sleep(0.01)
        return Outcome(step.run.stop_signal.reason)

    def replaces(step):
        store = run_store.RunStore(project.root / ".mlops/other.db")
        run_store.record_run(store, "of another process", "dev", {}, ["a"])
        store.path.replace(project.root / ".mlops/runs.db")  # in one step: the runner looks at any time
        return Outcome("SUCCESS")

    acts["long"], acts["short"] = waits, replaces
    project.job("job", [task(project, "long"), task(project, "short")])
    with pytest.raises(StoreError, match="runs.db was replaced by another file"): run(project)
    rows = run_store.RunStore(project.root / ".mlops/runs.db").rows("select job, life_cycle_state from runs")
    assert rows == [{"job": "of another process", "life_cycle_state": "QUEUED"}]
