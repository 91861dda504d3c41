"""MLflow's tracking client with the address `databricks`, unchanged; a small server takes the place of MLflow's own."""
import json
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import InvalidParameterValue, NotFound, NotImplemented, ResourceDoesNotExist
from served import served
from small_server import start_small

from mlops_nb.serving.places import make_places
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.mlflow_pages import mlflow_app
from mlops_nb.workspace.rest_mlflow import LimitedPages, tracking_router
from mlops_nb.workspace.token_access import TokenAccess
from mlops_nb.workspace.tokens import load_tokens, make_token, owner_token, users_by_digest


def workspace_app(env):
    "The application of the tracking calls, its pages, and the tokens of Ann and of Ben."
    places, pages = make_places(env), mlflow_app(env)
    tokens = [owner_token(places, "ann"), make_token(places, "ben")]
    dev = TokenAccess("ben", "dev", frozenset({"dev", "prod"}), frozenset({"dev"}), frozenset({"dev", "prod"}))
    limited = LimitedPages(pages, SimpleNamespace(of_user=lambda user: dev))
    routers, users = [tracking_router(pages, places)], lambda: users_by_digest(load_tokens(places))
    return build_app(users, routers, pages=limited), pages, tokens


@pytest.fixture(scope="module")
def ben(env):
    app, pages, (_, token) = workspace_app(env)
    pages.process.start = start_small
    headers = {"Authorization": f"Bearer {token}"}
    with served(app) as host:
        with httpx.Client(base_url=host, headers=headers, trust_env=False, timeout=60) as client: yield client
    pages.close()


@pytest.fixture(scope="module")
def workspace(ben):
    return WorkspaceClient(host=str(ben.base_url), token=ben.headers["authorization"].removeprefix("Bearer "))


def passed_body(answer): return json.loads(answer.content.removesuffix(b"end")[::-1])


def refused(answer): return answer.status_code, answer.json()["error_code"]


def test_a_call_passes_with_its_path_and_a_body_that_is_larger_than_other_calls_may_send(ben):
    answer = ben.post("/api/2.0/mlflow/runs/log-batch?x=%2F", content=iter([b"a" * 2**20, b"b"]))
    assert answer.headers["x-path"] == "/api/2.0/mlflow/runs/log-batch?x=%2F" and answer.content[:2] == b"ba"
    assert "authorization" not in answer.headers["x-names"]
    for path in ("/api/3.0/mlflow/traces/tr-1", "/api/2.0/mlflow-artifacts/artifacts/a%20b/c"):
        assert ben.get(path).headers["x-path"] == f"{path}?"


def test_an_experiment_needs_a_folder_that_exists(ben):
    create, rename = "/api/2.0/mlflow/experiments/create", "/api/2.0/mlflow/experiments/update"
    assert passed_body(ben.post(create, json={"name": "/Workspace/Users/ben/late", "tags": [1]})) == {
        "name": "/Users/ben/late", "tags": [1]}
    assert refused(ben.post(create, json={"name": "/Users/ben/new/late"})) == (404, "RESOURCE_DOES_NOT_EXIST")
    assert refused(ben.post(rename, json={"experiment_id": "1", "new_name": "/new/late"}))[0] == 404
    for name in ("late", "", None, 1, "/", "/Users/../late", "/Users/ben", "/Users/ben/a\0b"):
        assert refused(ben.post(create, json={"name": name})) == (400, "INVALID_PARAMETER_VALUE"), name
    for body in (b"[1]", b"{", b"\xff", b'{"name": "' + b"x" * 2**20, b"[" * 100_000, b'{"name": "/\\ud800/a"}'):
        assert refused(ben.post(create, content=body)) == (400, "INVALID_PARAMETER_VALUE")


def test_an_experiment_cannot_place_its_artifacts_in_another_folder_of_the_machine(ben):
    for field, place in (("artifact_location", "file:///etc"), ("artifactLocation", "/etc"),
                         ("artifact_location", "dbfs:/a")):
        body = {"name": "/Users/ben/late", field: place}
        for path in ("/api/2.0/mlflow/experiments/create", "/mlflow/ajax-api/2.0/mlflow/experiments/create"):
            assert refused(ben.post(path, json=body)) == (501, "NOT_IMPLEMENTED")
    assert ben.post("/mlflow/ajax-api/2.0/mlflow/experiments/create", json={"name": "late"}).status_code == 418


REGISTRY = [("POST", "registered-models/alias"), ("DELETE", "registered-models/alias"),
            ("PATCH", "registered-models/update"), ("POST", "model-versions/create"),
            ("DELETE", "model-versions/delete"), ("POST", "model-versions/set-tag")]


@pytest.mark.parametrize("start", ["/mlflow/api/2.0/mlflow", "/mlflow/ajax-api/2.0/mlflow",
                                   "/mlflow//ajax-api/2.0/%6dlflow"])
def test_the_pages_change_no_model_that_the_token_may_not_change(ben, start):
    for method, path in REGISTRY:
        for name in ("prod.flights.late", "PROD.flights.late"):
            answer = ben.request(method, f"{start}/{path}", json={"name": name})
            assert refused(answer) == (403, "PERMISSION_DENIED"), (method, path)
        moved = ben.request(method, f"{start}/{path}", json={"name": "dev.flights.late", "newName": "prod.flights.a"})
        assert refused(moved) == (403, "PERMISSION_DENIED")
        for body in ({}, {"name": "late"}, {"name": ["prod"]}):
            assert ben.request(method, f"{start}/{path}", json=body).status_code == 400
        for content in (b"[1]", b'"{}"'):  # MLflow's server would read the second as an object
            assert ben.request(method, f"{start}/{path}", content=content).status_code == 400
        answer = ben.request(method, f"{start}/{path}", content=b'{"name": "prod.flights.a", "name": "dev.flights.b"}')
        assert passed_body(answer) == {"name": "dev.flights.b"}  # what was checked
    assert refused(ben.post(f"{start}/webhooks", json={"url": "https://example.com"})) == (403, "PERMISSION_DENIED")
    for method, path in (("GET", "registered-models/search"), ("POST", "registered-models/get-latest-versions"),
                         ("POST", "runs/search"), ("POST", "experiments/update")):
        assert ben.request(method, f"{start}/{path}", json={"name": "prod.flights.late"}).status_code == 418


def test_what_is_no_tracking_is_not_passed_on(ben):
    for path in ("/api/2.0/mlflow/webhooks", "/api/3.0/mlflow/gateway/secrets/create"):
        assert refused(ben.post(path, json={"name": "a"})) == (501, "NOT_IMPLEMENTED")


def test_the_user_of_a_run_and_of_a_logged_model_is_that_of_the_token(ben):
    forged = {"user_id": "ann", "tags": [{"key": "mlflow.user", "value": "ann"}, {"key": "a", "value": "b"}]}
    tags = [{"key": "a", "value": "b"}, {"key": "mlflow.user", "value": "ben"}]
    assert passed_body(ben.post("/api/2.0/mlflow/runs/create", json=forged)) == {"user_id": "ben", "tags": tags}
    assert passed_body(ben.post("/api/2.0/mlflow/logged-models", json=forged))["tags"] == tags
    assert passed_body(ben.post("/api/2.0/mlflow/runs/create", json={}))["user_id"] == "ben"


def test_an_experiment_has_one_name_with_and_without_workspace(ben):
    answer = ben.get("/api/2.0/mlflow/experiments/get-by-name?experiment_name=/Workspace/Shared/a%26b")
    assert answer.headers["x-path"].endswith("/get-by-name?experiment_name=%2FShared%2Fa%26b")


def test_what_a_local_workspace_does_not_have_is_refused_by_name(ben, workspace):
    with pytest.raises(NotImplemented, match="MLFLOW_REGISTRY_URI=databricks-uc"):
        list(workspace.model_registry.list_models())
    with pytest.raises(NotFound, match="tables of Unity Catalog"):  # the client then asks for traces of an experiment
        workspace.api_client.do("POST", "/api/4.0/mlflow/traces/search-long-running", body={})
    assert refused(ben.post("/api/2.0/mlflow/unity-catalog/any/call")) == (501, "NOT_IMPLEMENTED")
    with pytest.raises(InvalidParameterValue): workspace.experiments.create_experiment("late")
    with pytest.raises(ResourceDoesNotExist): workspace.experiments.create_experiment("/Shared/new/late")


def test_experiments_on_another_server_are_named(env):
    for uri, text in (("http://me:word@mlflow.example:5000", "on the server http://mlflow.example:5000"),
                      ("databricks", "in a Databricks workspace")):
        app, pages, (token, _) = workspace_app(replace(env, tracking_uri=uri, state=env.state / "other" / uri[:4]))
        with served(app) as host:
            answer = httpx.get(f"{host}/api/2.0/mlflow/experiments/get?experiment_id=1", trust_env=False, timeout=60,
                               headers={"Authorization": f"Bearer {token}"})
        assert refused(answer) == (501, "NOT_IMPLEMENTED") and text in answer.json()["message"]
        assert pages.process.process is None


def test_the_address_that_the_client_prints_shows_the_run(ben):
    answer = ben.get("/ml/experiments/1/runs/ab12")
    assert answer.status_code == 307 and answer.headers["location"] == "/mlflow/#/experiments/1/runs/ab12"


@pytest.fixture
def databricks(env, monkeypatch):
    "A workspace with MLflow's own server, to which MLflow's client is set."
    app, pages, (token, _) = workspace_app(replace(env, state=env.state / "real"))
    with served(app) as host:
        for name, value in {"DATABRICKS_HOST": host, "DATABRICKS_TOKEN": token}.items(): monkeypatch.setenv(name, value)
        import mlflow
        addresses = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        mlflow.set_tracking_uri("databricks")
        mlflow.set_registry_uri("databricks-uc")
        yield WorkspaceClient()
        mlflow.set_tracking_uri(addresses[0])
        mlflow.set_registry_uri(addresses[1])
    pages.close()


MODEL = """
import mlflow
class Same(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]: return model_input
mlflow.models.set_model(Same())
"""


@pytest.mark.slow
def test_the_tracking_client_of_databricks_works_unchanged(databricks, tmp_path):
    import mlflow
    import pandas as pd
    from mlflow.exceptions import RestException
    client, code = mlflow.MlflowClient(), tmp_path / "same.py"
    code.write_text(MODEL)
    experiment = mlflow.set_experiment("/Shared/late")
    assert mlflow.set_experiment("/Workspace/Shared/late").experiment_id == experiment.experiment_id
    with pytest.raises(RestException, match="Workspace directory '/Shared/new' does not exist"):
        mlflow.set_experiment("/Shared/new/late")
    with pytest.raises(RestException, match=r"Experiment\(name=/Shared/late\) already exists\.$"):
        mlflow.create_experiment("/Shared/late")
    data = mlflow.data.from_pandas(pd.DataFrame({"a": [1.0, 2.0]}), name="days")
    with mlflow.start_run(run_name="first") as run:
        mlflow.log_params({"depth": 3})
        mlflow.log_metrics({"auc": 0.5}, dataset=data)
        for step in range(3): mlflow.log_metric("loss", step, step=step)
        mlflow.log_input(data, "training")
        mlflow.log_text("hello", "texts/a.txt")
        model = mlflow.pyfunc.log_model(name="model", python_model=str(code), input_example=["a"])
    assert client.get_run(run.info.run_id).data.tags["mlflow.user"] == "ann"
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/texts/a.txt") == "hello"
    assert len(mlflow.search_runs(filter_string="metrics.auc > 0.4 and params.depth = '3'")) == 1
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3
    logged = mlflow.search_logged_models(experiment_ids=[experiment.experiment_id], output_format="list")
    assert [(m.model_id, m.tags["mlflow.user"]) for m in logged] == [(model.model_id, "ann")]
    assert mlflow.pyfunc.load_model(model.model_uri).predict(["x"]) == ["x"]
    with mlflow.start_span("question") as span: span.set_inputs({"a": 1})
    mlflow.flush_trace_async_logging()
    assert len(mlflow.search_traces(locations=[experiment.experiment_id])) == 1
    names = {each.name for each in databricks.experiments.search_experiments()}
    assert "/Shared/late" in names == {each.name for each in databricks.experiments.list_experiments()}
    with pytest.raises(NotFound, match="does not have this call"):
        databricks.api_client.do("GET", "/api/2.0/mlflow/experiments/no-call")
