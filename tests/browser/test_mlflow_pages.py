"""MLflow's pages below a path of the local workspace, in Chromium: sign-in, models, runs, artifacts."""
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from chromium import CHROMIUM
from fastapi import FastAPI
from served import served, with_users

from mlops_nb.env import load_env
from mlops_nb.workspace.mlflow_pages import mlflow_app
from mlops_nb.workspace.rest_identity import sign_in_link, sign_in_router

FILL = """
import mlflow
mlflow.set_experiment("/dev/late_arrival")
with mlflow.start_run(run_name="a winter") as run:
    mlflow.log_metric("log_loss", 0.4321)
    mlflow.log_text("who learns this is late", "notes/late.txt")
client = mlflow.MlflowClient()
client.create_registered_model("dev.flights.late_arrival")
client.create_model_version("dev.flights.late_arrival", source=run.info.artifact_uri, run_id=run.info.run_id)
print(run.info.experiment_id, run.info.run_id)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def needed_tools():
    if importlib.util.find_spec("playwright") is None: pytest.skip("playwright is missing: make install-docs")
    if CHROMIUM is None: pytest.skip("no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    state = tmp_path_factory.mktemp("state")
    uri = f"sqlite:///{state}/mlflow.db"
    return replace(load_env("dev"), state=state, tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="module")
def run(env) -> str:
    "The path of a run with a metric and an artifact."
    from mlops_nb.addresses import artifact_folder
    variables = os.environ | {"MLFLOW_TRACKING_URI": env.tracking_uri,
                              "_MLFLOW_SERVER_ARTIFACT_ROOT": artifact_folder(env.state).as_uri()}
    done = subprocess.run([sys.executable, "-c", FILL], env=variables, cwd=env.state, text=True, capture_output=True,
                          check=True)
    experiment, number = done.stdout.split()[-2:]
    return f"experiments/{experiment}/runs/{number}"


@pytest.fixture(scope="module")
def host(env, run):
    digests, pages, app = {sha256(b"secret").hexdigest(): "ana"}, mlflow_app(env), FastAPI()
    app.include_router(sign_in_router(lambda: digests))
    app.mount("/mlflow", pages)
    with served(with_users(app, digests)) as host: yield host
    pages.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.failures = []
    page.on("response", lambda answer: answer.status >= 400 and page.failures.append((answer.status, answer.url)))
    yield page
    context.close()


def shown(page, name):
    "Keep a picture of the page, if MLOPS_PICTURES names a folder."
    if folder := os.environ.get("MLOPS_PICTURES"): page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_person_signs_in_with_the_token_and_sees_models_runs_and_artifacts(host, page, run):
    page.goto(f"{host}/mlflow/#/models")
    page.fill("#token", "wrong")
    page.click("button")
    page.get_by_text("This token is not valid.").wait_for()
    shown(page, "sign-in")
    page.failures.clear()
    page.fill("#token", "secret")
    page.click("button")
    page.wait_for_url("**/mlflow/#/models")  # the page that was asked for, and not the first one of MLflow
    page.get_by_text("dev.flights.late_arrival").first.wait_for()
    shown(page, "models")
    page.goto(f"{host}/mlflow/#/{run}")
    page.get_by_text("0.4321").first.wait_for()
    shown(page, "run")
    page.goto(f"{host}/mlflow/#/{run}/artifacts")
    page.get_by_text("notes").first.click()
    page.get_by_text("late.txt").first.click()
    page.get_by_text("who learns this is late").first.wait_for()
    shown(page, "artifact")
    cookie, = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict") and "secret" not in cookie["value"]
    # MLflow's pages ask for it; only its plugin for accounts answers
    assert not [failure for failure in page.failures if not failure[1].endswith("/mlflow/users/current")]


def test_a_link_signs_in_without_the_token(host, page):
    page.goto(sign_in_link(host, "secret", "/mlflow/#/models"))
    page.get_by_text("dev.flights.late_arrival").first.wait_for()
    assert "ticket" not in page.url
