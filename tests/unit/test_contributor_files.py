"""The files for contributors, of this repository and of a project of `mlops new`, name what exists."""
import json
import re
from pathlib import Path

import generated
import pytest
import yaml
from states import ROOT


@pytest.fixture(scope="module", params=["platform", "project"])
def repository(request, tmp_path_factory) -> Path:
    if request.param == "platform": return ROOT
    with pytest.MonkeyPatch.context() as patch:
        return generated.write(tmp_path_factory.mktemp("team") / "team_files",
                               generated.made_up("regression", True), patch)


def targets(folder: Path) -> set[str]:
    "The targets of a Makefile."
    lines = re.findall(r"^([a-z][a-z -]*):", (folder / "Makefile").read_text(), re.M)
    return {name for line in lines for name in line.split()}


def test_the_owners_of_prod_are_asked_for_files_that_exist(repository):
    lines = [line.split() for line in (repository / ".github/CODEOWNERS").read_text().splitlines()]
    paths = {words[0].strip("/") for words in lines if words and words[0] != "#"}
    assert {"databricks.yml", "resources", "conf"} <= paths
    missing = {path for path in paths if not (repository / path).exists()}
    assert missing <= {"vendor"}  # which holds the wheel; the project of this test has none


def test_every_make_target_that_the_pages_name_exists(repository):
    pages = [repository / name for name in ("CONTRIBUTING.md", "README.md", ".github/pull_request_template.md")]
    for page in pages:
        commands = re.findall(r"`make ([a-z -]+)`|^make ([a-z -]+?)(?:  |$)", page.read_text(), re.M)
        named = {name for texts in commands for name in "".join(texts).split()}
        assert named <= targets(repository), page.name
    assert {"setup", "check", "tidy", "test"} <= targets(repository)


def test_the_devcontainer_installs_the_project_and_holds_no_secret(repository):
    container = json.loads((repository / ".devcontainer/devcontainer.json").read_text())
    tool, *names = container["postCreateCommand"].split()
    assert tool == "make" and set(names) <= targets(repository)
    assert not {"remoteEnv", "containerEnv", "secrets", "mounts"} & set(container)


def test_hooks_need_no_network_and_look_at_what_they_are_for(repository):
    settings = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for source in settings["repos"] for hook in source["hooks"]}
    assert {source["repo"] for source in settings["repos"]} == {"local"}
    assert {(hook["language"], hook["entry"].split("/")[0]) for hook in hooks.values()} == {("system", ".venv")}
    assert "files" not in hooks["secrets"]
    notebook = min(path.relative_to(repository).as_posix() for path in (repository / "nbs").rglob("*_use_case.ipynb"))
    for name in ("nbdev-clean", "notebooks-clean", "export-current", "code", "bundle"):
        assert re.search(hooks[name]["files"], notebook) and not re.search(hooks[name]["files"], "README.md"), name


@pytest.mark.parametrize("form", ["bug.yml", "change.yml"])
def test_a_form_asks_what_is_needed_once(form):
    body = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / form).read_text())["body"]
    fields = [field for field in body if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names) and any(field.get("validations", {}).get("required") for field in fields)
