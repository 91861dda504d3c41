"""A registered model that the deployment makes before its first version, and the job that is linked to it."""
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlops_nb.bundle.load import job_id, load_bundle
from mlops_nb.commands.app import app
from mlops_nb.deployment.linking import link_deployment_job, linked_job
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NAME = "dev.flights.late_arrival"


@pytest.fixture(scope="module")
def model(env) -> str:
    "A model without versions, as `databricks bundle deploy` makes it."
    registry.client(env).create_registered_model(NAME)
    return NAME


def test_a_model_without_versions_has_no_champion_and_takes_its_first_version(env, model):
    assert registry.version_numbers(env, model) == [] and registry.find_alias(env, model, "champion") is None
    with pytest.raises(MlopsError, match=f"no alias 'champion' in model {model}"):
        registry.get_alias(env, model, "champion")
    from mlflow import MlflowClient
    from mlflow.models import Model
    mlflow = MlflowClient(env.tracking_uri, env.registry_uri)
    experiment = mlflow.create_experiment("/dev/late_arrival", artifact_location=(env.state / "artifacts").as_uri())
    logged = mlflow.create_logged_model(experiment, "late_arrival")
    folder = Path(logged.artifact_location.removeprefix("file://"))
    folder.mkdir(parents=True)
    Model().save(str(folder / "MLmodel"))
    mlflow.finalize_logged_model(logged.model_id, "READY")
    env.use_mlflow()
    version = registry.register_version(env, model, logged.model_id, {"as_of": "2013-04-01"})
    assert (version.name, int(version.version)) == (model, 1)


def test_the_local_registry_has_no_deployment_jobs_and_loses_nothing(env, model):
    registry.client(env).update_registered_model(model, description="Late flights")
    with pytest.raises(MlopsError, match="keeps no deployment job: Unity Catalog does\n  leave the variable"):
        link_deployment_job(env, model, 4711)
    assert registry.client(env).get_registered_model(model).description == "Late flights"
    link_deployment_job(env, model, None)  # none is linked, as it should be
    assert registry.client(env).get_registered_model(model).description == "Late flights"


class UnityCatalog(BaseHTTPRequestHandler):
    "The part of Unity Catalog's REST API that keeps registered models."
    model = {"name": NAME, "description": "Late flights"}

    def log_message(self, *_): ...

    def do_GET(self):
        text = json.dumps({"registered_model": self.model}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PATCH(self):
        self.model.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()


@pytest.fixture
def unity_catalog(env, monkeypatch):
    "The target dev with a registry in Unity Catalog, over HTTP."
    server = ThreadingHTTPServer(("127.0.0.1", 0), UnityCatalog)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", "x")
    yield replace(env, registry_uri="databricks-uc")
    server.shutdown()
    server.server_close()


def test_a_job_is_linked_and_unlinked(unity_catalog):
    for job in (4711, 4712):
        link_deployment_job(unity_catalog, NAME, job)
        assert linked_job(unity_catalog, NAME) == str(job)
    link_deployment_job(unity_catalog, NAME, None)
    assert linked_job(unity_catalog, NAME) == "" and UnityCatalog.model["description"] == "Late flights"


def test_only_an_existing_model_of_the_target_is_linked(env, model):
    with pytest.raises(MlopsError, match="target 'dev' may not write prod.flights.late_arrival"):
        link_deployment_job(env, "prod.flights.late_arrival", 1)
    with pytest.raises(MlopsError, match="no model 'dev.flights.late' in the registry"):
        link_deployment_job(env, "dev.flights.late", 1)


def test_the_command_links_the_job_of_this_project(unity_catalog, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", unity_catalog.tracking_uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
    result = CliRunner().invoke(app, ["models", "link", "late_arrival"])
    number = str(job_id("deploy", "dev"))
    assert result.exception is None and f"job deploy ({number}) is the deployment job of {NAME}" in result.output
    assert linked_job(unity_catalog, NAME) == number and "set the variable deployment_job" in result.output
    assert "has no deployment job" in CliRunner().invoke(app, ["models", "link", "late_arrival", "--unlink"]).output
    assert linked_job(unity_catalog, NAME) == ""
    error = CliRunner().invoke(app, ["models", "link", "late_arrival", "--job", "depoy"]).exception
    assert isinstance(error, MlopsError) and "no job 'depoy'" in error.message


@pytest.mark.parametrize("target", ["dev", "prod"])
def test_the_linked_job_of_this_project_takes_what_databricks_passes(target):
    "Databricks passes the parameters model_name and model_version of the job, and starts no second one meanwhile."
    job = load_bundle(ROOT, target).job("deploy")
    parameters = {item["name"]: item["default"] for item in job["parameters"]}
    assert parameters["model_name"] == parameters["model_version"] == "" and job["max_concurrent_runs"] == 1
