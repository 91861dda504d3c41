"""Artifacts of runs and of logged models by MLflow's classes for Databricks: they go through the Files API."""

import pytest
from served import served

from mlops_nb.serving.places import make_places
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.mlflow_pages import mlflow_app
from mlops_nb.workspace.rest_mlflow import tracking_router
from mlops_nb.workspace.token_access import Permissions
from mlops_nb.workspace.tokens import load_tokens, owner_token, users_by_digest

MODEL = """
import mlflow
class Same(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]: return model_input
mlflow.models.set_model(Same())
"""


@pytest.fixture
def state(env, monkeypatch):
    "The state of a workspace to which MLflow's client is set."
    rest_files = pytest.importorskip("mlops_nb.workspace.rest_files", reason="the Files API is in another module")
    import mlflow
    places, pages = make_places(env), mlflow_app(env)
    token, permissions = owner_token(places, "ann"), Permissions(env.root, lambda: load_tokens(places))
    routers = [rest_files.files_router(env, permissions), tracking_router(pages, places, files_api=True)]
    with served(build_app(lambda: users_by_digest(load_tokens(places)), routers)) as host:
        for name, value in {"DATABRICKS_HOST": host, "DATABRICKS_TOKEN": token}.items(): monkeypatch.setenv(name, value)
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri("databricks")
        yield env.state
        mlflow.set_tracking_uri(before)
    pages.close()


@pytest.mark.slow
def test_artifacts_go_through_the_workspace_and_are_where_the_commands_at_home_read_them(state, tmp_path):
    import mlflow
    code, client = tmp_path / "same.py", mlflow.MlflowClient()
    code.write_text(MODEL)
    experiment = mlflow.set_experiment("/Shared/artifacts")
    with mlflow.start_run() as run:
        mlflow.log_text("hello", "texts/a.txt")
        model = mlflow.pyfunc.log_model(name="model", python_model=str(code), input_example=["a"])
    uri = client.get_run(run.info.run_id).info.artifact_uri
    assert uri == f"dbfs:/databricks/mlflow-tracking/{experiment.experiment_id}/{run.info.run_id}/artifacts"
    assert [each.path for each in client.list_artifacts(run.info.run_id, "texts")] == ["texts/a.txt"]
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/texts/a.txt") == "hello"
    assert mlflow.pyfunc.load_model(model.model_uri).predict(["x"]) == ["x"]
    folder = state / "artifacts" / experiment.experiment_id
    assert (folder / run.info.run_id / "artifacts" / "texts" / "a.txt").read_text() == "hello"
    assert (folder / "models" / model.model_id / "artifacts" / "MLmodel").is_file()
    home = mlflow.MlflowClient(f"sqlite:///{state}/mlflow.db")
    assert home.get_run(run.info.run_id).info.artifact_uri.endswith(f"{folder}/{run.info.run_id}/artifacts")
