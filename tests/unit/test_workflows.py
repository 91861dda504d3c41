"""The workflows of .github: their form, the targets that they call, and their scripts with a `gh` like GitHub's."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = [*WORKFLOWS, ROOT / ".github/actions/setup/action.yml"]
INSTALL = "go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.7"


NOT_REQUIRED = {"plan", "report", "notify", "deploy", "publish", "links"}  # jobs of workflows of pull requests
TEMPLATE = ROOT / "template/github"  # of the projects that `mlops new` makes


def jobs_of(file: Path) -> dict: return yaml.safe_load(file.read_text())["jobs"]


@pytest.mark.slow
def test_actionlint_has_nothing_to_say():
    tool = shutil.which("actionlint") or shutil.which("actionlint", path=Path.home() / "go/bin")
    if not tool: pytest.skip(f"actionlint is missing: {INSTALL}")
    files = [*WORKFLOWS, *TEMPLATE.glob("workflows/*.yml")]
    result = subprocess.run([tool, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout + result.stderr, result.returncode) == ("", 0)


@pytest.mark.parametrize("file", ACTIONS, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit_and_named_by_version(file):
    used = re.findall(r"uses: (\S+)(?:  # (v\S+))?$", file.read_text(), re.MULTILINE)
    assert used and all(action.startswith("./") or (re.search("@[0-9a-f]{40}$", action) and version)
                        for action, version in used), used


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_has_least_permissions_and_no_stored_token(file):
    workflow = yaml.safe_load(file.read_text())
    assert set(workflow["permissions"]) <= {"contents", "id-token"} and workflow["permissions"]["contents"] == "read"
    assert "concurrency" in workflow and "secrets." not in file.read_text()
    for name, job in workflow["jobs"].items():
        writes = {right for right, level in job.get("permissions", {}).items() if level == "write"}
        assert writes <= {"report": {"pull-requests"}, "notify": {"issues", "pull-requests"},
                          "publish": {"pages", "id-token"}}.get(name, {"id-token"}), name
        checkouts = [step for step in job["steps"] if "checkout@" in step.get("uses", "")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)
        assert job["timeout-minutes"] <= 60


def test_a_project_has_the_same_workflows():
    "Files of one name are equal, except those that a project has simpler."
    files = [file.relative_to(TEMPLATE) for file in TEMPLATE.rglob("*") if file.is_file()]
    simpler = {"workflows/ci.yml", "workflows/docs.yml", "rulesets/main.json", "CODEOWNERS", "pull_request_template.md"}
    same = [file for file in files if file.as_posix() not in simpler]
    assert len(same) >= 6
    for file in same: assert (TEMPLATE / file).read_text() == (ROOT / ".github" / file).read_text(), file
    makefile = (ROOT / "template/Makefile.jinja").read_text()
    for file in TEMPLATE.glob("workflows/*.yml"):
        for target in re.findall(r"\bmake (?:--\w+ )?([a-z-]+)", re.sub("#.*", "", file.read_text())):
            assert re.search(f"^{target}:", makefile, re.MULTILINE), f"{file.name}: make {target}"
    rule = json.loads((TEMPLATE / "rulesets/main.json").read_text())["rules"][-1]["parameters"]
    files = [TEMPLATE / f"workflows/{name}.yml" for name in ("ci", "integration", "docs")]
    names = {job["name"] for file in files for job in jobs_of(file).values()}
    assert {check["context"] for check in rule["required_status_checks"]} == names - NOT_REQUIRED


@pytest.mark.parametrize("file", ACTIONS, ids=lambda file: file.name)
def test_every_make_target_of_a_workflow_exists(file):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.findall(r"\bmake (?:--\w+ )?([a-z-]+)", re.sub("#.*", "", file.read_text()))
    assert called and set(called) <= targets, set(called) - targets


def test_the_checks_that_the_ruleset_requires_are_jobs_of_pull_requests():
    names = set()
    for file in WORKFLOWS:
        triggers = yaml.safe_load(file.read_text())[True]  # YAML 1.1 reads `on` as true
        if "pull_request" not in triggers: continue
        for job in jobs_of(file).values():
            versions = job.get("strategy", {}).get("matrix", {}).get("python", [""])
            names |= {job["name"].replace("${{ matrix.python }}", version) for version in versions}
    rules = json.loads((ROOT / ".github/rulesets/main.json").read_text())["rules"]
    kind = "required_status_checks"
    required, = (rule["parameters"][kind] for rule in rules if rule["type"] == kind)
    assert {check["context"] for check in required} == names - NOT_REQUIRED


GH = r"""#!/usr/bin/env python3
# GitHub's API as far as the scripts need it, with its state in $GH_STATE; jq applies --jq as gh does.
import json, os, re, subprocess, sys
words = sys.argv[2:]
def option(name):
    return words[words.index(name) + 1] if name in words else None
file, path = os.environ["GH_STATE"], words[0] if not words[0].startswith("-") else words[2]
state = json.load(open(file))
fields = dict(word.split("=", 1) for flag, word in zip(words, words[1:]) if flag in ("-f", "-F"))
if fields.get("body", "").startswith("@"): fields["body"] = open(fields["body"][1:]).read()
kind = re.sub(r"repos/o/r/|\?.*", "", path)
if option("--method") == "PATCH":
    comment = next(c for c in state["comments"] if str(c["id"]) == kind.rpartition("/")[2])
    comment["body"] = fields["body"]
    answer = comment
elif fields and kind == "issues":
    answer = {"number": 7, "title": fields["title"], "pull_request": None}
    state["issues"].append(answer)
elif fields:
    answer = {"id": len(state["comments"]) + 1, "body": fields["body"], "issue": kind.split("/")[1], "html_url": "url"}
    state["comments"].append(answer)
elif kind.endswith("/comments"): answer = [c for c in state["comments"] if c["issue"] == kind.split("/")[1]]
elif kind.endswith("/statuses"): answer = state["statuses"][kind.split("/")[1]]
else: answer = state[kind]
json.dump(state, open(file, "w"))
sys.exit(subprocess.run(["jq", "-r", option("--jq")], input=json.dumps(answer), text=True).returncode)
"""


@pytest.fixture
def github(tmp_path, monkeypatch):
    "A command `gh` on the PATH; returns a function that runs a script, and one that reads GitHub's state."
    if not shutil.which("jq"): pytest.skip("jq is missing: apt-get install jq")
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    file = tmp_path / "state.json"
    file.write_text(json.dumps({"issues": [], "comments": [], "deployments": [], "statuses": {}}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GH_STATE", str(file))
    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")

    def script(name: str, *words: str) -> str:
        result = subprocess.run(["bash", ROOT / ".github" / name, *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout
    return script, lambda: json.loads(file.read_text()), lambda state: file.write_text(json.dumps(state))


@pytest.mark.slow
def test_a_report_is_one_comment_that_is_updated(github, tmp_path):
    script, state, _ = github
    report = tmp_path / "report.md"
    for text in ("first $(touch bad) `x`", "second"):
        report.write_text(text)
        script("comment.sh", "pull", "12", "ci", str(report))
    report.write_text("other")
    script("comment.sh", "pull", "12", "integration", str(report))
    assert [(c["issue"], c["body"]) for c in state()["comments"]] == [
        ("12", "<!-- report: ci -->\nsecond"), ("12", "<!-- report: integration -->\nother")]


@pytest.mark.slow
def test_a_failure_of_main_is_one_issue(github, tmp_path):
    script, state, _ = github
    report = tmp_path / "report.md"
    for text in ("monday", "tuesday"):
        report.write_text(text)
        script("comment.sh", "issue", "The integration run of main fails", "integration", str(report))
    assert [issue["title"] for issue in state()["issues"]] == ["The integration run of main fails"]
    assert [c["body"].splitlines()[1] for c in state()["comments"]] == ["tuesday"]


@pytest.mark.slow
def test_the_commit_before_is_that_of_the_newest_deployment_that_succeeded(github):
    script, _, write = github
    deployments = [{"id": number, "sha": sha} for number, sha in ((4, "now"), (3, "failed"), (2, "good"), (1, "old"))]
    statuses = {"4": [{"state": "in_progress"}], "3": [{"state": "failure"}, {"state": "in_progress"}],
                "2": [{"state": "inactive"}, {"state": "success"}], "1": [{"state": "success"}]}
    write({"deployments": deployments, "statuses": statuses, "issues": [], "comments": []})
    assert script("deployed.sh", "prod") == "commit=good\n"
    write({"deployments": deployments[:2], "statuses": statuses, "issues": [], "comments": []})
    assert script("deployed.sh", "prod") == ""


CLI = """#!/bin/sh
echo "$(git rev-parse --short HEAD) $*" >>"$CALLS"
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "A repository with our Makefile and two commits, and a command `databricks` that records its calls."
    folder, bin_folder = tmp_path / "repository", tmp_path / "bin"
    folder.mkdir()
    bin_folder.mkdir()
    (bin_folder / "databricks").write_text(CLI)
    (bin_folder / "databricks").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("DATABRICKS_HOST", "https://example.cloud.databricks.com")
    shutil.copy(ROOT / "Makefile", folder)

    def run(*words, code=0):
        result = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert result.returncode == code, result.stdout + result.stderr
        return (result.stdout + result.stderr).strip()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    run("git", "init", "-q")
    for number in (1, 2):
        (folder / "code.py").write_text(f"x = {number}\n")
        run("git", "add", ".")
        run(*git, "commit", "-qm", str(number))
    run("git", "branch", "release/1.0", "HEAD~1")
    commits = run("git", "log", "--format=%h").splitlines()
    return run, folder, lambda: (tmp_path / "calls").read_text().splitlines(), commits


def test_deploy_run_and_roll_back_call_the_cli_with_the_right_code(repository):
    run, folder, calls, (newest, before) = repository
    run("make", "deploy", "TARGET=prod")
    run("make", "run", "JOB=smoke", "TARGET=prod")
    run("make", "run", "JOB=train", "TARGET=prod", "WAIT=no")
    run("make", "roll-back", "TARGET=prod", f"COMMIT={before}")
    (folder / "code.py").write_text("x = 3\n")
    run("make", "deploy", "TARGET=prod")
    assert calls() == [f"{newest} bundle deploy -t prod --var git_dirty=false", f"{newest} bundle run -t prod smoke",
                       f"{newest} bundle run -t prod --no-wait train",
                       f"{before} bundle deploy -t prod --var git_dirty=false --var git_branch=release/1.0",
                       f"{newest} bundle deploy -t prod --var git_dirty=true"]
    assert "no commit COMMIT=abc" in run("make", "roll-back", "TARGET=prod", "COMMIT=abc", code=2)
    assert not (folder / ".mlops/roll-back").exists() and run("git", "worktree", "list").count("\n") == 0


def test_without_the_cli_a_deployment_says_what_to_install(repository, monkeypatch):
    run, *_ = repository
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "install the Databricks CLI" in run("make", "deploy", "TARGET=prod", code=2)
