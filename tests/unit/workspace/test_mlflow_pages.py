"""The way of a request to MLflow's server: a small server in its place, on a Unix socket."""
import asyncio
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from served import served
from small_server import start_small

from mlops_nb.workspace.mlflow_pages import last_lines, mlflow_app, pages_environment, start_server


@pytest.fixture(scope="module")
def pages(env):
    pages = mlflow_app(env)
    pages.process.start = start_small
    yield pages
    pages.close()


@pytest.fixture(scope="module")
def client(pages):
    app = FastAPI()
    app.mount("/mlflow", pages)
    with served(app) as host, httpx.Client(base_url=host, trust_env=False) as client: yield client


def test_a_request_and_its_answer_pass_unchanged_without_credentials(client):
    headers = {"Authorization": "Bearer x", "Cookie": "mlops_session=x", "X-Mine": "1", "Origin": "http://a"}
    answer = client.post("/mlflow/api/a%20b%2Fc?x=1&x=%2F", content=iter([b"ab", b"cd"]), headers=headers)
    assert (answer.status_code, answer.content) == (418, b"dcbaend")
    assert answer.headers["x-path"] == "/api/a%20b%2Fc?x=1&x=%2F"
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    names = set(answer.headers["x-names"].split(","))
    assert {"x-mine", "host"} <= names and not names & {"authorization", "cookie", "origin"}
    assert client.get("/mlflow").headers["location"].endswith("/mlflow/")  # the addresses of the pages are relative


def test_a_server_that_has_ended_is_started_again(client, pages):
    first = client.get("/mlflow/").headers["x-pid"]
    assert client.get("/mlflow/").headers["x-pid"] == first
    pages.process.process.kill()
    pages.process.process.wait()
    assert client.get("/mlflow/").headers["x-pid"] != first


def test_the_server_ends_with_the_process_that_started_it(client, pages):
    client.get("/mlflow/")
    process, folder = pages.process.process, pages.process.folder
    process.stdin.close()  # as the system does when the process is killed
    assert process.wait(10) == 0
    pages.process.close()
    assert not folder.exists()


def test_another_store_is_named_and_nothing_is_started(env):
    for uri, status, text in (("http://me:word@mlflow.example:5000", 307, "http://mlflow.example:5000/#/models"),
                              ("databricks", 503, "in a Databricks workspace"), ("file:/x", 503, "is no store")):
        app, pages = FastAPI(), mlflow_app(replace(env, tracking_uri=uri))
        app.mount("/mlflow", pages)
        with served(app) as host: answer = httpx.get(f"{host}/mlflow/", trust_env=False)
        assert answer.status_code == status and text in answer.text and pages.process.process is None


def test_the_variables_are_those_that_the_installed_mlflow_reads(env):
    from mlflow.server import constants
    variables = pages_environment(env)
    assert variables[constants.BACKEND_STORE_URI_ENV_VAR] == variables[constants.REGISTRY_STORE_URI_ENV_VAR]
    assert variables[constants.ARTIFACT_ROOT_ENV_VAR] == str(env.state / "artifacts")


def test_a_server_does_not_get_the_variables_of_mlflow_of_the_process_that_starts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    names = "import os; print([name for name in os.environ if 'MLFLOW_' in name])"
    assert start_server(["-c", names], tmp_path, {"_MLFLOW_SERVER_FILE_STORE": "y"}).wait(30) == 0
    assert last_lines(tmp_path) == "['_MLFLOW_SERVER_FILE_STORE']"


def test_an_upload_that_is_cut_off_is_not_taken_for_a_whole_one(pages):
    messages = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])
    sent = []
    async def receive(): return next(messages)
    async def send(message): sent.append(message)
    scope = {"type": "http", "method": "PUT", "path": "/mlflow/a", "root_path": "/mlflow",
             "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(pages(scope, receive, send))
    assert sent == [], "the server has answered a request that never ended"
