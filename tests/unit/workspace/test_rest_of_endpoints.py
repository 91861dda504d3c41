"""The REST calls of endpoints by their real clients, databricks-sdk and MLflow's, against control in a thread."""
import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import requests
import uvicorn
from fake_processes import config, make_manager

from mlops_nb.bundle.load import find_root
from mlops_nb.serving.endpoint_config import RestError
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_endpoints import EndpointAccess, endpoints_router
from mlops_nb.workspace.token_access import Permissions
from mlops_nb.workspace.tokens import token_digest

TOKEN = "a-token-of-ann"


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self): yield


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "The address of a control process with a manager on fake processes, and the manager."
    folder, made, listener = tmp_path_factory.mktemp("workspace"), {}, socket.socket()
    listener.bind(("127.0.0.1", 0))

    async def serve():
        manager = made["manager"] = make_manager(folder)
        app = build_app(lambda: {token_digest(TOKEN): "ann"}, [endpoints_router(manager)])
        made["server"] = Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        await made["server"].serve(sockets=[listener])
        await manager.close()
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not getattr(made.get("server"), "started", False): time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", made["manager"]
    made["server"].should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def client(served):
    from databricks.sdk import WorkspaceClient
    return WorkspaceClient(host=served[0], token=TOKEN, auth_type="pat")


@pytest.fixture(scope="module")
def call(served):
    "Sends one request with the token."
    def send(method, path, **options):
        headers = {"Authorization": f"Bearer {TOKEN}"} | options.pop("headers", {})
        return requests.request(method, served[0] + path, headers=headers, timeout=10, **options)
    return send


def core(*versions, **shares):
    from databricks.sdk.service.serving import EndpointCoreConfigInput
    return EndpointCoreConfigInput.from_dict({"name": ""} | config(*versions, **shares))


def test_an_endpoint_lives_as_databricks_sdk_sees_it(client):
    from databricks.sdk.service import serving
    made = client.serving_endpoints.create_and_wait("late", config=core("1"), tags=[serving.EndpointTag("team", "ml")])
    assert made.state.ready is serving.EndpointStateReady.READY and made.creator == "ann"
    entity = made.config.served_entities[0]
    assert (entity.name, entity.workload_size) == ("v1", "Small")
    assert entity.state.deployment is serving.ServedModelStateDeployment.DEPLOYMENT_READY
    wanted = core("1", "2", v1=90, v2=10)
    changed = client.serving_endpoints.update_config_and_wait(
        "late", served_entities=wanted.served_entities, traffic_config=wanted.traffic_config)
    assert changed.config.config_version == 2
    assert [route.traffic_percentage for route in changed.config.traffic_config.routes] == [90, 10]
    tags = client.serving_endpoints.patch("late", add_tags=[serving.EndpointTag("a", "b")], delete_tags=["team"])
    assert [(tag.key, tag.value) for tag in tags.tags] == [("a", "b")]
    table = serving.AiGatewayInferenceTableConfig(catalog_name="dev", schema_name="flights", enabled=True)
    assert client.serving_endpoints.put_ai_gateway("late", inference_table_config=table).inference_table_config == table
    assert client.serving_endpoints.get("late").ai_gateway.inference_table_config == table
    assert [endpoint.name for endpoint in client.serving_endpoints.list()] == ["late"]
    assert "loaded in" in client.serving_endpoints.logs("late", "v2").logs
    permission = client.serving_endpoints.get_permissions(made.id).access_control_list[0]
    assert permission.user_name == "ann" and permission.all_permissions[0].permission_level.value == "CAN_MANAGE"
    client.serving_endpoints.delete("late")
    assert list(client.serving_endpoints.list()) == []


def test_mistakes_raise_the_classes_of_databricks_sdk(client):
    from databricks.sdk import errors
    from databricks.sdk.errors.sdk import OperationFailed
    with pytest.raises(OperationFailed): client.serving_endpoints.create_and_wait("broken", config=core("13"))
    broken = client.serving_endpoints.get("broken")
    assert broken.config is None and broken.state.ready.value == "NOT_READY"
    state = broken.pending_config.served_entities[0].state
    assert (state.deployment.value, state.deployment_state_message) == (
        "DEPLOYMENT_FAILED", "the model cannot be loaded; its file is damaged")
    for served in ("", "/served-models/v13"):
        with pytest.raises(errors.InternalError, match="'broken' is not ready.*its file is damaged"):
            client.api_client.do("POST", f"/serving-endpoints/broken{served}/invocations", body={"inputs": []})
    with pytest.raises(errors.ResourceAlreadyExists): client.serving_endpoints.create("broken", config=core("1"))
    client.serving_endpoints.delete("broken")
    with pytest.raises(errors.ResourceDoesNotExist, match="'broken' does not exist"):
        client.serving_endpoints.get("broken")
    with pytest.raises(errors.ResourceDoesNotExist): client.serving_endpoints.delete("broken")
    with pytest.raises(errors.ResourceDoesNotExist): client.serving_endpoints.query("broken", inputs=[])
    with pytest.raises(errors.ResourceDoesNotExist, match="no version 99"): client.serving_endpoints.create(
        "late", config=core("99"))
    with pytest.raises(errors.InvalidParameterValue, match="sum 90"): client.serving_endpoints.create(
        "late", config=core("1", "2", v1=80, v2=10))
    with pytest.raises(errors.NotImplemented, match="does not have GET /api/2.0/secrets/scopes/list"):
        list(client.secrets.list_scopes())


def test_a_second_update_is_a_resource_conflict(client, served):
    from databricks.sdk import errors
    client.serving_endpoints.create_and_wait("late", config=core("1"))
    manager = served[1]
    manager.host.gate = asyncio.Event()
    client.serving_endpoints.update_config("late", served_entities=core("2").served_entities)
    details = client.serving_endpoints.get("late")
    assert details.state.config_update.value == "IN_PROGRESS" and details.config.config_version == 1
    assert details.pending_config.served_entities[0].state.deployment.value == "DEPLOYMENT_CREATING"
    with pytest.raises(errors.ResourceConflict, match="IN_PROGRESS"):
        client.serving_endpoints.update_config("late", served_entities=core("3").served_entities)
    manager.host.gate._loop.call_soon_threadsafe(manager.host.gate.set)
    assert client.serving_endpoints.wait_get_serving_endpoint_not_updating("late").config.config_version == 2
    manager.host.gate = None
    client.serving_endpoints.delete("late")


def test_the_client_of_mlflow_uses_the_same_calls(served, monkeypatch):
    from mlflow.deployments import get_deploy_client
    monkeypatch.setenv("DATABRICKS_HOST", served[0])
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    deployments = get_deploy_client("databricks")
    deployments.create_endpoint(config={"name": "late", "config": config("1")})
    assert [endpoint["name"] for endpoint in deployments.list_endpoints()] == ["late"]
    for _ in range(100):
        endpoint = deployments.get_endpoint("late")
        if endpoint["state"]["config_update"] == "NOT_UPDATING": break
        time.sleep(0.05)
    assert endpoint["config"]["served_entities"][0]["entity_version"] == "1"
    assert deployments.update_endpoint_tags("late", {"add_tags": [{"key": "a", "value": "b"}]})["tags"]
    deployments.update_endpoint_config("late", config("2"))
    deployments.delete_endpoint("late")
    assert deployments.list_endpoints() == []


def test_only_a_valid_token_opens_a_call_and_the_answer_does_not_repeat_it(served, call):
    assert requests.get(f"{served[0]}/login", timeout=5).status_code == 200
    assert requests.get(f"{served[0]}/.well-known/databricks-config", timeout=5).status_code == 200
    wrong = ["Bearer wrong-token", TOKEN, "Basic eDp5"]
    for headers in ({}, *({"Authorization": value} for value in wrong)):
        for path in ("/api/2.0/serving-endpoints", "/openapi.json", "/metrics", "/nothing"):
            answer = requests.get(served[0] + path, headers=headers, timeout=5)
            assert answer.status_code == 401 and answer.json()["error_code"] == "UNAUTHENTICATED"
            assert "wrong-token" not in answer.text
    assert call("GET", "/api/2.0/serving-endpoints").json() == {"endpoints": []}


@pytest.mark.parametrize("body, message", [
    (b"", "Field required"), (b"[", "JSON"), (b"[]", "dictionary"), (b"\xff\xfe", ""), (b"{}", "name: Field required"),
    (b'{"name": 1}', "name: Input should be a valid string"), (b'{"name": "../x"}', "name of an endpoint '../x'"),
    (b'{"name": "a", "config": {"served_entities": [{"entity_name": "a.b.c", "entity_version": "1", '
     b'"environment_vars": {"A": "b"}}]}}', "environment_vars is not supported"),
    (b'{"name": "a", "config": {"served_entities": [{"entity_name": "a.b/c.d", "entity_version": "1"}]}}', "'/'"),
    (b'{"name": "a", "config": {"served_entities": [null]}}', "served_entities"),
    (b'{"name": "a", "config": {"served_entities": ' + b"[" * 5000 + b"]" * 5000 + b"}}", ""),
    (b'{"name": "a", "config": {"served_entities": [{"entity_name": "a.b.c", "entity_version": "1"}], '
     b'"traffic_config": {"routes": [{"served_model_name": "a.b.c-1", "traffic_percentage": 1e999}]}}}',
     "traffic_percentage")])
def test_a_wrong_body_is_a_mistake_with_a_reason(call, body, message):
    answer = call("POST", "/api/2.0/serving-endpoints", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and message in answer.json()["message"], answer.text
    assert answer.json()["error_code"] in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") and "Traceback" not in answer.text


def test_curl_needs_no_content_type_and_a_large_body_is_refused(call):
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    assert "no config" in call("POST", "/api/2.0/serving-endpoints", data=b'{"name": "a"}', headers=form).text
    assert call("POST", "/api/2.0/serving-endpoints", data=b"x" * 2**21).status_code == 413


def test_the_openapi_describes_endpoints_and_invocations(call):
    paths = call("GET", "/openapi.json").json()["paths"]
    invocations = paths["/serving-endpoints/{name}/invocations"]["post"]
    forms = invocations["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    assert [form["required"][0] for form in forms] == ["dataframe_split", "dataframe_records", "instances", "inputs"]
    assert {"200", "400", "404", "429"} <= set(invocations["responses"])
    create = paths["/api/2.0/serving-endpoints"]["post"]["responses"]
    assert "422" not in create and create["409"]["content"]["application/json"]["schema"]["required"]
    assert call("DELETE", "/openapi.json").status_code == 405


def test_a_token_changes_its_endpoints_and_those_of_models_that_its_target_writes(client, served):
    client.serving_endpoints.create_and_wait("of_ann", config=core("1"))
    tokens = {"ann": {}, "dev": {"target": "dev"}, "staging": {"target": "staging"}}
    access = EndpointAccess(served[1], Permissions(find_root(), lambda: tokens))

    def allowed(user, call, *arguments):
        request = SimpleNamespace(state=SimpleNamespace(user=user))
        try: call(request, *arguments)
        except RestError as error:
            assert error.error_code == "PERMISSION_DENIED" and f"target {user!r}" in error.hint
            return False
        return True

    assert [allowed(user, access.check_change, "of_ann") for user in tokens] == [True, True, False]
    models = {"served_entities": [{"entity_name": "staging.flights.late_arrival"}]}
    reads = [allowed(user, access.check_body, models) for user in tokens]
    assert reads == [True, "staging" in access.permissions.of_user("dev").read, True]
    table = {"ai_gateway": {"inference_table_config": {"catalog_name": "prod"}}}
    assert [allowed(user, access.check_change, "of_ann", table) for user in tokens] == [True, False, False]
    client.serving_endpoints.delete("of_ann")
