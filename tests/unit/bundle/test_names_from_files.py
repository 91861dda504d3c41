"""Names and values from files and options: none leads outside the bundle or the state, none ends in a traceback."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlops_nb.bundle.checks import check
from mlops_nb.bundle.drawing import draw
from mlops_nb.bundle.load import load_bundle
from mlops_nb.bundle.parameters import notebook_cells, notebook_file
from mlops_nb.cli import app
from mlops_nb.conf import read_conf
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import beginning, run_store
from mlops_nb.jobs.home import Home

VARIABLES = {"catalog": {"default": "dev"}, "schema": {"default": "s"}, "city": {"default": "EWR"}}
SOURCE = "p: str = 'x'"
NOTEBOOK = json.dumps({
    "cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": SOURCE, "outputs": []}],
    "metadata": {}, "nbformat": 4, "nbformat_minor": 5})  # fmt: skip


def one_task(path="n.ipynb", key="a", **more) -> dict:
    return {"task_key": key, "notebook_task": {"notebook_path": path} | more}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes a bundle into a folder, beside which there is a notebook that does not belong to it."""
    root = tmp_path / "outer" / "bundle"
    root.mkdir(parents=True)
    (root / "n.ipynb").write_text(NOTEBOOK)
    (root.parent / "other.ipynb").write_text(NOTEBOOK)
    (root / "inside.ipynb").symlink_to(root / "n.ipynb")
    (root / "link.ipynb").symlink_to(root.parent / "other.ipynb")
    (root / "out").symlink_to(root.parent)
    (root / "folder.ipynb").mkdir()
    os.mkfifo(root / "pipe.ipynb")
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(root)

    def write(*tasks, jobs=None, **more) -> Path:
        job = {"name": "j", "parameters": [{"name": "p", "default": "x"}], "tasks": list(tasks)}
        tree = {"bundle": {"name": "x"}, "variables": VARIABLES, "resources": {"jobs": jobs or {"j": job}}} | more
        (root / "databricks.yml").write_text(json.dumps(tree, indent=1))
        return root

    return write


def home_of(root: Path, variables=None) -> Home:
    return Home(load_env(root=root), load_bundle(root, variables=variables), variables or {})


def refuse(root: Path, message: str, given=None, key="j", **options):
    """The run is refused with this message before anything is recorded."""
    home = home_of(root)
    with pytest.raises(MlopsError, match=message):
        beginning.begin_run(home, key, given or {}, **options)
    assert run_store.list_runs(home.store) == []


# notebooks


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../other.ipynb", "../other.ipynb is outside of the bundle"),
        ("out/../../other.ipynb", "../other.ipynb is outside of the bundle"),
        ("/etc/x.ipynb", "/etc/x.ipynb is a workspace path, whose notebook cannot run on this machine"),
        ("/Workspace/Users/a/x", "is a workspace path, whose notebook cannot run on this machine"),
        ("link.ipynb", "link.ipynb is outside of the bundle: it leads to"),
        ("out/other.ipynb", "out/other.ipynb is outside of the bundle: it leads to"),
        ("folder.ipynb", "no notebook 'folder.ipynb'"),
        ("pipe.ipynb", "no notebook 'pipe.ipynb'"),
        ("n\0.ipynb", r"no notebook 'n\x00.ipynb'"),
        ("n\n.ipynb", r"no notebook 'n\n.ipynb'"),
        ("x" * 300, "no notebook 'xxx"),
        (".", "no notebook '.'"),
    ],
)
def test_a_notebook_that_is_no_file_of_the_bundle_is_a_finding_and_is_refused_by_the_run(project, path, message):
    root = project(one_task(path))
    problems = [problem for problem in check(load_bundle(root)) if problem.key.endswith("notebook_path")]
    lines = (root / "databricks.yml").read_text().splitlines()
    line = 1 + ['"notebook_path"' in text for text in lines].index(True)
    assert [(problem.file, problem.line) for problem in problems] == [("databricks.yml", line)]
    assert message in problems[0].message
    refuse(root, re.escape(message))


def test_notebooks_inside_the_sync_root_are_accepted(project):
    root = project(one_task("inside.ipynb"))
    assert check(load_bundle(root)) == []
    root = project(one_task("../other.ipynb"), sync={"paths": ["..", "."]})
    assert check(load_bundle(root)) == []
    assert beginning.begin_run(home_of(root), "j", {}).run_id == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "out", "n.ipynb", "other.ipynb", "link.ipynb", ""]), max_size=5))
def test_no_path_leads_outside(tmp_path_factory, parts):
    """The oracle is the file that the system itself opens."""
    root = tmp_path_factory.getbasetemp().resolve() / "notebook_file" / "bundle"
    if not root.exists():
        (root / "a").mkdir(parents=True)
        for file in (root / "n.ipynb", root / "a" / "n.ipynb", root.parent / "other.ipynb"):
            file.write_text(NOTEBOOK)
        (root / "link.ipynb").symlink_to("../other.ipynb")
        (root / "out").symlink_to("..")
    name = "/".join(parts)
    try:
        file = notebook_file(root, name)
        assert file.resolve(strict=True).is_relative_to(root)
    except MlopsError:
        is_inside = not name.startswith(("/", "..")) and not os.path.normpath(name).startswith("..")
        assert not (is_inside and (root / name).is_file() and (root / name).resolve().is_relative_to(root))


def test_a_named_pipe_is_not_read(project):
    with pytest.raises(MlopsError, match="not a regular file"):
        notebook_cells(project(one_task()) / "pipe.ipynb")


# keys


def test_task_keys_that_differ_only_in_case_are_refused(project):
    root = project(one_task(key="Train"), one_task(key="score"), one_task(key="train"))
    problems = [problem for problem in check(load_bundle(root)) if "case" in problem.message]
    assert [problem.key for problem in problems] == ["resources.jobs.j.tasks[2].task_key"]
    refuse(root, "the task keys 'Train' and 'train' of job 'j' differ only in upper and lower case")


JOB_KEYS = ["../x", "../../../x", "a.b", "a b", "a/b", "a[0]", "[red]", "1", "true", "", ".", "..", "x" * 300, "ü"]


@pytest.mark.parametrize("key", JOB_KEYS)
def test_each_job_key_works_in_each_command_and_names_no_path(project, key, tmp_path):
    root = project(jobs={key: {"name": "j", "tasks": [one_task()]}})
    assert all(problem.is_warning for problem in check(load_bundle(root)))
    for arguments in (["validate"], ["jobs"], ["jobs", "show", key]):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.exception) == (0, None), arguments
    run = beginning.begin_run(home_of(root), key, {})
    assert run.record.attempt_folder("a", 0) == tmp_path / "state" / "runs" / "1" / "a" / "0"


def test_a_key_with_control_characters_is_an_error_with_its_line(project):
    with pytest.raises(MlopsError, match=r"databricks.yml:\d+: key 'a\\x00b' contains control characters"):
        load_bundle(project(jobs={"a\0b": {"tasks": [one_task()]}}))


@pytest.mark.parametrize("job", [None, {}, {"tasks": []}, {"tasks": None}, 7, {"tasks": {"a": 1}}, {"tasks": [1]}])
def test_a_job_without_tasks_is_a_finding_in_each_command(project, job):
    root = project(jobs={"j": job, "ok": {"tasks": [one_task()]}})
    assert [problem.line > 0 for problem in check(load_bundle(root))] != []
    jobs = CliRunner().invoke(app, ["jobs"])
    assert jobs.exit_code == 0 and "ok" in jobs.output
    assert ("no tasks; see mlops validate" in jobs.output) == (job != 7)
    for arguments in (["jobs", "show", "j"], ["run", "j"], ["run", "nope"]):
        assert isinstance(CliRunner().invoke(app, arguments).exception, MlopsError), arguments
    draw(load_bundle(root), "ok")


# parameters and variables


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\0b", r"the value of parameter 'p' contains a control character: '\\x00' at position 1"),
        ("\x1b[2J", "the value of parameter 'p' contains a control character"),
        ("a\udcff", r"the value of parameter 'p' contains bytes that are not UTF-8: '\\udcff' at position 1"),
        ("x" * 1_000_000, "the parameters of a run have 1,000,009 bytes as JSON; 'p' is the largest\n.*at most 10,000"),
    ],
)
def test_a_value_that_databricks_or_the_system_refuses_is_refused_before_anything_is_recorded(project, value, message):
    refuse(project(one_task()), message, {"p": value})
    if "\udcff" not in value:
        job = {"parameters": [{"name": "p", "default": value}], "tasks": [one_task()]}
        root = project(jobs={"j": job})
        assert any(problem.line and problem.key.startswith("resources.jobs.j.parameters") and len(str(problem)) < 400
                   for problem in check(load_bundle(root)))  # fmt: skip
        refuse(root, message)


def test_the_largest_parameters_are_accepted_and_shown_in_part(project):
    root = project(one_task())
    value = "x" * (10_000 - len('{"p": ""}'))
    run = beginning.begin_run(home_of(root), "j", {"p": value})
    assert run.parameters == {"p": value}
    run.record.decide_task("a", "SUCCESS")
    result = CliRunner().invoke(app, ["runs", "show", "1"])
    assert "(9,991 characters)" in result.output.replace("\n", "") and len(result.output) < 2000


@pytest.mark.parametrize("arguments", [["run", "j", "-p", "p"], ["run", "j", "-p", "q"], ["validate", "--var", "x"]])
def test_a_long_value_is_cut_in_an_error(project, arguments):
    project(one_task())
    for text in ("=" + "y" * 100_000, "y" * 100_000):
        result = CliRunner().invoke(app, [*arguments[:-1], arguments[-1] + text])
        assert isinstance(result.exception, MlopsError) and len(str(result.exception)) < 1000


@pytest.mark.parametrize("value", ["a\0b", "\x7f", "\udcff", "x" * 200_000])
def test_a_variable_that_no_environment_accepts_is_refused(project, value):
    root = project(one_task())
    with pytest.raises(MlopsError, match="--var: the value of variable 'city'") as error:
        home_of(root, {"city": value})
    assert len(str(error.value)) < 300
    with pytest.raises(MlopsError, match="--var: the value of variable 'city'"):
        Home(load_env(root=root), load_bundle(root), {"city": value})


def test_a_reference_in_a_value_from_outside_is_text_everywhere(project, monkeypatch):
    names = {"catalog": {"default": "dev"}, "schema": {"default": "s"}, "city": {"default": "EWR"},
             "copy": {"default": "${var.city}"}, "deep": {"default": "${var.map}"},
             "map": {"type": "complex", "default": {"city": "${var.city}"}}}  # fmt: skip
    places = ["${var.city}", "at ${var.city}", "${var.copy}", "${var.map.city}", "${var.deep.city}"]
    parameters = [{"name": f"p{number}", "default": place} for number, place in enumerate(places)]
    job = {"parameters": parameters, "tasks": [one_task()]}
    root = project(jobs={"j": job}, variables=names)
    text = "${var.schema}"
    expected = [text, f"at {text}", text, text, text]

    def values(bundle) -> list:
        return [parameter["default"] for parameter in bundle.data["resources"]["jobs"]["j"]["parameters"]]

    bundle = load_bundle(root, variables={"city": text})
    assert values(bundle) == expected and bundle.variables["city"] == bundle.variables["copy"] == text
    home = Home(load_env(root=root, variables={"city": text}), bundle, {"city": text})
    monkeypatch.setenv("BUNDLE_VAR_city", home.notebook_environment["BUNDLE_VAR_city"])
    assert values(load_bundle(root)) == expected  # as a notebook loads it
    monkeypatch.delenv("BUNDLE_VAR_city")
    run = beginning.begin_run(home, "j", {})
    again = load_bundle(root, variables=json.loads(run.record.row["variables"]))  # as a repair loads it
    assert values(again) == expected
    assert values(load_bundle(root)) == ["EWR", "at EWR", "EWR", "EWR", "EWR"]


def test_a_reference_to_a_run_in_a_given_value_is_resolved(project):
    run = beginning.begin_run(home_of(project(one_task())), "j", {"p": "{{job.run_id}}"})
    assert run.parameters == {"p": "1"}


# files


BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 10))


@pytest.mark.parametrize("text", [BOMB, "a: " + 10_000 * "[", "a: " + "x" * 10_000_000])
def test_a_bomb_in_a_file_of_the_bundle_or_of_conf_is_refused_in_words(project, text):
    root = project(one_task(), include=["more.yml"])
    for file in (root / "more.yml", root / "conf" / "train.yml", root / "databricks.yml"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        start, name = time.process_time(), file.relative_to(root).as_posix()
        with pytest.raises(MlopsError, match=rf"^{name}(:\d+)?: (too many|values are|the file has)"):
            read_conf(root, "train.yml", lambda conf: []) if "conf" in name else load_bundle(root)
        assert time.process_time() - start < 1
        file.unlink() if "conf" in name else file.write_text("bundle: {}" if name == "more.yml" else "")


def test_variables_that_multiply_are_refused(project):
    levels = {f"v{i}": {"default": f"${{var.v{i - 1}}}" * 9} for i in range(1, 10)}
    root = project(one_task(), variables=VARIABLES | {"v0": {"default": ""}} | levels)
    with pytest.raises(MlopsError, match=r"databricks.yml:\d+: variable 'v\d' has .* with its references replaced"):
        load_bundle(root)


@pytest.mark.parametrize("text", ["1\nx: 2", "1 # two", "*x", "&a 1", "!!int 1", "{}", "", "1: 2", "${var.city}"])
def test_the_value_of_a_number_is_one_number(project, text):
    root = project(one_task(), variables=VARIABLES | {"count": {"default": 3}})
    with pytest.raises(MlopsError, match="variable 'count' must be int, got"):
        load_bundle(root, variables={"count": text})


@pytest.mark.parametrize("text", ["", "x"])
def test_fields_of_jobs_that_multiply_are_refused(project, text):
    root = project(one_task())
    jobs = {"j0": {"name": "j0", "description": text, "tasks": [one_task()]}}
    for i in range(1, 10):
        jobs[f"j{i}"] = jobs["j0"] | {"description": f"${{resources.jobs.j{i - 1}.description}}" * 9}
    (root / "jobs.json").write_text(json.dumps({"resources": {"jobs": jobs}}))
    bundle = json.loads((root / "databricks.yml").read_text()) | {"include": ["jobs.json"]}
    (root / "databricks.yml").write_text(json.dumps(bundle))
    start = time.process_time()
    with pytest.raises(MlopsError, match=r"jobs.json:\d+: job 'j\d' has .* with its references replaced"):
        load_bundle(root)
    assert time.process_time() - start < 1


def test_a_notebook_path_that_is_a_number_is_the_name_of_a_file(project):
    root = project(one_task(path=5))
    assert "no notebook '5'" in str(check(load_bundle(root)))
    result = CliRunner().invoke(app, ["jobs", "show", "j"])
    assert not result.exception or isinstance(result.exception, (MlopsError, SystemExit))


@pytest.mark.parametrize(("name", "message"), [
    ("pipe.yml", "cannot read pipe.yml: "), ("folder.yml", "cannot read folder.yml: "),
    ("binary.yml", "binary.yml:1: the file is not UTF-8: it has the byte 0xff")])
def test_an_included_file_that_is_no_text_is_refused(project, name, message):
    root = project(one_task(), include=[name])
    os.mkfifo(root / "pipe.yml")
    (root / "folder.yml").mkdir()
    (root / "binary.yml").write_bytes(b"a: \xff")
    with pytest.raises(MlopsError, match=message):
        load_bundle(root)


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "x" * 256, "é" * 128])
def test_the_name_of_a_target_is_one_folder(project, name):
    with pytest.raises(MlopsError, match=r"databricks.yml:\d+: .* is not a valid name of a target"):
        load_bundle(project(one_task(), targets={name: {}}))
