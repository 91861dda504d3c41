"""The Jobs API as databricks-sdk sees it: a real client, a real server, real notebooks of a small bundle."""
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import httpx
import pytest
from databricks.sdk.errors import InvalidParameterValue, NotImplemented, ResourceDoesNotExist
from databricks.sdk.service.jobs import (
    JobSettings,
    QueueSettings,
    RunLifeCycleState,
    RunResultState,
    TerminationCodeCode,
)
from fastapi import FastAPI
from served import served
from served_jobs import tasks_of, until_stopped
from waiting import wait_until

from mlops_nb.bundle.load import job_id
from mlops_nb.jobs import run_store, runner
from mlops_nb.jobs.execute import Outcome
from mlops_nb.workspace.api_errors import add_error_answers
from mlops_nb.workspace.rest_jobs import jobs_router

SUCCESS, SECONDS = RunResultState.SUCCESS, timedelta(seconds=60)


def running_fit(project, client, acts, service) -> int:
    "The number of a run of the job `fit` whose task works until it is stopped."
    project.job("fit", tasks_of(project, "a"))
    acts["a"] = until_stopped
    number = client.jobs.run_now(job_id("fit", "dev")).run_id
    wait_until(lambda: run_store.get_run(service.store, number)["life_cycle_state"] == "RUNNING")
    return number


def fails(step): return Outcome("FAILED", "no rows\n  for 2013-04-01")


def ended(client, number):
    "The run once it has ended; the waiting of databricks-sdk looks once a second."
    wait_until(lambda: client.jobs.get_run(number).state.result_state)
    return client.jobs.get_run(number)


@pytest.mark.slow
def test_real_notebooks_run_and_return_their_output(project, client, service):
    notebook = project.notebook("say", "from mlops_nb import task", "task.exit(f'as of {as_of}')",
                                parameters="as_of: str = 'latest'")
    project.job("say", [{"task_key": "say", "notebook_task": notebook}],
                parameters=[{"name": "as_of", "default": "latest"}])
    run = client.jobs.run_now_and_wait(job_id("say", "dev"), job_parameters={"as_of": "2013-04-01"}, timeout=SECONDS)
    assert (run.state.result_state, run.creator_user_name, run.run_name) == (SUCCESS, "ben", "say")
    assert run.status.termination_details.code is TerminationCodeCode.SUCCESS and run.run_duration > 0
    assert [(p.name, p.value, p.default) for p in run.job_parameters] == [("as_of", "2013-04-01", "latest")]
    task, = run.tasks
    assert (task.task_key, task.attempt_number, task.state.result_state) == ("say", 0, SUCCESS)
    assert task.resolved_values.notebook_task.base_parameters == {"as_of": "2013-04-01"}
    for number in (run.run_id, task.run_id):
        assert client.jobs.get_run_output(number).notebook_output.result == "as of 2013-04-01"
    page = client.api_client.do("GET", url=run.run_page_url, raw=True, headers={"Accept": "text/html"})
    assert b"as of 2013-04-01" in page["contents"].read()
    assert run_store.list_runs(service.store)[0]["run_id"] == run.run_id  # as `mlops runs` lists it
    client.jobs.delete_run(run.run_id)
    with pytest.raises(ResourceDoesNotExist): client.jobs.get_run(run.run_id)
    assert not (project.root / f".mlops/runs/{run.run_id}").exists()


@pytest.mark.slow
def test_the_jobs_of_all_targets_are_listed_with_their_settings(project, client):
    project.job("fit", tasks_of(project, "a", "b"), parameters=[{"name": "as_of", "default": "latest"}],
                tags={"team": "x"})
    project.job("call", [{"task_key": "c", "run_job_task": {"job_id": "${resources.jobs.fit.id}"}}])
    jobs = {(job.settings.name, job.settings.tags["target"]): job for job in client.jobs.list(limit=1)}
    assert set(jobs) == {(name, target) for name in ("fit", "call") for target in ("dev", "prod")}
    assert len({job.job_id for job in jobs.values()}) == 4 and jobs["fit", "dev"].settings.tags["bundle"] == "small"
    job = client.jobs.get(jobs["fit", "prod"].job_id)
    assert [t.task_key for t in job.settings.tasks] == ["a", "b"] and job.settings.tags["team"] == "x"
    assert job.settings.parameters[0].default == "latest" and job.creator_user_name
    call = client.jobs.get(jobs["call", "prod"].job_id).settings.tasks[0].run_job_task
    assert call.job_id == jobs["fit", "prod"].job_id  # the id inside a job is the id of the workspace
    assert {job.job_id for job in client.jobs.list(name="FIT", expand_tasks=True)} == {
        jobs["fit", target].job_id for target in ("dev", "prod")}


@pytest.mark.slow
@pytest.mark.parametrize("path, body, message", [
    ("run-now", {"job_id": 7}, "Job 7 does not exist"), ("run-now", {}, "job_id: Field required"),
    ("run-now", {"job_id": "JOB", "job_parameters": {"asof": "1"}}, "did you mean 'as_of'"),
    ("run-now", {"job_id": "JOB", "only": ["c"]}, "no task 'c'"),
    ("run-now", {"job_id": "JOB", "notebook_params": {"as_of": "1"}}, "send job_parameters"),
    ("run-now", {"job_id": "JOB", "idempotency_token": "x" * 65}, "at most 64"),
    ("runs/cancel", {"run_id": 7}, "Run 7 does not exist"), ("runs/repair", {"run_id": 7}, "rerun_all_failed_tasks"),
    ("runs/cancel-all", {}, "job_id is missing"), ("runs/delete", {"run_id": 2**40}, "is the run of a task")])
def test_a_mistake_is_refused_with_the_reason_and_starts_nothing(project, client, service, path, body, message):
    project.job("fit", tasks_of(project, "a", "b"), parameters=[{"name": "as_of", "default": "latest"}])
    body = {name: job_id("fit", "dev") if value == "JOB" else value for name, value in body.items()}
    with pytest.raises((InvalidParameterValue, ResourceDoesNotExist), match=message):
        client.api_client.do("POST", f"/api/2.2/jobs/{path}", body=body)
    assert run_store.list_runs(service.store) == []


@pytest.mark.slow
def test_what_would_change_a_declaration_is_refused(project, client):
    project.job("fit", tasks_of(project, "a"))
    for call in (client.jobs.reset, client.jobs.update):
        with pytest.raises(NotImplemented, match="declared in the bundle"):
            call(job_id("fit", "dev"), new_settings=JobSettings(name="x"))
    with pytest.raises(NotImplemented, match="declared in the bundle"): client.jobs.delete(job_id("fit", "dev"))
    with pytest.raises(NotImplemented, match="create a job"): client.jobs.submit(run_name="x")
    with pytest.raises(ResourceDoesNotExist): client.jobs.get(7)
    with pytest.raises(ResourceDoesNotExist): client.jobs.get_run_output(7)


def test_two_requests_with_one_token_start_one_run(project, client, acts):
    project.job("fit", tasks_of(project, "a"))
    project.job("other", tasks_of(project, "a"))
    start = partial(client.jobs.run_now, job_id("fit", "dev"), idempotency_token="one")
    with ThreadPoolExecutor(8) as pool: numbers = {run.run_id for run in pool.map(lambda _: start(), range(8))}
    assert len(numbers) == 1
    assert client.jobs.run_now(job_id("fit", "dev"), idempotency_token="two").run_id not in numbers
    with pytest.raises(InvalidParameterValue, match="used for run 1 of job 'fit'"):
        client.jobs.run_now(job_id("other", "dev"), idempotency_token="one")
    wait_until(lambda: client.jobs.get_run(1).state.result_state is SUCCESS)
    client.jobs.delete_run(1)
    with pytest.raises(InvalidParameterValue, match="run 1 of this idempotency_token was deleted"): start()


@pytest.mark.slow
def test_a_run_is_cancelled_and_repaired(project, client, acts, service):
    project.job("fit", tasks_of(project, "a", "b", "c"))
    acts["b"] = until_stopped
    number = client.jobs.run_now(job_id("fit", "dev")).run_id
    wait_until(lambda: client.jobs.get_run(number).tasks[1].state.life_cycle_state is RunLifeCycleState.RUNNING)
    with pytest.raises(InvalidParameterValue, match="is still running"): client.jobs.delete_run(number)
    with pytest.raises(InvalidParameterValue, match="is still running"):
        client.jobs.repair_run(number, rerun_all_failed_tasks=True)
    assert [run.run_id for run in client.jobs.list_runs(active_only=True)] == [number]
    client.jobs.cancel_run(number)
    run = ended(client, number)
    assert run.state.result_state is RunResultState.CANCELED
    assert run.status.termination_details.code is TerminationCodeCode.USER_CANCELED
    client.jobs.cancel_run(number)  # nothing is to be done
    acts["b"] = fails
    client.jobs.repair_run(number, rerun_tasks=["b"], rerun_dependent_tasks=True)
    run = ended(client, number)
    failed = next(task for task in run.tasks if task.task_key == "b")
    assert (run.state.result_state, failed.attempt_number) == (RunResultState.FAILED, 1)
    output = client.jobs.get_run_output(failed.run_id)
    assert output.error == "no rows" and "2013-04-01" in output.error_trace and output.metadata.job_run_id == number
    with pytest.raises(InvalidParameterValue, match="latest_repair_id"):
        client.jobs.repair_run(number, rerun_all_failed_tasks=True)
    acts["b"] = lambda step: Outcome("SUCCESS")
    latest = client.jobs.get_run(number, include_history=True).repair_history[-1].id
    run = client.jobs.repair_run_and_wait(number, rerun_all_failed_tasks=True, latest_repair_id=latest, timeout=SECONDS)
    assert run.state.result_state is SUCCESS
    assert [task.attempt_number for task in run.tasks] == [0, 2, 2]  # what had succeeded did not run again
    assert len(client.jobs.get_run(number, include_history=True).tasks) == 7
    with pytest.raises(InvalidParameterValue, match="nothing to repair"):
        client.jobs.repair_run(number, rerun_all_failed_tasks=True, latest_repair_id=service.run(number).body(
            with_history=True)["repair_history"][-1]["id"])


@pytest.mark.slow
def test_the_command_line_and_the_api_see_and_stop_the_same_runs(project, client, acts, service):
    from mlops_nb.jobs import beginning
    ours = running_fit(project, client, acts, service)
    runner.cancel(project.home().store, ours)  # as `mlops runs cancel` does
    wait_until(lambda: client.jobs.get_run(ours).state.result_state is RunResultState.CANCELED)
    theirs = beginning.begin_run(project.home(), "fit", {})
    thread = threading.Thread(target=runner.finish_run, args=(theirs,))
    thread.start()
    wait_until(lambda: client.jobs.get_run(theirs.run_id).state.life_cycle_state is RunLifeCycleState.RUNNING)
    client.jobs.cancel_all_runs(job_id=job_id("fit", "dev"))
    thread.join(10)
    shown = client.jobs.get_run(theirs.run_id)
    assert (shown.state.result_state, shown.creator_user_name) == (RunResultState.CANCELED, "ana")
    acts.clear()
    client.jobs.repair_run(theirs.run_id, rerun_all_failed_tasks=True)
    assert ended(client, theirs.run_id).state.result_state is SUCCESS


@pytest.mark.slow
def test_pages_of_runs_are_in_order_and_filtered(project, client, acts):
    for key in ("fit", "other"): project.job(key, tasks_of(project, "a"))
    numbers = [client.jobs.run_now(job_id(key, target)).run_id
               for key, target in [("fit", "dev"), ("other", "dev"), ("fit", "prod"), ("fit", "dev"), ("fit", "dev")]]
    wait_until(lambda: len(list(client.jobs.list_runs(completed_only=True))) == 5)
    assert [run.run_id for run in client.jobs.list_runs(limit=2)] == numbers[::-1]
    assert [run.run_id for run in client.jobs.list_runs(job_id=job_id("fit", "dev"), limit=2)] == [5, 4, 1]
    middle = client.jobs.get_run(3).start_time
    assert {run.run_id for run in client.jobs.list_runs(start_time_to=middle)} == {1, 2, 3}
    assert [task.task_key for task in next(client.jobs.list_runs(expand_tasks=True)).tasks] == ["a"]


@pytest.mark.slow
def test_loops_and_called_jobs_show_their_runs(project, client, acts):
    task, = tasks_of(project, "each")
    project.job("loop", [{"task_key": "loop", "for_each_task": {"inputs": '["x", "y"]', "task": task}}])
    project.job("call", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.loop.id}"}}])
    run = ended(client, client.jobs.run_now(job_id("call", "dev")).run_id)
    child = client.jobs.get_run_output(run.run_id).run_job_output.run_id
    called = client.jobs.get_run(child)
    assert (called.trigger.value, called.trigger_info.run_id) == ("RUN_JOB_TASK", run.run_id)
    loop = client.jobs.get_run(called.tasks[0].run_id)
    assert [element.task_key for element in loop.iterations] == ["loop[0]", "loop[1]"]
    assert client.jobs.get_run_output(loop.iterations[1].run_id).notebook_output.result == ""


@pytest.mark.slow
def test_a_request_can_refuse_to_wait_for_a_slot(project, client, acts):
    project.job("fit", tasks_of(project, "a"))
    acts["a"] = until_stopped
    first = client.jobs.run_now(job_id("fit", "dev")).run_id
    wait_until(lambda: client.jobs.get_run(first).state.life_cycle_state is RunLifeCycleState.RUNNING)
    second = ended(client, client.jobs.run_now(job_id("fit", "dev"), queue=QueueSettings(enabled=False)).run_id)
    assert second.state.life_cycle_state is RunLifeCycleState.SKIPPED
    assert second.status.termination_details.code is TerminationCodeCode.MAX_CONCURRENT_RUNS_EXCEEDED


@pytest.mark.slow
def test_the_end_of_the_server_stops_its_runs(project, client, acts, service):
    number = running_fit(project, client, acts, service)
    assert service.close(10) == []
    assert run_store.get_run(service.store, number)["result_state"] == "CANCELED"
    with pytest.raises(InvalidParameterValue, match="is stopping"): client.jobs.run_now(job_id("fit", "dev"))


def test_numbers_that_the_store_cannot_hold_are_refused(service):
    app, large = FastAPI(), 2**63
    app.include_router(jobs_router(service))
    add_error_answers(app)
    with served(app) as host, httpx.Client(base_url=host, trust_env=False) as client:
        for query in (f"runs/list?page_token={large}", f"runs/list?job_id={large}", f"runs/get?run_id={large}",
                      "runs/list?limit=26", "list?limit=101", "list?offset=-1", f"list?page_token={'9' * 5000}",
                      f"get?job_id=-{large}"):
            answer = client.get(f"/api/2.2/jobs/{query}")
            assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), query
        for path in ("runs/cancel", "runs/delete", "runs/repair"):
            assert client.post(f"/api/2.2/jobs/{path}", json={"run_id": large}).status_code == 400
        assert client.get(f"/jobs/1/runs/{large}").status_code == 400
        assert client.get(f"/api/2.2/jobs/runs/get?run_id={large - 1}").status_code == 404
