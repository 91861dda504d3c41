"""The bundle as the Databricks CLI deploys it for the first time, into a workspace that has only the catalogs."""
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlops_nb import identity, task
from mlops_nb.bundle.checks import check
from mlops_nb.bundle.load import as_deployed, load_bundle
from mlops_nb.deployment import aliases
from mlops_nb.env import folder_env, load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features.functions import SAMPLES, calls_per_row, create_function_sql, declare_function
from mlops_nb.flights.feature_engineering import REQUEST_FUNCTIONS
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.jobs.tasks import nested_tasks
from mlops_nb.models import evidence, registry

ROOT = Path(__file__).parents[2]
TARGETS = ("dev", "staging", "prod")
EXPLORATION = {"eda", "automl"}


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request): return load_bundle(ROOT, request.param)


def test_nothing_waits_for_a_table_that_does_not_exist_yet(bundle):
    assert not check(bundle)
    for job in bundle.jobs.values(): assert "table_update" not in (job.get("trigger") or {})
    schema = bundle.data["resources"]["schemas"]["project"]
    assert (schema["catalog_name"], schema["name"]) == (bundle.target, "flights")


def test_only_the_deploying_identity_and_the_owners_can_change_production(bundle):
    workspace, is_dev = bundle.data["workspace"], bundle.target == "dev"
    assert workspace["root_path"].startswith("/Workspace/Users/") and "/Shared/" not in workspace["root_path"]
    assert bundle.data["bundle"]["mode"] == ("development" if is_dev else "production")
    levels = {item["group_name"]: item["level"] for item in bundle.data.get("permissions", [])}
    assert levels == ({} if is_dev else {"ml_engineers": "CAN_MANAGE", "data_scientists": "CAN_VIEW"})


def test_exploration_is_deployed_in_dev_only(bundle):
    assert EXPLORATION & set(bundle.jobs) == (EXPLORATION if bundle.target == "dev" else set())
    if bundle.target == "dev": return
    with pytest.raises(MlopsError, match=f"target '{bundle.target}' has no job 'automl': only dev has it\n.*-t dev"):
        bundle.job("automl")


def test_serverless_tasks_have_an_environment_that_has_what_they_import(bundle):
    for job in bundle.jobs.values():
        notebooks = [each for each in nested_tasks(job) if "notebook_task" in each]
        assert all(each["environment_key"] == "default" and each["libraries"] == [] for each in notebooks)
        for environment in job.get("environments", []):
            spec = environment["spec"]
            assert spec["environment_version"] == "5"
            assert {"./dist/*.whl", "databricks-feature-engineering>=0.13,<0.19"} <= set(spec["dependencies"])
    assert bundle.data["artifacts"]["wheel"]["dynamic_version"] is True
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not any("feature-engineering" in line or "databricks-connect" in line for line in core)


def test_a_cluster_of_its_own_replaces_serverless_compute_in_every_task():
    loaded = load_bundle(ROOT, "prod", {"cluster_id": "0101-abc"})
    for job in loaded.jobs.values():
        for each in nested_tasks(job):
            assert "environment_key" not in each
            if "notebook_task" in each: assert each["existing_cluster_id"] == "0101-abc"
    assert not check(loaded)


def test_notebooks_and_their_files_are_uploaded_and_tests_are_not(bundle):
    excluded = [pattern.removesuffix("/**") for pattern in bundle.data["sync"]["exclude"]]
    assert {"tests", "benchmarks"} <= set(excluded)
    needed = {"databricks.yml", "resources", "conf", "nbs", "mlops_nb"}
    assert not needed & set(excluded) and all((ROOT / name).exists() for name in needed)


def test_every_notebook_gets_what_only_the_deployment_knows(bundle):
    for key, job in bundle.jobs.items():
        if all("notebook_task" not in each for each in nested_tasks(job)): continue
        defaults = {parameter["name"]: parameter["default"] for parameter in job["parameters"]}
        settings = json.loads(defaults["settings"])
        assert settings["target"] == bundle.target and settings["git_sha"] == bundle.variables["git_sha"], key
        assert set(settings) - {"target", "user"} <= set(bundle.variables)
        assert "secrets/" not in defaults["settings"]
    assert bundle.variables["git_sha"] == evidence.code_version(load_env(bundle.target, root=ROOT))["git_sha"]


def deployed_env(monkeypatch, requested="dev", **settings):  # requested: by the notebook's parameter
    text = json.dumps({"target": "dev"} | settings)
    monkeypatch.setattr(task, "widget", lambda name, default: text if name == "settings" else default)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    return load_env(requested, root=ROOT)


def test_a_deployed_notebook_uses_the_values_of_its_deployment(monkeypatch):
    env = deployed_env(monkeypatch, schema="dev_ana_flights", source_schema="flights", source_catalog="prod",
                       git_sha="0a1b2c", git_branch="release/2", git_dirty="false", user="ana@example.org",
                       experiments="/Workspace/Users/ana@example.org/x/")
    assert env.table("plane") == "dev.dev_ana_flights.plane" and env.source_table("plane") == "prod.flights.plane"
    assert env.experiment("late_arrival") == "/Users/ana@example.org/x/late_arrival"
    assert evidence.code_version(env) == {"git_sha": "0a1b2c", "git_dirty": "false", "git_branch": "release/2"}
    own = deployed_env(monkeypatch, schema="dev_ana_flights", source_schema="flights", user="ana@example.org")
    assert own.source_table("plane") == "dev.dev_ana_flights.plane"
    assert own.experiment("late_arrival") == "/Users/ana@example.org/mlops_nb/dev/late_arrival"


@pytest.mark.parametrize("target", TARGETS)
def test_the_notebooks_use_the_names_that_the_deployment_makes(target, monkeypatch):
    "In every mode: development mode changes names of resources."
    deployed = as_deployed(load_bundle(ROOT, target, user="ana@example.org"))
    settings, resources = json.loads(deployed.variables["settings"]), deployed.data["resources"]
    assert settings == json.loads(deployed.jobs["train"]["parameters"][-1]["default"])
    env = deployed_env(monkeypatch, target, **settings)
    schema = resources["schemas"]["project"]
    assert env.table("plane") == f"{schema['catalog_name']}.{schema['name']}.plane"
    assert schema["name"] == ("dev_ana_flights" if target == "dev" else "flights")
    for model in resources.get("registered_models", {}).values():
        assert env.model(FLIGHTS.model) == f"{model['catalog_name']}.{model['schema_name']}.{model['name']}"
    for experiment in resources.get("experiments", {}).values():
        assert env.experiment(FLIGHTS.model) == experiment["name"]


def test_a_job_of_one_target_refuses_another_and_says_what_its_settings_lack(monkeypatch):
    with pytest.raises(MlopsError, match="this job is deployed for target 'dev'\n.*deploy -t prod"):
        deployed_env(monkeypatch, "prod")
    with pytest.raises(MlopsError, match="no variable 'scheme'"): deployed_env(monkeypatch, scheme="x", user="a")


def test_without_any_commit_a_sentence_says_so(tmp_path, monkeypatch, capsys):
    folders = []
    repos = SimpleNamespace(list=lambda path_prefix: folders)
    monkeypatch.setattr(identity, "workspace", lambda: SimpleNamespace(repos=repos))
    env = replace(folder_env(tmp_path), home="databricks")
    assert evidence.code_version(env)["git_dirty"] == "unknown"
    assert "The commit of the code is unknown" in capsys.readouterr().out
    folders.append(SimpleNamespace(path=str(tmp_path), head_commit_id="0a1b2c"))
    assert evidence.code_version(env)["git_sha"] == "0a1b2c"


class Page(list):
    token = None


class Pages:
    "An MLflow client whose pages hold one model, and the second page none."

    def __init__(self): self.pages = [["dev.flights.a"], [], ["dev.flights.b"]]

    def search_registered_models(self, page_token="0"):
        number = int(page_token)
        page = Page(SimpleNamespace(name=name) for name in self.pages[number])
        page.token = str(number + 1) if number + 1 < len(self.pages) else None
        return page

    def search_model_versions(self, filter_string, page_token="0"):
        page = Page([SimpleNamespace(version=str(int(page_token) + 1), run_id=page_token)])
        page.token = str(int(page_token) + 1) if int(page_token) < 2 else None
        return page


def test_all_pages_of_the_registry_are_read(tmp_path, monkeypatch):
    env = folder_env(tmp_path)
    monkeypatch.setattr(registry, "has_registry", lambda env: True)
    monkeypatch.setattr(registry, "client", lambda env: Pages())
    assert registry.model_names(env) == ["dev.flights.a", "dev.flights.b"]
    assert registry.version_numbers(env, "dev.flights.a") == [1, 2, 3]


def test_the_folder_of_an_experiment_is_made_before_the_experiment(tmp_path, monkeypatch):
    from databricks.sdk.errors import PermissionDenied
    calls = []
    variables = {"experiments": "/Workspace/Users/a/flights"}
    env = replace(folder_env(tmp_path), tracking_uri="databricks", variables=variables)
    mlflow = SimpleNamespace(get_experiment_by_name=lambda name: None,
                             create_experiment=lambda name, artifact_location: calls.append(name) or "7")
    monkeypatch.setattr(registry, "client", lambda env: mlflow)
    monkeypatch.setattr(registry, "workspace", lambda: SimpleNamespace(workspace=SimpleNamespace(mkdirs=calls.append)))
    assert registry.experiment_id(env, "late") == "7" and calls == ["/Users/a/flights", "/Users/a/flights/late"]
    def refuse(folder): raise PermissionDenied("no")
    monkeypatch.setattr(registry, "workspace", lambda: SimpleNamespace(workspace=SimpleNamespace(mkdirs=refuse)))
    with pytest.raises(MlopsError, match="folder /Users/a/flights .* cannot be created: no\n.*variable experiments"):
        registry.experiment_id(env, "late")


def test_the_user_of_the_workspace_moves_an_alias(tmp_path):
    spark = SimpleNamespace(sql=lambda text: SimpleNamespace(collect=lambda: [["ana@example.org"]]))
    env = folder_env(tmp_path)
    assert aliases.acting_user(spark, replace(env, engine="databricks")) == "ana@example.org"
    assert aliases.acting_user(spark, env) == identity.running_user() != "ana@example.org"


@pytest.mark.parametrize("function", REQUEST_FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_of_unity_catalog_does_little_work_for_each_row(function):
    declared = declare_function(f"dev.flights.{function.__name__}", function, REQUEST_FUNCTIONS[function])
    assert calls_per_row(declared, {name: SAMPLES[kind][0] for name, kind in declared.parameters.items()}) < 100
    first = next(iter(declared.parameters))
    assert f"(`{first}` " in create_function_sql(declared)


def test_what_the_template_declares_is_what_this_project_declares():
    template = (ROOT / "template/databricks.yml.jinja").read_text()
    for name in ("online_store", "git_sha", "settings", "experiments", "cluster_id", "libraries", "source_schema",
                 "deployment_job", "workers", "owners", "service_principal", "run_as"):
        assert f"\n  {name}:\n" in template, name
    assert 'environment_version: "5"' in template and "/Workspace/Shared" not in template
    jobs = list((ROOT / "template/resources").glob("*.job.yml*"))
    assert len(jobs) > 8 and not any("table_update:" in path.read_text() for path in jobs)
    for name in ("explore", "automl"):
        assert "\ntargets:\n  dev:\n    resources:" in (ROOT / f"template/resources/{name}.job.yml").read_text()


def test_validate_warns_of_what_stops_a_first_deployment(tmp_path):
    (tmp_path / "databricks.yml").write_text("""
bundle: {name: small}
variables: {catalog: {default: prod}, schema: {default: shop}}
resources:
  jobs:
    a:
      trigger: {table_update: {table_names: ["${var.catalog}.${var.schema}.sales", other.shop.sales]}}
      tasks: [{task_key: a, condition_task: {left: "1", op: EQUAL_TO, right: "1"}}]
targets: {prod: {mode: production, workspace: {root_path: /Workspace/Shared/.bundle/small}}}
""")
    first, second = check(load_bundle(tmp_path))
    assert first.is_warning and "every user of the workspace can change" in first.message
    assert second.is_warning and second.line == 7
    assert second.message == "the first deployment fails unless table prod.shop.sales exists"
