"""Who may do what: the grants follow from the lists `read` and `write` of all targets."""
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from typer.testing import CliRunner

from mlops_nb.bundle.access import OWN, READ, WRITE, Access, access_of_all, expected_grants
from mlops_nb.bundle.checks import check
from mlops_nb.bundle.load import as_deployed, load_bundle, target_names
from mlops_nb.commands.app import app
from mlops_nb.errors import MlopsError

ROOT = Path(__file__).parents[3]
DEV = Access("dev", "dev", "shop", ("dev", "prod"), ("dev",), "scientists", "", "scientists")
PROD = Access("prod", "prod", "shop", ("prod",), ("prod",), "pipelines", "engineers", "robot")


def privileges(targets: list[Access], name: str, principal: str) -> set[str]:
    return {grant.privilege for grant in expected_grants(targets) if (grant.name, grant.principal) == (name, principal)}


def test_who_works_in_a_target_reads_what_it_reads_and_no_more():
    both = [DEV, PROD]
    assert privileges(both, "prod.shop", "scientists") == set(READ) and privileges(both, "prod", "scientists") == {
        "USE_CATALOG"}
    assert privileges(both, "dev", "scientists") == {"USE_CATALOG", "CREATE_SCHEMA"}
    assert privileges(both, "dev.shop", "pipelines") == privileges(both, "dev", "pipelines") == set()
    only_dev = [replace(DEV, read=("dev",)), PROD]
    assert privileges(only_dev, "prod.shop", "scientists") == privileges(only_dev, "prod", "scientists") == set()


def test_owners_own_every_target_but_that_of_development():
    both = [DEV, PROD]
    assert privileges(both, "prod.shop", "engineers") == set(OWN) and privileges(both, "dev.shop", "engineers") == set()
    assert privileges(both, "prod", "robot") == {"USE_CATALOG", "CREATE_SCHEMA"}


def test_who_writes_another_catalog_may_write_its_schema():
    sandbox = [replace(DEV, read=("dev", "sandbox"), write=("dev", "sandbox")), PROD]
    assert privileges(sandbox, "sandbox.shop", "scientists") == set(WRITE)
    assert "CREATE_SCHEMA" not in privileges(sandbox, "sandbox", "scientists")


def test_the_schema_is_that_of_the_target_that_owns_the_catalog():
    other = [DEV, replace(PROD, schema="shop_2")]
    assert privileges(other, "prod.shop_2", "scientists") == set(READ)


# ---- the YAML, of this project and of a new one

@pytest.fixture(scope="module", params=["this project", "a new project"])
def root(request, tmp_path_factory) -> Path:
    "The folder of a bundle whose files can be changed."
    folder = tmp_path_factory.mktemp("project")
    if request.param == "this project": text = (ROOT / "databricks.yml").read_text()
    else:
        text = (ROOT / "template/databricks.yml.jinja").read_text()
        values = {"package": "shop", "model | lower": "left", "model": "Left", "source": "data/a.csv"}
        for name, value in values.items():
            text = text.replace(f"[[ {name} ]]", value)
    (folder / "databricks.yml").write_text(text.replace("include:\n  - resources/*.yml\n", ""))
    return folder


@pytest.fixture
def file(root):
    "The file databricks.yml, which is as before after the test."
    path = root / "databricks.yml"
    text = path.read_text()
    yield path
    path.write_text(text)


def grants_of(resource: dict) -> dict[str, set[str]]:
    return {item["principal"]: set(item["privileges"]) for item in resource["grants"]}


def test_the_grants_of_every_target_are_those_of_the_lists(root):
    for target in target_names(root):
        loaded = load_bundle(root, target)
        assert not check(loaded)
        resources = loaded.data["resources"]
        name = f"{target}.{loaded.variables['schema']}"
        expected = {}
        for grant in expected_grants(access_of_all(loaded)):
            if grant.name == name: expected.setdefault(grant.principal, set()).add(grant.privilege)
        assert grants_of(resources["schemas"]["project"]) == expected and "data_scientists" in expected


def test_what_people_may_do_in_prod(root):
    resources = load_bundle(root, "prod").data["resources"]
    schema, model = (grants_of(resources[kind][key]) for kind, key in (("schemas", "project"),
                                                                       ("registered_models", "model")))
    assert schema["data_scientists"] == {"USE_SCHEMA", "SELECT", "EXECUTE"} and model["data_scientists"] == {"EXECUTE"}
    assert schema["ml_engineers"] == model["ml_engineers"] == {"ALL_PRIVILEGES", "MANAGE"}
    levels = {item["group_name"]: item["level"] for item in load_bundle(root, "prod").data["permissions"]}
    assert levels == {"data_scientists": "CAN_VIEW", "ml_engineers": "CAN_MANAGE"}  # of all jobs and experiments
    assert resources["experiments"]["experiment"]["name"].startswith("/Users/")
    assert resources["volumes"]["landing"]["schema_name"] == resources["schemas"]["project"]["name"]


def test_no_name_in_development_is_one_that_the_notebooks_do_not_use(root):
    loaded = load_bundle(root, "dev", user="ana@example.org")
    resources = as_deployed(loaded).data["resources"]
    schema = f"dev_ana_{loaded.variables['schema']}"
    assert resources["schemas"]["project"]["name"] == resources["volumes"]["landing"]["schema_name"] == schema
    assert "registered_models" not in resources and "experiments" not in resources
    prod = load_bundle(root, "prod", user="ana@example.org")
    assert as_deployed(prod).data == prod.data


READS, GROUPS = "      read: [dev, staging, prod]", ("ml_engineers", "data_scientists")
ENGINEERS, SCIENTISTS = ('{principal: "${var.%s}", privileges: [' % group for group in GROUPS)  # noqa: UP031
OF_SCHEMA = SCIENTISTS + "USE_SCHEMA, SELECT, EXECUTE]}\n            - {"
CHANGES = {  # old text, new text; message, text of the line, whether it is a warning
    "dev writes prod": (READS, READS + "\n      write: [dev, prod]",
                        "'data_scientists' lacks MODIFY, CREATE_TABLE, CREATE_FUNCTION, CREATE_MODEL, READ_VOLUME, "
                        "WRITE_VOLUME: target dev writes prod", "grants:", False),
    "fewer": (OF_SCHEMA, OF_SCHEMA.replace(", EXECUTE", ""), "'data_scientists' lacks EXECUTE: target dev reads prod",
              "grants:", False),
    "a writer": (OF_SCHEMA, OF_SCHEMA.replace("EXECUTE", "EXECUTE, MODIFY"),
                 "'data_scientists' has MODIFY, which no list read or write gives", "MODIFY", False),
    "a stranger": (SCIENTISTS + "EXECUTE]}", "{principal: analysts, privileges: [EXECUTE]}",
                   "'analysts' has EXECUTE, which no list", "analysts", True),
    "dev does not read prod": (READS, READS.replace(", prod", ""),
                               "'data_scientists' has USE_SCHEMA, SELECT, EXECUTE, which no list", "scientists", True),
    "owners": (ENGINEERS + "ALL_PRIVILEGES, MANAGE", ENGINEERS + "ALL_PRIVILEGES",
               "'ml_engineers' lacks MANAGE: owners of target prod", "grants:", False)}


@pytest.mark.parametrize("name", CHANGES)
def test_grants_that_contradict_the_lists_are_problems_with_file_and_line(file, name):
    old, new, message, on_line, is_warning = CHANGES[name]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    first, *_ = check(load_bundle(file.parent, "prod"))
    assert message in first.message and first.is_warning == is_warning
    assert on_line in file.read_text().splitlines()[first.line - 1]


def test_in_development_the_group_of_the_workers_has_no_more_than_the_lists_give(file):
    text = file.read_text()
    old = "grants: [{principal: \"${var.data_scientists}\", privileges: [USE_SCHEMA, SELECT, EXECUTE]}]"
    assert old in text
    file.write_text(text.replace(old, old.replace("EXECUTE", "EXECUTE, MODIFY, MANAGE")))
    problem, *_ = check(load_bundle(file.parent, "dev"))
    assert "'data_scientists' has MODIFY, MANAGE, which no list" in problem.message
    assert not problem.is_warning


QA = """
  qa:
    <<: *deployed
    variables: {catalog: qa, read: [qa, prod]}
"""


def test_a_fourth_target_is_one_entry(tmp_path):
    for name in ("resources", "nbs/flights"): copytree(ROOT / name, tmp_path / name)
    text = (ROOT / "databricks.yml").read_text() + QA
    (tmp_path / "databricks.yml").write_text(text)
    loaded = load_bundle(tmp_path, "qa")
    assert loaded.targets == ("dev", "staging", "prod", "qa")
    first, second = check(loaded)  # whether people in dev read it is said by dev's list
    assert first.is_warning and second.is_warning and "'data_scientists' has USE_SCHEMA" in first.message
    wider = text.replace("read: [dev, staging, prod]", "read: [dev, staging, prod, qa]")
    (tmp_path / "databricks.yml").write_text(wider)
    assert not check(load_bundle(tmp_path, "qa")) and not check(load_bundle(tmp_path, "prod"))
    assert set(loaded.jobs) == set(load_bundle(ROOT, "prod").jobs) and loaded.jobs["retrain"]["schedule"][
        "pause_status"] == "PAUSED"
    defaults = [{item["name"]: item["default"] for item in job["parameters"]} for job in loaded.jobs.values()]
    assert {values["target"] for values in defaults if "target" in values} == {"qa"}
    resources = loaded.data["resources"]
    assert grants_of(resources["schemas"]["project"])["ml_engineers"] == {"ALL_PRIVILEGES", "MANAGE"}
    assert resources["registered_models"]["model"]["catalog_name"] == "qa"
    reasons = {grant.reason for grant in expected_grants(access_of_all(loaded)) if grant.name.startswith("prod")}
    assert {"target qa reads prod", "target dev reads prod"} <= reasons


def test_the_entry_of_a_target_is_as_short_for_databricks_own_tool():
    "The anchor is of YAML, so that every reader of YAML sees whole targets."
    targets = yaml.safe_load((ROOT / "databricks.yml").read_text() + QA)["targets"]
    assert targets["qa"]["resources"] == targets["prod"]["resources"] == targets["staging"]["resources"]
    assert targets["qa"]["mode"] == "production" and targets["qa"]["workspace"]["root_path"]


# ---- run_as

def test_every_job_names_who_runs_it(root):
    jobs = [path for folder in ("resources", "template/resources") for path in (ROOT / folder).glob("*.job.yml*")]
    assert len(jobs) > 16 and all("run_as: ${var.run_as}\n" in path.read_text() for path in jobs)
    robot = load_bundle(ROOT, "prod", {"service_principal": "0a1b"})
    assert {str(job["run_as"]) for job in robot.jobs.values()} == {"{'service_principal_name': '0a1b'}"}
    ana = load_bundle(ROOT, "dev", user="ana@example.org")
    assert {str(job["run_as"]) for job in ana.jobs.values()} == {"{'user_name': 'ana@example.org'}"}
    for target in target_names(ROOT): assert "run_as" not in load_bundle(ROOT, target).data


# ---- the command

def shown(words: str, monkeypatch) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, words.split())
    if result.exception: raise result.exception
    return result.output


def test_the_command_prints_statements_for_the_owner_of_a_catalog(monkeypatch):
    lines = shown("grants -t prod --sql --var service_principal=0a1b", monkeypatch).splitlines()
    assert "GRANT USE CATALOG ON CATALOG `prod` TO `data_scientists`;" in lines
    assert "GRANT USE CATALOG, CREATE SCHEMA ON CATALOG `prod` TO `0a1b`;" in lines
    assert "GRANT USE SCHEMA, SELECT, EXECUTE ON SCHEMA `prod`.`flights` TO `data_scientists`;" in lines
    assert not any("MODIFY" in line or "`dev`" in line for line in lines)
    without = shown("grants -t prod --sql", monkeypatch)
    assert "TO `APPLICATION_ID`;" in without and "--var service_principal=..." in without


def test_a_bundle_without_workers_has_no_grants_to_show(tmp_path, monkeypatch):
    (tmp_path / "databricks.yml").write_text("bundle: {name: small}\n")
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, ["grants"]).exception
    assert isinstance(error, MlopsError) and "define the variable workers" in error.hint
