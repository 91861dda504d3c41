"""The registry of the local workspace: MLflow's unchanged client for `databricks-uc` and databricks-sdk call it."""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlflow
import numpy as np
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import DatabricksError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.databricks_sdk_models_artifact_repo import DatabricksSDKModelsArtifactRepository
from registry_server import env_of, log_model, registry_server

from mlops_nb.addresses import local_path, use_here, use_paths, version_files
from mlops_nb.cleaning.mlflow_files import plan_version_files
from mlops_nb.models import registry
from mlops_nb.workspace.uc_models import UcModels

NAME = "dev.flights.line"
pytestmark = [pytest.mark.slow,  # each call passes MLflow's client, HTTP and MLflow's store
              pytest.mark.filterwarnings("ignore:.*Add type hints")]  # MLflow's advice when it loads a model


def client_of(env):
    "MLflow's client of the store itself, as the local commands have it."
    return MlflowClient(env.tracking_uri, env.registry_uri)


class Home:
    "A workspace with a logged model, and the clients of its users."

    def __init__(self, env, host, model, run):
        self.env, self.host, self.model, self.run = env, host, model, run
        self.local = client_of(env)

    def mlflow(self, user="ann"):
        "MLflow's client, as this user."
        os.environ["DATABRICKS_TOKEN"] = user
        return MlflowClient(self.env.tracking_uri, "databricks-uc")

    def sdk(self, user="ann"): return WorkspaceClient(host=self.host, token=user)

    def register(self, name=NAME, user="ann", **options):
        "Register the logged model as a job does."
        self.mlflow(user)
        return mlflow.register_model(self.model, name, **options)

    def call(self, method, path, user="ann", **options):
        "Send a request to a path of the registry as it is."
        return httpx.request(method, f"{self.host}/api/2.0/mlflow/unity-catalog/{path}", trust_env=False, timeout=60,
                             headers={"Authorization": f"Bearer {user}"}, **options)

    def pending(self, name):
        "Create a version whose files never come, as a client that is killed leaves it."
        answer = self.call("POST", "model-versions/create", json={"name": name, "source": self.model,
                                                                  "run_id": self.run})
        return answer.json()["model_version"]["version"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, empty_store):
    folder = tmp_path_factory.mktemp("registry")
    env = env_of(folder / "state", empty_store)
    model, run = log_model(env, folder)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with pytest.MonkeyPatch.context() as patch, registry_server(env) as host:
        patch.setenv("DATABRICKS_HOST", host)
        patch.setenv("DATABRICKS_TOKEN", "ann")
        patch.delenv("MLFLOW_USE_DATABRICKS_SDK_MODEL_ARTIFACTS_REPO_FOR_UC", raising=False)
        mlflow.set_registry_uri("databricks-uc")
        yield Home(env, host, model, run)
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


@pytest.fixture(scope="module")
def version(home):
    "The first version of the model, registered by MLflow's client."
    return home.register(tags={"owner": "ann"})


def refused(code, text, call, *arguments, **options):
    "The call fails with this code, and its message says so."
    with pytest.raises((MlflowException, DatabricksError), match=text) as caught: call(*arguments, **options)
    assert caught.value.error_code == code, caught.value


def predictions(uri): return mlflow.pyfunc.load_model(uri).predict(np.array([[3.0]]))[0].tolist()


def test_a_registered_version_is_loaded_by_number_and_by_alias(home, version):
    client = home.mlflow()
    assert (version.version, version.status, version.user_id, version.run_id) == ("1", "READY", "ann", home.run)
    assert version.tags == {"owner": "ann"} and version.model_id == home.model.removeprefix("models:/")
    client.set_registered_model_alias(NAME, "champion", "1")
    assert client.get_model_version_by_alias("Dev.flights.Line", "champion").aliases == ["champion"]
    assert predictions(f"models:/{NAME}/1") == predictions(f"models:/{NAME}@champion") == [6.0]
    assert client.get_registered_model(NAME).aliases == {"champion": "1"}
    client.delete_registered_model_alias(NAME, "champion")
    refused("RESOURCE_DOES_NOT_EXIST", "Alias 'champion'", client.get_model_version_by_alias, NAME, "champion")


def test_local_commands_have_the_same_version(home, version):
    answered = registry.get_version(home.env, NAME, "1")
    assert answered.tags["owner"] == "ann" and local_path(home.local.get_model_version_download_uri(NAME, 1)).is_dir()
    mlflow.set_registry_uri(home.env.registry_uri)
    try: assert predictions(f"models:/{NAME}/1") == [6.0]
    finally: mlflow.set_registry_uri("databricks-uc")


def test_a_version_that_was_trained_here_is_read_as_well(home, version):
    name = "dev.flights.local"
    home.local.create_registered_model(name)
    home.local.create_model_version(name, home.model, home.run)
    home.mlflow()
    assert predictions(f"models:/{name}/1") == [6.0]


def test_the_client_may_also_be_told_to_use_the_files_api(home, version, monkeypatch):
    monkeypatch.setenv("MLFLOW_USE_DATABRICKS_SDK_MODEL_ARTIFACTS_REPO_FOR_UC", "true")
    assert home.register("dev.flights.told").status == "READY"
    monkeypatch.setenv("MLFLOW_USE_DATABRICKS_SDK_MODEL_ARTIFACTS_REPO_FOR_UC", "false")
    refused("NOT_IMPLEMENTED", "no cloud credentials", home.register, "dev.flights.told")


def test_a_second_registration_of_a_run_makes_a_second_version(home, version):
    first, second = home.register("dev.flights.twice"), home.register("dev.flights.twice")
    assert (first.version, second.version) == ("1", "2") and first.run_id == second.run_id == home.run


def test_versions_that_are_created_at_once_have_different_numbers(home):
    home.mlflow().create_registered_model("dev.flights.many")
    with ThreadPoolExecutor(8) as pool: numbers = list(pool.map(lambda _: home.pending("dev.flights.many"), range(16)))
    assert sorted(map(int, numbers)) == list(range(1, 17))


def test_a_version_of_a_model_that_is_deleted_meanwhile_is_refused_for_good(home, monkeypatch):
    home.mlflow().create_registered_model("dev.flights.gone")
    insert = UcModels.insert_version

    def delete_first(models, name, facts, tags):
        if name == "dev.flights.gone": models.call("delete_registered_model", name)
        return insert(models, name, facts, tags)

    monkeypatch.setattr(UcModels, "insert_version", delete_first)
    answer = home.call("POST", "model-versions/create", json={"name": "dev.flights.gone", "source": home.model})
    assert (answer.status_code, answer.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")


def test_a_pending_version_serves_nobody(home, version):
    client, name = home.mlflow(), "dev.flights.pending"
    client.create_registered_model(name)
    number = home.pending(name)
    assert client.get_model_version(name, number).status == "PENDING_REGISTRATION"
    refused("INVALID_STATE", "PENDING_REGISTRATION, not READY", client.set_registered_model_alias, name,
            "champion", number)
    refused("INVALID_STATE", "PENDING_REGISTRATION, not READY", client.get_model_version_download_uri,
            name, number)
    with pytest.raises(DatabricksError, match="PENDING_REG.*, not READY"): predictions(f"models:/{name}/{number}")
    assert "stays PENDING" in home.call("POST", "model-versions/finalize", json={"name": name, "version": number}).text
    assert client.get_model_version(name, number).status == "PENDING_REGISTRATION"


def test_finalize_makes_a_version_ready_and_closes_its_files(home, version):
    client, name = home.mlflow(), "dev.flights.by_hand"
    client.create_registered_model(name)
    number = home.pending(name)
    folder = mlflow.artifacts.download_artifacts(home.model)
    DatabricksSDKModelsArtifactRepository(name, number, registry_uri="databricks-uc").log_artifacts(folder)
    for _ in range(2):
        answer = home.call("POST", "model-versions/finalize", json={"name": name, "version": number})
        assert answer.json()["model_version"]["status"] == "READY"
    refused("PERMISSION_DENIED", "its files do not change", home.sdk().files.delete,
            f"/Models/dev/flights/by_hand/{number}/MLmodel")
    assert predictions(f"models:/{name}/{number}") == [6.0]


KILLED = """
import os, sys
from mlflow.store.artifact.databricks_sdk_models_artifact_repo import DatabricksSDKModelsArtifactRepository as Files
import mlflow
Files.log_artifacts = lambda *_, **__: os._exit(9)  # the moment between the row and its files
mlflow.set_tracking_uri(sys.argv[3])
mlflow.set_registry_uri("databricks-uc")
mlflow.register_model(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_a_pending_version(home, version):
    done = subprocess.run([sys.executable, "-c", KILLED, home.model, "dev.flights.killed", home.env.tracking_uri])
    assert done.returncode == 9
    answered = home.mlflow().get_model_version("dev.flights.killed", "1")
    assert answered.status == "PENDING_REGISTRATION" and not local_path(home.local.get_model_version_download_uri(
        "dev.flights.killed", 1)).exists()
    assert home.register("dev.flights.killed").version == "2"


def test_names_catalogs_and_permissions(home, version):
    client = home.mlflow()
    with pytest.raises(MlflowException, match="Bad model name: please specify all three levels .*legacy"):
        client.create_registered_model("line")
    refused("CATALOG_DOES_NOT_EXIST", "Catalog 'missing' does not exist", client.get_registered_model, "missing.a.b")
    refused("CATALOG_DOES_NOT_EXIST", "Catalog 'missing'", client.create_registered_model, "missing.a.b")
    refused("RESOURCE_DOES_NOT_EXIST", "Routine or Model 'dev.flights.none' does not exist", client.get_model_version,
            "dev.flights.none", "1")
    refused("RESOURCE_DOES_NOT_EXIST", "Model version '9'", client.get_model_version, NAME, "9")
    refused("RESOURCE_ALREADY_EXISTS", f"Model '{NAME}' already exists", client.create_registered_model, NAME)
    refused("PERMISSION_DENIED", "'ann' does not have MODIFY on Catalog 'prod'", home.register, "prod.flights.line")
    assert home.register("prod.flights.line", user="owner").user_id == "owner"
    other = home.mlflow("ci")
    refused("PERMISSION_DENIED", "'ci' does not have USE CATALOG on Catalog 'dev'", other.get_registered_model, NAME)
    refused("PERMISSION_DENIED", "USE CATALOG", other.search_model_versions, f"name = '{NAME}'")
    assert not [model for model in registry.all_pages(other.search_registered_models) if model.name.startswith("dev.")]
    refused("UNAUTHENTICATED", "not valid", home.mlflow("nobody").get_registered_model, NAME)


def test_searches_are_those_of_unity_catalog(home, version):
    client = home.mlflow()
    answered = client.search_model_versions(f"name='{NAME}'")[0]
    assert answered.version == "1" and answered.user_id == "ann"
    assert not isinstance(answered.tags, dict) and not isinstance(answered.aliases, list)  # asked for
    for text in (f"run_id = '{home.run}'", "tags.owner = 'ann'", f"name LIKE '{NAME}'"):
        refused("INVALID_PARAMETER_VALUE", "Unsupported filter query", client.search_model_versions, text)
    refused("INVALID_PARAMETER_VALUE", "Missing filter", client.search_model_versions, "")
    refused("RESOURCE_DOES_NOT_EXIST", "does not exist", client.search_model_versions, "name = 'dev.flights.none'")
    refused("INVALID_PARAMETER_VALUE", "page_token", client.search_registered_models, page_token="wrong")
    models = registry.all_pages(client.search_registered_models, max_results=1)
    assert NAME in [model.name for model in models] and len({model.name for model in models}) == len(models)


def test_tags_have_the_limits_of_unity_catalog(home, version):
    client, long = home.mlflow(), "x" * 1000
    client.set_model_version_tag(NAME, "1", "card", long)
    client.set_registered_model_tag(NAME, "team", "flights")
    assert client.get_model_version(NAME, "1").tags["card"] == long
    assert client.get_registered_model(NAME).tags == {"team": "flights"}
    refused("INVALID_PARAMETER_VALUE", "has 1001 char", client.set_model_version_tag, NAME, "1", "card", f"{long}x")
    refused("INVALID_PARAMETER_VALUE", "'cost-center' is not valid", client.set_registered_model_tag, NAME,
            "cost-center", "1")
    client.delete_model_version_tag(NAME, "1", "card")
    assert "card" not in client.get_model_version(NAME, "1").tags
    client.create_registered_model("dev.flights.tags", tags={f"t{number}": "" for number in range(50)})
    client.set_registered_model_tag("dev.flights.tags", "t0", "again")
    refused("INVALID_PARAMETER_VALUE", "51 tags", client.set_registered_model_tag, "dev.flights.tags", "one_more", "")


def test_aliases_have_the_rules_of_unity_catalog(home, version):
    for alias in ("latest", "v3", "of prod"):
        body = {"name": NAME, "alias": alias, "version": "1"}  # the client itself refuses some of them
        answer = home.call("POST", "registered-models/alias", json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    refused("RESOURCE_DOES_NOT_EXIST", "Model version '9'", home.mlflow().set_registered_model_alias, NAME, "b", "9")


def test_a_deleted_version_takes_its_files_and_aliases_but_not_those_of_a_copy(home, version):
    client, name = home.mlflow(), "dev.flights.gone"
    home.register(name), home.register(name)
    folders = [local_path(home.local.get_model_version_download_uri(name, number)) for number in (1, 2)]
    client.set_registered_model_alias(name, "champion", "1")
    home.local.copy_model_version(f"models:/{name}/2", "dev.flights.copy")
    client.delete_model_version(name, "1")
    assert not folders[0].exists() and client.get_registered_model(name).aliases == {}
    client.delete_registered_model(name)
    assert folders[1].is_dir() and predictions("models:/dev.flights.copy/1") == [6.0]
    client.delete_registered_model("dev.flights.copy")
    assert not folders[1].exists()
    assert home.register(name).version == "1"  # numbers begin again; its folder is another one
    assert local_path(home.local.get_model_version_download_uri(name, 1)) != folders[0]


def test_copying_a_version_uploads_its_files_again(home, version):
    copy = home.mlflow("owner").copy_model_version(f"models:/{NAME}/1", "staging.flights.line")
    assert copy.status == "READY" and predictions("models:/staging.flights.line/1") == [6.0]


def test_a_model_is_renamed_within_its_schema(home, version):
    client = home.mlflow()
    home.register("dev.flights.before")
    client.rename_registered_model("dev.flights.before", "dev.flights.after")
    assert predictions("models:/dev.flights.after/1") == [6.0]
    refused("INVALID_PARAMETER_VALUE", "another schema", client.rename_registered_model, "dev.flights.after", "dev.x.y")


def test_the_sdk_has_the_same_models(home, version):
    sdk = home.sdk()
    created = sdk.registered_models.create(catalog_name="dev", schema_name="of_sdk", name="line", comment="empty")
    assert created.full_name == "dev.of_sdk.line" and created.comment == "empty"
    home.register("dev.of_sdk.line")
    alias = sdk.registered_models.set_alias("dev.of_sdk.line", "champion", 1)
    assert (alias.alias_name, alias.version_num) == ("champion", 1)
    answered = sdk.model_versions.get_by_alias("dev.of_sdk.line", "champion", include_aliases=True)
    assert (answered.version, answered.status.value, answered.aliases[0].alias_name) == (1, "READY", "champion")
    assert sdk.registered_models.get("dev.of_sdk.line", include_aliases=True).aliases[0].version_num == 1
    assert sdk.registered_models.get("dev.of_sdk.line").aliases == []
    listed = sdk.registered_models.list(catalog_name="dev", schema_name="of_sdk")
    assert [model.full_name for model in listed] == [created.full_name]
    assert [row.version for row in sdk.model_versions.list("dev.of_sdk.line", max_results=1)] == [1]
    sdk.model_versions.update("dev.of_sdk.line", 1, comment="first")
    assert sdk.model_versions.get("dev.of_sdk.line", 1).comment == "first"
    assert sdk.registered_models.update("dev.of_sdk.line", comment="changed").comment == "changed"
    sdk.registered_models.delete_alias("dev.of_sdk.line", "champion")
    sdk.model_versions.delete("dev.of_sdk.line", 1)
    assert list(sdk.model_versions.list("dev.of_sdk.line")) == []
    sdk.registered_models.delete("dev.of_sdk.line")
    refused("RESOURCE_DOES_NOT_EXIST", "Routine or Model", sdk.registered_models.get, "dev.of_sdk.line")
    refused("PERMISSION_DENIED", "MODIFY", home.sdk("ci").registered_models.delete, NAME)


FUZZED = "dev.fuzz.line"
BODIES = ([], None, {"name": 1}, {"name": "a"}, {"name": "\ud800.a.b"}, {"name": "dev.a.\x00"},
          {"name": f"{FUZZED}'; --"}, {"name": FUZZED, "version": [1]},
          {"name": FUZZED, "version": "1" * 40}, {"name": FUZZED, "version": -1},
          {"name": FUZZED, "version": "1", "key": "", "value": ""}, {"name": FUZZED, "tags": [{"key": "a/b"}]},
          {"name": FUZZED, "tags": {"a": 1}}, {"name": FUZZED, "source": "models:/m-1", "run_id": "x" * 99},
          {"name": FUZZED, "alias": "../x", "version": "1", "unknown": {}})


def test_no_body_is_an_error_of_the_workspace(home, version):
    from mlops_nb.workspace.rest_registry import UC_CALLS
    home.mlflow().create_registered_model(FUZZED)
    home.pending(FUZZED)
    with httpx.Client(trust_env=False, timeout=60, headers={"Authorization": "Bearer ann"}) as client:
        for method, path, _ in UC_CALLS:
            for body in BODIES:
                content = json.dumps(body)
                query = {key: str(value) for key, value in body.items() if "\ud800" not in str(value)} \
                    if isinstance(body, dict) else {"max_results": content}
                options = {"params": query} if method == "GET" else {"content": content}
                answer = client.request(method, f"{home.host}/api/2.0/mlflow/unity-catalog/{path}", **options)
                expected = {200, 400, 403, 404, 409} | ({501} if "credentials" in path else set())
                assert answer.status_code in expected, (path, body, answer.text)
        for content in (b"{", b"[" * 100_000, b"\xff"):
            assert client.post(f"{home.host}/api/2.0/mlflow/unity-catalog/model-versions/create",
                               content=content).status_code == 400
    assert home.call("POST", "prompts/create", json={}).status_code == 501


def test_clean_keeps_the_files_of_versions_and_removes_the_others(home, version):
    orphan = version_files(home.env.state) / "dev/flights/line/7-0123abcd"
    of_other_target = version_files(home.env.state) / "prod/flights/line/7-0123abcd"
    for folder in (orphan, of_other_target):
        folder.mkdir(parents=True)
        (folder / "MLmodel").touch()
    plan = plan_version_files(home.env.state, 4 * 10**12, home.env.can_write)
    assert [removal.path for removal in plan.removals] == [orphan]
    assert not plan_version_files(home.env.state, 0, home.env.can_write).removals  # younger than the period


def test_a_store_with_uris_has_paths_since_the_client_would_delete_the_files(home, version):
    folder = home.env.state / "artifacts/dev/a b"
    experiment = home.local.create_experiment("/dev/uri", artifact_location=folder.as_uri())
    assert use_paths(home.env.state) == 1 and use_paths(home.env.state) == 0
    assert home.local.get_experiment(experiment).artifact_location == str(folder)
    logged = home.local.get_logged_model(home.model.rpartition("/")[2])  # registered many times by now
    assert (local_path(logged.artifact_location) / "MLmodel").exists()


def test_a_moved_state_has_its_versions(home, version, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(home.env.state, copy)
    use_here(copy)
    env = env_of(copy)
    uri = client_of(env).get_model_version_download_uri(NAME, 1)
    assert local_path(uri).is_relative_to(copy) and (local_path(uri) / "MLmodel").is_file()
    with registry_server(env) as host:
        answer = httpx.get(f"{host}/api/2.0/fs/files/Models/dev/flights/line/1/MLmodel", trust_env=False, timeout=60,
                           headers={"Authorization": "Bearer ann"})
    assert answer.status_code == 200 and "flavors" in answer.text
