"""Endpoints by the real databricks-sdk, against a workspace of the few REST paths that they need."""
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from fake_workspace import TOKEN, FakeWorkspace, error
from filelock import FileLock, Timeout

from mlops_nb.commands.endpoints import list_endpoints, query_endpoint
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.serving import endpoints
from mlops_nb.serving.endpoint_settings import EndpointSettings
from mlops_nb.serving.endpoints import EndpointError, NoWorkspaceError, ServingConfig
from mlops_nb.serving.places import read_running, workspace_places

MODEL, NAME = "dev.flights.late_arrival", "dev-flights-late_arrival"
SETTINGS = EndpointSettings(inference_table="late_arrival")
ONE = ServingConfig(NAME, MODEL, {"champion": 1}, {"champion": 100})
TWO = ServingConfig(NAME, MODEL, {"champion": 1, "challenger": 2}, {"champion": 100, "challenger": 0})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    "A login for Databricks in the environment must not reach a local workspace."
    for name in ("MLOPS_WORKSPACE", "MLOPS_WORKSPACE_TOKEN"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABRICKS_HOST", "https://somewhere.cloud.databricks.com")
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", "x")
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "x")


@pytest.fixture
def workspace():
    with FakeWorkspace() as fake: yield fake


@pytest.fixture
def env(tmp_path, workspace):
    workspace.announce(tmp_path)
    return replace(load_env("dev"), state=tmp_path, home="local", registry_uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_an_endpoint_is_created_then_left_alone_then_updated(env, workspace):
    fake, tags = workspace.endpoints, {"target": "dev", "sticky_key": "carrier", "shadow": ""}
    assert endpoints.put_endpoint(env, ONE, SETTINGS, tags) == "created"
    assert fake.endpoints[NAME]["config"]["served_entities"] == [
        {"name": "champion", "entity_name": MODEL, "entity_version": "1", "workload_size": "Small",
         "scale_to_zero_enabled": False}]
    assert fake.endpoints[NAME]["ai_gateway"] == {"inference_table_config": {
        "catalog_name": "dev", "schema_name": "flights", "table_name_prefix": "late_arrival", "enabled": True}}
    assert endpoints.serving_config(env, NAME) == ONE
    fake.calls.clear()
    assert endpoints.put_endpoint(env, ONE, SETTINGS, tags) == "unchanged"
    assert {method for method, _ in fake.calls} == {"GET"}
    assert endpoints.put_endpoint(env, TWO, SETTINGS, tags) == "updated"
    assert endpoints.serving_config(env, NAME) == TWO


def test_only_what_differs_is_changed(env, workspace):
    fake = workspace.endpoints
    endpoints.put_endpoint(env, ONE, SETTINGS, {"target": "dev", "sticky_key": "carrier"})
    fake.endpoints[NAME]["tags"].append({"key": "team", "value": "ours"})
    fake.calls.clear()
    assert endpoints.put_endpoint(env, ONE, SETTINGS, {"target": "dev", "sticky_key": ""}) == "updated"
    assert {tag["key"] for tag in fake.endpoints[NAME]["tags"]} == {"target", "team"}
    assert endpoints.put_endpoint(env, ONE, EndpointSettings(), {"target": "dev"}) == "updated"
    assert fake.endpoints[NAME]["ai_gateway"] == {"inference_table_config": {"enabled": False}}
    assert [call for call in fake.calls if call[0] != "GET"] == [
        ("PATCH", f"/api/2.0/serving-endpoints/{NAME}/tags"), ("PUT", f"/api/2.0/serving-endpoints/{NAME}/ai-gateway")]
    assert endpoints.put_endpoint(env, ONE, EndpointSettings(workload_size="Large"), {}) == "updated"
    assert fake.endpoints[NAME]["config"]["served_entities"][0]["workload_size"] == "Large"


def test_a_failed_update_names_the_reason_and_what_still_answers(env, workspace):
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    workspace.endpoints.broken[2] = "the model needs lightgbm 5"
    with pytest.raises(EndpointError, match=r"failed: champion: the model needs lightgbm 5; "
                                            r"it still serves champion v1 \(100 %\)"):
        endpoints.put_endpoint(env, replace(ONE, versions={"champion": 2}), SETTINGS, {})
    assert endpoints.serving_config(env, NAME) == ONE and endpoints.ask_endpoint(env, NAME, [{}]).values == [1.0]
    workspace.endpoints.broken.clear()
    assert endpoints.put_endpoint(env, replace(ONE, versions={"champion": 2}), SETTINGS, {}) == "updated"
    assert endpoints.ask_endpoint(env, NAME, [{}]).values == [2.0]


def test_a_failed_creation_is_repeated_as_an_update(env, workspace):
    workspace.endpoints.broken[1] = "no MLmodel"
    for _ in range(2):
        with pytest.raises(EndpointError, match="champion: no MLmodel; it serves nothing"):
            endpoints.put_endpoint(env, ONE, SETTINGS, {})
    with pytest.raises(EndpointError, match=f"endpoint {NAME} serves nothing: champion: no MLmodel"):
        endpoints.serving_config(env, NAME)
    workspace.endpoints.broken.clear()
    assert endpoints.put_endpoint(env, ONE, SETTINGS, {}) == "updated"


def test_an_update_waits_for_another_one_that_runs(env, workspace):
    fake = workspace.endpoints
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    fake.refusals = 2  # an update that began after the state was read
    fake.endpoints[NAME]["state"]["config_update"] = "IN_PROGRESS"
    threading.Timer(0.3, lambda: fake.endpoints[NAME]["state"].update(config_update="NOT_UPDATING")).start()
    began = time.monotonic()
    assert endpoints.put_endpoint(env, TWO, SETTINGS, {}) == "updated"
    assert time.monotonic() - began >= 0.3 and fake.served(NAME) == TWO.versions and fake.refusals == 0


def test_waiting_for_another_update_ends(env, workspace, monkeypatch):
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    monkeypatch.setattr(endpoints, "UPDATE_MINUTES", 0.001)
    workspace.endpoints.endpoints[NAME]["state"]["config_update"] = "IN_PROGRESS"
    with pytest.raises(EndpointError, match="is still updating"): endpoints.put_endpoint(env, TWO, SETTINGS, {})
    workspace.endpoints.endpoints[NAME]["state"]["config_update"] = "NOT_UPDATING"
    workspace.endpoints.refusals = 1000
    with pytest.raises(EndpointError, match="ResourceConflict: an update of the endpoint runs"):
        endpoints.put_endpoint(env, TWO, SETTINGS, {})


def test_an_experiment_changes_the_traffic_and_updates_keep_it_until_its_end(env, workspace):
    endpoints.put_endpoint(env, TWO, SETTINGS, {})
    split = {"champion": 75, "challenger": 25}
    assert endpoints.set_traffic(env, NAME, split).traffic == split
    workspace.endpoints.calls.clear()
    assert endpoints.set_traffic(env, NAME, split).traffic == split
    assert {method for method, _ in workspace.endpoints.calls} == {"GET"}
    medium = EndpointSettings(workload_size="Medium", inference_table="late_arrival")
    endpoints.put_endpoint(env, TWO, medium, {})
    assert endpoints.serving_config(env, NAME).traffic == split
    newer = replace(TWO, versions={"champion": 1, "challenger": 3})
    assert endpoints.put_endpoint(env, newer, medium, {}) == "unchanged"  # a newer Challenger waits
    assert endpoints.serving_config(env, NAME) == replace(TWO, traffic=split)
    endpoints.set_traffic(env, NAME, {"champion": 100})
    endpoints.put_endpoint(env, newer, SETTINGS, {})
    assert endpoints.serving_config(env, NAME) == newer
    assert endpoints.set_traffic(env, NAME, {"challenger": 100}).traffic == {"champion": 0, "challenger": 100}
    with pytest.raises(MlopsError, match="whole percentages"): endpoints.set_traffic(env, NAME, {"champion": 99})


def test_an_update_that_waits_keeps_the_split_that_began_meanwhile(env, workspace, monkeypatch):
    fake, split = workspace.endpoints, {"champion": 75, "challenger": 25}
    endpoints.put_endpoint(env, TWO, SETTINGS, {})
    config = fake.config
    def refused(endpoint, body):
        monkeypatch.setattr(fake, "config", config)
        endpoint["config"]["traffic_config"]["routes"] = [
            {"served_model_name": name, "traffic_percentage": percent} for name, percent in split.items()]
        return error(409, "RESOURCE_CONFLICT", "an update of the endpoint runs")
    monkeypatch.setattr(fake, "config", refused)
    endpoints.put_endpoint(env, replace(TWO, versions={"champion": 1, "challenger": 3}), SETTINGS, {})
    assert endpoints.serving_config(env, NAME) == replace(TWO, traffic=split)


def test_deployments_and_experiments_change_an_endpoint_one_after_the_other(env, workspace, monkeypatch):
    fake, seen = workspace.endpoints, []
    config = fake.config
    def watched(endpoint, body):
        try: FileLock(registry.lock_file(env.state, f"{MODEL}.endpoint")).acquire(timeout=0).lock.release()
        except Timeout: seen.append(len(body["served_entities"]))
        return config(endpoint, body)
    monkeypatch.setattr(fake, "config", watched)
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    endpoints.put_endpoint(env, TWO, SETTINGS, {})
    endpoints.set_traffic(env, NAME, {"champion": 75, "challenger": 25})
    assert seen == [1, 2, 2]


def test_a_request_reaches_the_entity_of_the_traffic_or_the_named_one(env):
    endpoints.put_endpoint(env, TWO, SETTINGS, {})
    assert endpoints.ask_endpoint(env, NAME, [{"a": 1}, {"a": 2}]) == endpoints.EndpointAnswer([1.0, 1.0], "champion")
    assert endpoints.ask_endpoint(env, NAME, [{"a": 1}], served="challenger").values == [2.0]
    with pytest.raises(EndpointError, match="no endpoint late"): endpoints.ask_endpoint(env, "late", [{}])
    with pytest.raises(MlopsError, match=f"no endpoint 'late' in http.*\n.*there is only {NAME}"):
        endpoints.serving_config(env, "late")


def test_rows_of_a_request_may_be_a_frame(env, workspace):
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    leaves = pd.to_datetime(["2013-07-01 12:00", None])
    rows = pd.DataFrame({"seats": [180.1234567890123, float("nan")], "leaves": leaves,
                         "flight": pd.array([1, None], "Int64")})
    assert endpoints.ask_endpoint(env, NAME, rows).values == [1.0, 1.0]
    workspace.endpoints.predict = lambda entity, records: [records]
    expected = [{"seats": 180.1234567890123, "leaves": "2013-07-01T12:00:00", "flight": 1},
                {"seats": None, "leaves": None, "flight": None}]
    assert endpoints.ask_endpoint(env, NAME, rows).values == [expected]
    assert endpoints.ask_endpoint(env, NAME, rows.to_dict("records")).values == [expected]
    with pytest.raises(MlopsError, match="rows of a request are dict {'seats': 1}\n  give a list of rows"):
        endpoints.ask_endpoint(env, NAME, {"seats": 1})


def test_a_name_in_a_path_stays_one_part_of_it(env, workspace):
    with pytest.raises(EndpointError): endpoints.ask_endpoint(env, "a/../b?c", [{}], served="d/e")
    method, path = workspace.endpoints.calls[-1]
    assert path == "/serving-endpoints/a%2F..%2Fb%3Fc/served-models/d%2Fe/invocations"


def test_mlops_query_prints_the_answer(env, monkeypatch, capsys):
    monkeypatch.setattr("mlops_nb.env.load_env", lambda target: env)
    endpoints.put_endpoint(env, TWO, SETTINGS, {})
    query_endpoint(NAME, '[{"a": 1}]', None, "challenger", None)
    assert json.loads(capsys.readouterr().out) == {"predictions": [2.0]}


def test_the_list_names_an_endpoint_that_does_not_serve_the_champion_and_what_mends_it(env, monkeypatch, capsys):
    champion = SimpleNamespace(version="1")
    monkeypatch.setattr("mlops_nb.env.load_env", lambda target: env)
    monkeypatch.setattr(registry, "find_alias", lambda env, name, alias: champion)
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    list_endpoints()
    assert "the alias champion is" not in capsys.readouterr().out
    champion.version = "2"
    list_endpoints()
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"endpoint {NAME} serves v1 as champion; the alias champion is v2; to update the endpoint: "
        "mlops models serve late_arrival -t dev")


def test_a_list_that_is_refused_names_the_workspace(env, workspace, monkeypatch):
    monkeypatch.setattr("mlops_nb.env.load_env", lambda target: env)
    workspace_places(env).token.write_text("dapi-old")
    with pytest.raises(EndpointError, match=f"the endpoints of {workspace.address}: Unauthenticated: .* not valid"):
        list_endpoints()


def test_an_endpoint_is_removed_once(env, workspace):
    endpoints.put_endpoint(env, ONE, SETTINGS, {})
    assert endpoints.remove_endpoint(env, NAME) and not endpoints.remove_endpoint(env, NAME)
    assert workspace.endpoints.endpoints == {}


def test_a_copy_of_the_state_has_no_workspace(env, workspace, tmp_path):
    "Its commands must not change or end the workspace of the original."
    shutil.copytree(env.state / "workspace", tmp_path / "copy/workspace")
    copy = replace(env, state=tmp_path / "copy")
    with pytest.raises(NoWorkspaceError, match="no local workspace runs"): endpoints.workspace_client(copy)
    assert read_running(workspace_places(copy)) is None and read_running(workspace_places(env)) is not None
    assert workspace.endpoints.calls == []


def test_the_workspace_of_another_process_that_ended_gets_no_token(env, workspace):
    file = env.state / "workspace/workspace.json"
    dead = json.loads(file.read_text())
    pid, _, rest = dead["owner"].partition(":")
    file.write_text(json.dumps(dead | {"owner": f"{pid}:1@{rest.partition('@')[2]}"}))
    endpoints.check_health(workspace.address)
    with pytest.raises(NoWorkspaceError, match="has ended\n  start it: mlops up"): endpoints.workspace_client(env)
    assert workspace.endpoints.calls == []


def test_another_workspace_is_named_by_the_environment(env, workspace, monkeypatch, tmp_path):
    elsewhere = replace(env, state=tmp_path / "elsewhere")
    monkeypatch.setenv("MLOPS_WORKSPACE", workspace.address + "/")
    with pytest.raises(MlopsError, match="MLOPS_WORKSPACE_TOKEN is not"): endpoints.workspace_client(elsewhere)
    monkeypatch.setenv("MLOPS_WORKSPACE_TOKEN", TOKEN)
    assert endpoints.put_endpoint(elsewhere, ONE, SETTINGS, {}) == "created"
    monkeypatch.setenv("MLOPS_WORKSPACE_TOKEN", "dapi-old")
    with pytest.raises(EndpointError, match="Unauthenticated: the token is not valid\n  make a token: mlops up token"):
        endpoints.serving_config(elsewhere, NAME)
    for wrong in ("localhost:8080", "workspace.example", "ftp://workspace.example", "http://", "http://[::1", "//a"):
        monkeypatch.setenv("MLOPS_WORKSPACE", wrong)
        with pytest.raises(MlopsError, match=f"MLOPS_WORKSPACE is '{re.escape(wrong)}', which is no address of a "
                                             "workspace\n  .*: MLOPS_WORKSPACE=http://[a-z]"):
            endpoints.workspace_client(elsewhere)
    monkeypatch.setenv("MLOPS_WORKSPACE", "http://127.0.0.1:9")
    with pytest.raises(NoWorkspaceError, match="no workspace answers at http://127.0.0.1:9"):
        endpoints.serving_config(elsewhere, NAME)


def test_a_laptop_without_a_login_for_databricks_has_no_workspace(env, monkeypatch, tmp_path):
    for name in ("DATABRICKS_HOST", "DATABRICKS_CLIENT_ID", "DATABRICKS_CLIENT_SECRET"): monkeypatch.delenv(name)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(NoWorkspaceError, match="there is no login for a Databricks workspace"):
        endpoints.workspace_client(replace(env, registry_uri="databricks-uc://mine"))
