"""`mlops doctor --databricks`: each step against a workspace of documented answers, with the real databricks-sdk."""
import re
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from fake_databricks import USER, Databricks
from fake_workspace import TOKEN, FakeWorkspace, error
from typer.testing import CliRunner

from mlops_nb import cli, databricks_checks, folder_checks, mlflow_access, runtime_checks, workspace_steps
from mlops_nb.bundle.load import load_bundle
from mlops_nb.doctor import CheckResult
from mlops_nb.errors import MlopsError
from mlops_nb.workspace_steps import CheckStep, WorkspaceProbe, run_steps, step_results

ROOT = Path(__file__).parents[2]
SCHEMA, FOLDER = "dev.dev_ann_flights", f"/Users/{USER}/.bundle/mlops_nb/dev"
EXPERIMENTS = f"/Users/{USER}/mlops_nb/dev"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    "The bundle with one job, without a login of the person who runs the tests."
    for name in ("databricks.yml", "pyproject.toml", "resources/smoke.job.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE", "DATABRICKS_CONFIG_FILE",
                 "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def answer_as(machine, is_local: bool) -> None:
    "Let the fake, which listens on this machine, stand for a workspace of Databricks or for `mlops up`."
    for module in (mlflow_access, workspace_steps):
        machine.setattr(module, "is_local_workspace", lambda host: is_local)


@pytest.fixture
def workspace(machine):
    "A fake that stands for a workspace of Databricks; `local_workspace` stands for `mlops up`."
    answer_as(machine, is_local=False)
    with FakeWorkspace(Databricks()) as server:
        machine.setenv("DATABRICKS_HOST", server.address)
        machine.setenv("DATABRICKS_TOKEN", TOKEN)
        yield server.endpoints


@pytest.fixture
def local_workspace(workspace, machine):
    "The same fake as `mlops up`."
    answer_as(machine, is_local=True)
    return workspace


def results_of(write: bool = False, target: str = "dev", seconds: float = 10) -> dict[str, CheckResult]:
    "All steps; the results by subject."
    return {result.subject: result for result in databricks_checks.workspace_checks(target, write, seconds=seconds)}


def probe_of(target: str = "dev", **variables) -> workspace_steps.WorkspaceProbe:
    "A probe that has passed the steps project, address and token."
    probe = workspace_steps.WorkspaceProbe(target=target)
    for check in (databricks_checks.check_bundle, workspace_steps.check_host, databricks_checks.check_user):
        assert all(result.state == "ok" for result in check(probe))
    if variables: probe.bundle = load_bundle(target=target, variables=variables, user=USER, deployed=True)
    return probe


def texts(results) -> str:
    "For the message of an assertion."
    return "\n".join(f"{result.state}: {result.observation}\n{result.hint}" for result in results)


def test_a_workspace_that_is_ready_and_no_request_writes(workspace):
    results = results_of()
    assert {subject: result.state for subject, result in results.items()} == {
        "project": "ok", "address": "ok", "token": "ok", "catalog dev": "ok", "catalog staging": "ok",
        "catalog prod": "ok", f"schema {SCHEMA}": "ok", "folder": "ok", "experiments": "ok",
        "environment default": "ok", "warehouse": "missing", "feature client": "ok", "registry": "ok",
        "serving": "ok", "jobs": "ok", "secrets": "ok"}, texts(results.values())
    assert results["token"].observation == f"{USER}, groups: users, data_scientists"
    assert "does not exist yet; the deployment creates it" in results[f"schema {SCHEMA}"].observation
    assert {method for method, _ in workspace.calls} == {"GET"}


def test_write_leaves_nothing_and_says_what_it_wrote(workspace):
    objects, schemas = dict(workspace.objects), dict(workspace.schemas)
    results = results_of(write=True)
    wrote = results["write folder"].observation
    assert re.fullmatch(rf"created /Users/{USER}/.bundle, .*, {FOLDER}; wrote ({FOLDER}/mlops-doctor-\w+.txt); removed "
                        rf"\1; removed {FOLDER}; removed .*; removed /Users/{USER}/.bundle", wrote), wrote
    assert results["write schema"].observation == f"created schema {SCHEMA}, and dropped it again"
    assert f"created experiment {EXPERIMENTS}/mlops-doctor-" in results["write experiment"].observation
    assert results["write experiment"].state == "ok" and results["write experiment"].observation.count("deleted") == 1
    assert (workspace.objects, workspace.schemas, workspace.experiments) == (objects, schemas, {})
    assert ("POST", "/api/2.1/unity-catalog/schemas") in workspace.calls


def test_write_touches_nothing_that_exists(workspace):
    workspace.objects |= {FOLDER: "DIRECTORY", EXPERIMENTS: "DIRECTORY"}
    workspace.schemas[SCHEMA] = USER
    before = dict(workspace.objects)
    results = results_of(write=True)
    assert results["write schema"].observation == f"nothing written: {SCHEMA} exists"
    assert results["write folder"].state == results["write experiment"].state == "ok" and workspace.objects == before
    assert ("DELETE", f"/api/2.1/unity-catalog/schemas/{SCHEMA}") not in workspace.calls


def test_a_write_that_fails_half_way_cleans_up_and_names_what_is_left(workspace):
    before = dict(workspace.objects)
    workspace.refused = ("/api/2.0/workspace/import", "/api/2.0/mlflow/experiments/delete")
    results = results_of(write=True)
    assert results["write folder"].state == results["write experiment"].state == "wrong"
    assert "no permission" in results["write folder"].observation and "removed" in results["write folder"].observation
    assert "databricks experiments delete-experiment 11" in results["write experiment"].hint
    assert workspace.objects == before


@pytest.mark.parametrize(("status", "body"), [
    (401, {"error_code": "401", "message": "Credential was not sent or was of an unsupported type for this API."}),
    (403, {"error_code": "403", "message": "Invalid access token."})])
def test_an_expired_token(workspace, machine, status, body):
    machine.setenv("DATABRICKS_TOKEN", "dapi-expired" if status == 401 else TOKEN)
    if status == 403: workspace.answers["/api/2.0/preview/scim/v2/Me"] = (status, body, {})
    results = results_of()
    assert "expired, revoked or of another workspace" in results["token"].observation
    assert "databricks auth login --host http://127.0.0.1" in results["token"].hint
    assert results["address"].state == "ok"
    later = [results[name] for name in ("catalog", "schema", "folder", "jobs", "secrets")]
    assert all(result.observation == "not tried, because token is wrong" for result in later)


def test_a_token_that_a_local_workspace_refuses(local_workspace, machine):
    machine.setenv("DATABRICKS_TOKEN", "dapi-of-another")
    assert results_of()["token"].hint.startswith('export DATABRICKS_TOKEN="$(cat .mlops/workspace/token)"')
    machine.setenv("MLOPS_STATE", "/data/my state")  # the state in use
    assert """="$(cat '/data/my state/workspace/token')",""" in results_of()["token"].hint
    machine.delenv("DATABRICKS_TOKEN")
    assert """="$(cat '/data/my state/workspace/token')",""" in results_of()["token"].hint


def test_a_token_of_another_target_of_a_local_workspace(local_workspace):
    local_workspace.grants["dev"], local_workspace.schemas["dev.flights"] = {}, "bob"
    local_workspace.refused = ("/api/2.1/unity-catalog/catalogs/dev",)
    result = results_of()["catalog dev"]
    assert result.state == "wrong" and result.hint.endswith("mlops up token NAME -t dev")
    local_workspace.refused = ()
    [missing] = folder_checks.check_experiments_folder(probe_of("prod"))
    assert "WorkspaceClient().workspace.mkdirs('/" in missing.hint


def test_a_token_is_missing(workspace, machine):
    machine.delenv("DATABRICKS_TOKEN")
    result = results_of()["token"]
    assert result.state == "wrong" and "there is no login" in result.observation
    assert "databricks auth login" in result.hint


def test_a_permission_that_is_lost_in_between_names_the_token(workspace):
    refusal = {"error_code": "403", "message": "Invalid access token."}
    workspace.answers["/api/2.0/workspace/get-status"] = (403, refusal, {})
    assert "expired" in results_of()["folder"].observation


def test_a_catalog_that_does_not_exist(workspace):
    del workspace.catalogs["dev"], workspace.catalogs["prod"]
    results = results_of()
    for name in ("dev", "prod"):
        assert results[f"catalog {name}"].state == "wrong"
        assert results[f"catalog {name}"].hint.startswith(f"databricks catalogs create {name}")
    assert results["schema"].observation == results["registry"].observation == "not tried, because catalog is wrong"
    assert results["folder"].state == "ok"


def test_a_local_workspace_has_the_names_of_this_machine(local_workspace):
    local_workspace.objects = {"/Shared": "DIRECTORY"}
    del local_workspace.catalogs["prod"]
    results = results_of()
    assert results["address"].observation.endswith(", a local workspace")
    assert results["schema dev.flights"].state == "ok"
    assert results["folder"].state == "ok" and results["catalog prod"].state == "wrong"
    assert results["catalog prod"].hint.startswith("name one that exists, in the variables catalog, read and write")
    [secret, _] = databricks_checks.check_secrets(probe_of(online_store="redis://h?password=secrets/a/b&u=secrets/a/c"))
    assert secret.hint.startswith("export MLOPS_SECRET") and "mlops up" in secret.hint


def test_no_use_of_a_catalog_and_no_right_to_create_the_schema(workspace):
    workspace.grants["prod"] = {"someone": ["ALL_PRIVILEGES"]}
    workspace.grants["dev"] = {USER: ["USE_CATALOG"]}
    results = results_of()
    assert "GRANT USE CATALOG ON CATALOG `prod` TO `data_scientists`;" in results["catalog prod"].hint
    assert results["catalog dev"].state == "ok"
    assert "lacks CREATE SCHEMA on dev" in results[f"schema {SCHEMA}"].observation
    assert "GRANT CREATE SCHEMA ON CATALOG `dev` TO `data_scientists`;" in results[f"schema {SCHEMA}"].hint
    workspace.groups = []
    assert "TO `ann@example.com`;" in results_of()[f"schema {SCHEMA}"].hint


@pytest.mark.parametrize("granted", [{"account users": ["ALL_PRIVILEGES"]}, {USER: ["USE_CATALOG", "CREATE_SCHEMA"]}])
def test_privileges_of_everybody_and_of_the_user(workspace, granted):
    workspace.grants["dev"] = granted
    assert results_of()[f"schema {SCHEMA}"].state == "ok"


def test_the_owner_needs_no_grant(workspace):
    workspace.grants, workspace.catalogs = {}, dict.fromkeys(workspace.catalogs, "data_scientists")
    results = results_of()
    assert results["catalog dev"].observation.startswith("exists, owner data_scientists")
    assert results[f"schema {SCHEMA}"].state == "ok"


def test_a_catalog_that_refuses(workspace):
    workspace.refused = ("/api/2.1/unity-catalog/catalogs/dev",)
    result = results_of()["catalog dev"]
    assert result.state == "wrong" and result.observation.startswith("no permission: User ann@example.com may not")
    assert "GRANT USE CATALOG ON CATALOG `dev`" in result.hint


def test_a_schema_of_another_user(workspace):
    workspace.schemas |= {SCHEMA: "bob@example.com", "prod.flights": "ml_engineers"}
    workspace.grants["prod.flights"] = {"data_scientists": ["USE_SCHEMA", "EXECUTE"]}
    results = results_of()
    assert "lacks USE SCHEMA, CREATE TABLE, CREATE MODEL" in results[f"schema {SCHEMA}"].observation
    assert "lacks SELECT on prod.flights" in results["schema prod.flights"].observation
    assert "GRANT SELECT ON SCHEMA `prod`.`flights` TO `data_scientists`;" in results["schema prod.flights"].hint


def test_a_schema_that_no_deployment_made(workspace):
    workspace.schemas[SCHEMA] = USER
    result = results_of()[f"schema {SCHEMA}"]
    assert (result.state, result.hint) == ("ok", f"databricks bundle deployment bind project {SCHEMA} -t dev")
    workspace.objects[FOLDER] = "DIRECTORY"
    assert results_of()[f"schema {SCHEMA}"].observation == f"exists, owner {USER}"


def test_a_workspace_without_unity_catalog(workspace):
    workspace.answers["/api/2.1/unity-catalog/catalogs/dev"] = (404, {
        "error_code": "METASTORE_DOES_NOT_EXIST", "message": "No metastore assigned for the current workspace."}, {})
    assert "no metastore" in results_of()["catalog dev"].observation


def test_the_folder_of_the_experiments_must_exist_where_the_bundle_has_an_experiment(workspace):
    probe = probe_of("prod")
    [missing] = folder_checks.check_experiments_folder(probe)
    path = f"/Users/{USER}/mlops_nb/prod"
    assert (missing.state, missing.hint) == ("wrong", f"databricks workspace mkdirs {path}")
    workspace.objects[path] = "DIRECTORY"
    assert [result.state for result in folder_checks.check_experiments_folder(probe)] == ["ok"]


def test_folders_that_cannot_be_created(workspace):
    probe = probe_of(experiments="/Users/bob@example.com/mlops_nb")
    [other] = folder_checks.check_experiments_folder(probe)
    assert other.state == "wrong" and "the home folder /Users/bob@example.com does not exist" in other.observation
    workspace.objects[f"/Users/{USER}/.bundle"] = "FILE"
    [file] = folder_checks.check_deployment_folder(probe)
    assert file.state == "wrong" and "is a file, not a folder" in file.observation
    assert f"databricks workspace delete /Users/{USER}/.bundle" in file.hint


def test_a_folder_that_only_others_may_write(workspace):
    workspace.answers["/api/2.0/permissions/directories/7"] = (200, {"access_control_list": [
        {"group_name": "admins", "all_permissions": [{"permission_level": "CAN_MANAGE"}]},
        {"group_name": "users", "all_permissions": [{"permission_level": "CAN_READ"}]}]}, {})
    [result] = folder_checks.check_experiments_folder(probe_of(experiments="/Shared/mlops"))
    assert (result.state, result.observation) == ("wrong", f"{USER} may not write /Shared")


@pytest.mark.parametrize(("host", "message", "hint"), [
    ("shop.cloud.databricks.com", "begins with https://", "export DATABRICKS_HOST=https://shop.cloud.databricks.com"),
    ("http://shop.cloud.databricks.com", "begins with https://", "export DATABRICKS_HOST=https://shop.cloud"),
    ("https://adb-7.azuredatabricks.net/?o=7#job/3", "address of a page",
     "export DATABRICKS_HOST=https://adb-7.azuredatabricks.net,"),
    ("https://accounts.cloud.databricks.com", "account console", "databricks auth login"),
    ("http://127.0.0.1:9", "no workspace answers", "start the local workspace: mlops up"),
    ("https://127.0.0.1:9", "no workspace answers", "correct DATABRICKS_HOST"),
    ("127.0.0.1:9", "begins with http://", "export DATABRICKS_HOST=http://127.0.0.1:9"),
    ("", "no workspace is set", "databricks auth login --host")])
def test_an_address_that_is_wrong(machine, host, message, hint):
    machine.setenv("DATABRICKS_HOST", host)
    machine.setenv("DATABRICKS_TOKEN", "dapi")
    results = results_of()
    assert results["address"].state == "wrong" and message in results["address"].observation
    assert hint in results["address"].hint
    assert results["token"].observation == results["jobs"].observation == "not tried, because address is wrong"


class Page(BaseHTTPRequestHandler):
    def log_message(self, *_): ...

    def do_GET(self):
        status, kind, text = self.server.page
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def page(status: int, kind: str, text: str):
    "A server that answers everything with one page."
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        server.page = (status, kind, text)
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_local_workspace_speaks_http(machine):
    with page(200, "text/html", "") as address:
        machine.setenv("DATABRICKS_HOST", address.replace("http://", "https://"))
        machine.setenv("DATABRICKS_TOKEN", "word")
        result = results_of()["address"]
        assert f"answers HTTP, not HTTPS: export DATABRICKS_HOST={address}" in result.hint, texts([result])
        with pytest.raises(MlopsError) as error: mlflow_access.check_workspace()
        assert error.value.hint == result.hint


@pytest.mark.parametrize(("status", "kind", "text", "shown"), [
    (200, "text/html; charset=utf-8", "<html><title>Log\n in</title>", "HTTP 200, text/html, page 'Log in'"),
    (404, "application/json", '{"detail": "Not Found"}', "HTTP 404, application/json"),
    (503, "text/plain", "busy", "HTTP 503, text/plain")])
def test_something_else_answers(machine, status, kind, text, shown):
    with page(status, kind, text) as address:
        machine.setenv("DATABRICKS_HOST", address)
        machine.setenv("DATABRICKS_TOKEN", "dapi")
        result = results_of()["address"]
    assert result.state == "wrong" and result.observation.endswith(f"answers at {address}: {shown}")


@pytest.mark.slow
def test_a_slow_host_ends_in_time(workspace):
    probe, begin = probe_of(), time.monotonic()
    workspace.delay, probe.seconds = 1.5, 0.2
    probe.client = workspace_steps.make_client(probe, TOKEN)
    [jobs] = step_results(CheckStep("jobs", databricks_checks.check_jobs_of_workspace), probe)
    [serving] = step_results(CheckStep("serving", lambda probe: [time.sleep(9)]), probe, 0.2)
    assert jobs.state == serving.state == "wrong" and time.monotonic() - begin < 5
    assert "no answer within 0.2 s" in jobs.observation and "does not answer within 0.2 s" in serving.observation


@pytest.mark.slow
def test_a_workspace_that_is_busy_is_not_waited_for(workspace):
    busy = error(429, "REQUEST_LIMIT_EXCEEDED", "too many requests")[:2]
    workspace.answers["/api/2.2/jobs/list"] = (*busy, {"Retry-After": "60"})
    [jobs] = step_results(CheckStep("jobs", databricks_checks.check_jobs_of_workspace), probe_of())
    assert (jobs.state, jobs.observation) == ("wrong", "the workspace cannot answer now: too many requests")


def test_an_address_that_accepts_a_connection_and_never_answers(machine):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        machine.setenv("DATABRICKS_TOKEN", "dapi")
        result = results_of(seconds=0.2)["address"]
    assert result.state == "wrong" and "no workspace answers" in result.observation


def test_a_login_of_another_workspace_than_the_target_deploys_to(workspace):
    probe = workspace_steps.WorkspaceProbe(target="dev")
    assert [*databricks_checks.check_bundle(probe)][0].state == "ok"
    probe.bundle.data["workspace"]["host"] = "https://shop.cloud.databricks.com"
    [result] = workspace_steps.check_host(probe)
    assert result.state == "wrong" and "target dev deploys to https://shop.cloud.databricks.com" in result.observation


def test_what_a_local_workspace_does_not_have_is_not_wrong(local_workspace):
    local_workspace.absent = ("/api/2.1/unity-catalog/effective-permissions", "/api/2.0/sql", "/api/2.0/workspace",
                              "/api/2.0/mlflow/unity-catalog", "/api/2.0/mlflow/experiments")
    results = results_of(write=True)
    for name in ("folder", "experiments", "warehouse", "registry"):
        assert (results[name].state, results[name].observation) == ("missing", "not in a local workspace")
    assert results["write folder"].state == results["write experiment"].state == "missing"
    local_workspace.absent = ("/api/2.1/unity-catalog",)
    assert results_of(write=True)["write schema"].observation.endswith("may exist, which is not known here")
    assert all(result.state != "wrong" for result in results.values()), texts(results.values())


def environment(version: str, *lines: str) -> dict:
    spec = {"environment_version": version, "dependencies": ["./dist/*.whl", *lines]}
    return {"environment_key": "default", "spec": spec}


@pytest.mark.parametrize(("item", "state", "message"), [
    (environment("5", "lightgbm==4.7.0", "mlflow>=3.8,<3.9"), "ok", "version 5: Python 3.12.3, MLflow 3.8.1"),
    (environment("4"), "wrong", "needs mlflow<4,>=3.0.1, and environment version 4 has 2.22.0"),
    (environment("1"), "wrong", "needs python>=3.11, and environment version 1 has 3.10.12"),
    (environment("5", "lightgbm==3.3.5"), "wrong", "needs lightgbm<5,>=4.3, and the environment has 3.3.5"),
    (environment("5", "mlflow>=3.10"), "wrong", "pip replaces MLflow 3.8.1"),
    (environment("99"), "missing", "version 99 is not known here"),
    (environment(""), "wrong", "no environment_version"),
    ({"environment_key": "default", "spec": {"environment_version": "5"}}, "wrong", "installs no wheel")])
def test_serverless_environments(item, state, message):
    result = runtime_checks.check_one_environment(item, runtime_checks.wheel_requirements(ROOT))
    assert (result.subject, result.state) == ("environment default", state) and message in result.observation
    if "environment version" in message or not message: assert 'environment_version: "5"' in result.hint


@pytest.mark.parametrize(("cluster", "state", "message"), [
    ({"state": "TERMINATED", "spark_version": "18.0.x-cpu-ml-scala2.13"}, "ok", "TERMINATED, runtime 18.0.x-cpu-ml"),
    ({"state": "RUNNING", "spark_version": "15.4.x-cpu-ml-scala2.12"}, "wrong", "needs mlflow<4,>=3.0.1"),
    ({"state": "RUNNING", "spark_version": "10.4.x-scala2.12"}, "missing", "not known here"),
    ({"state": "ERROR", "state_message": "no quota", "spark_version": "18.0.x-scala2.13"}, "wrong", "ERROR: no quota"),
    (None, "wrong", "Cluster c1 does not exist")])
def test_the_cluster_of_the_target(workspace, cluster, state, message):
    if cluster: workspace.clusters["c1"] = cluster
    probe = probe_of(cluster_id="c1")
    result, libraries = runtime_checks.check_compute_of_jobs(probe)
    assert libraries.state == "wrong" and "without a wheel, such as smoke" in libraries.observation
    assert (result.subject, result.state) == ("cluster c1", state) and message in result.observation


@pytest.mark.parametrize(("line", "store", "state", "message"), [
    ("databricks-feature-engineering>=0.13,<0.19", "", "ok", "installed by the jobs"),
    ("databricks_feature_engineering>=0.12", "", "missing", "admits a version without online stores"),
    ("databricks-feature-engineering", "shop", "wrong", "admits a version without online stores"),
    ("lightgbm", "", "wrong", "no environment installs databricks-feature-engineering")])
def test_the_feature_client_that_the_jobs_install(line, store, state, message):
    bundle = load_bundle(ROOT, "dev")
    jobs = {"train": {"environments": [environment("5", line)], "tasks": []}}
    bundle = replace(bundle, data=bundle.data | {"resources": {"jobs": jobs}})
    result = runtime_checks.check_feature_package(bundle, bool(store))
    assert result.state == state and message in result.observation


def test_the_variable_feature_client_and_an_online_store(workspace):
    probe = probe_of(feature_client="mlops_nb", online_store="shop")
    client, store = runtime_checks.check_feature_client(probe)
    assert client.state == "ok" and (store.state, store.observation) == ("wrong", "shop does not exist")
    workspace.stores.append("shop")
    assert [*runtime_checks.check_feature_client(probe)][1].observation == "shop, AVAILABLE"
    misspelt = next(iter(runtime_checks.check_feature_client(probe_of(feature_client="databrics"))))
    assert misspelt.state == "wrong" and "did you mean 'databricks'" in misspelt.hint


def test_warehouses(workspace):
    probe = probe_of()
    probe.bundle.data["resources"]["dashboards"] = {"late": {"warehouse_id": "w1"}}
    [result] = databricks_checks.check_warehouses(probe)
    assert result.state == "wrong" and "dashboards.late needs warehouse w1; there are: none" in result.observation
    workspace.warehouses = [{"id": "w1", "name": "Small"}]
    [result] = databricks_checks.check_warehouses(probe)
    assert (result.state, result.observation) == ("ok", "Small; 1 resource of the bundle needs one")


def test_secrets_that_the_bundle_names(workspace):
    workspace.secrets["online"] = ["host"]
    probe = probe_of(online_store="postgresql://me@h/db?password=secrets/online/postgres&token=secrets/other/key")
    results = [*databricks_checks.check_secrets(probe)]
    assert [result.hint for result in results] == [
        "databricks secrets put-secret online postgres",
        "databricks secrets create-scope other, then databricks secrets put-secret other key"]
    workspace.secrets |= {"online": ["postgres"], "other": ["key"]}
    assert [result.state for result in databricks_checks.check_secrets(probe)] == ["ok", "ok"]


@pytest.mark.parametrize(("path", "subject", "hint"), [
    ("/api/2.0/mlflow/unity-catalog", "registry", "mlops grants --sql"),
    ("/api/2.0/serving-endpoints", "serving", "a workspace admin"), ("/api/2.2/jobs", "jobs", "a workspace admin"),
    ("/api/2.0/sql/warehouses", "warehouse", "Databricks SQL access")])
def test_a_permission_that_is_missing(workspace, path, subject, hint):
    workspace.refused = (path,)
    results = results_of()
    assert results[subject].state == "wrong" and results[subject].observation.startswith("no permission")
    assert hint in results[subject].hint
    assert [name for name, result in results.items() if result.state == "wrong"] == [subject]


def test_the_command(workspace, machine):
    run = CliRunner().invoke(cli.app, ["doctor", "--databricks"], env={"COLUMNS": "80"})
    assert run.exit_code == 0 and f"{USER}, groups: users" in run.output, run.output
    assert {method for method, _ in workspace.calls} == {"GET"}
    machine.setenv("DATABRICKS_HOST", "shop.cloud.databricks.com")
    run = CliRunner().invoke(cli.app, ["doctor", "--databricks", "-t", "prod"], env={"COLUMNS": "80"})
    assert run.exit_code == 1 and "export DATABRICKS_HOST=https://shop.cloud.databricks.com" in run.output
    last = run.output.splitlines()[-1]
    assert "13 further steps are not tried, because address is wrong: token, catalog, " in last, run.output
    assert run.output.count("not tried") == 1
    run = CliRunner().invoke(cli.app, ["doctor", "--databricks", "-t", "nowhere"])
    assert run.exit_code == 1 and "no target 'nowhere'" in run.output and "Traceback" not in run.output
    assert CliRunner().invoke(cli.app, ["doctor", "--write"]).exit_code != 0


def test_an_answer_of_another_form_is_one_printable_result_of_its_step():
    def other(probe): return [].catalogs  # as the SDK fails with an answer that is a list

    def terminal(probe): raise MlopsError("busy \x1b[2J\ud800\nlater", "wait \x07")

    steps = [CheckStep("token", other), CheckStep("folder", terminal)]
    token, folder = run_steps(steps, WorkspaceProbe(host="http://shop.example"))
    assert token.state == "wrong" and "http://shop.example answers something else than a workspace" in token.observation
    assert (folder.observation, folder.hint) == ("busy ?[2J?\nlater", "wait ?")
