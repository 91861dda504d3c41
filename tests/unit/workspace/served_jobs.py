"""The Jobs API of a small bundle for tests: its service, a client of databricks-sdk, and what the tasks do."""
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from databricks.sdk import WorkspaceClient
from fastapi import FastAPI
from served import served

from mlops_nb.jobs import runner
from mlops_nb.jobs.execute import Outcome
from mlops_nb.jobs.job_service import JobService
from mlops_nb.workspace.api_errors import add_error_answers
from mlops_nb.workspace.rest_identity import identity_router
from mlops_nb.workspace.rest_jobs import jobs_router


@pytest.fixture
def service(project):
    def make_home(target, variables, job): return project.home(target=target or "dev")
    service = JobService(project.root, project.root / ".mlops", make_home, "ana")
    yield service
    assert service.close(10) == []


@contextmanager
def served_jobs(service, permissions=None) -> Iterator[str]:  # the address
    "The Jobs API of a service; the token of a request is the name of its user."
    app = FastAPI()

    @app.middleware("http")
    async def name_requester(request, call_next):
        request.state.user = request.headers.get("authorization", "").removeprefix("Bearer ")
        return await call_next(request)

    for router in (jobs_router(service, permissions), identity_router()): app.include_router(router)
    add_error_answers(app)
    with served(app) as host: yield host


@pytest.fixture
def client(service):
    with served_jobs(service) as host: yield WorkspaceClient(host=host, token="ben")


@pytest.fixture
def acts(monkeypatch):
    "What each task does: task_key -> function of its step; other tasks succeed."
    behaviour = {}

    def run_notebook(step): return behaviour.get(step.task["task_key"], lambda step: Outcome("SUCCESS"))(step)

    monkeypatch.setitem(runner.TASK_RUNNERS, "notebook_task", run_notebook)
    return behaviour


def tasks_of(project, *keys):
    "A chain of tasks with a trivial notebook."
    notebook = project.notebook("any", "1", parameters="as_of: str = 'latest'")
    return [{"task_key": key, "notebook_task": notebook, "depends_on": [{"task_key": before}] if before else []}
            for before, key in zip(("", *keys), keys, strict=False)]


def until_stopped(step):
    while not step.run.stop_signal.reason: time.sleep(0.01)
    return Outcome("CANCELED", "stopped")
