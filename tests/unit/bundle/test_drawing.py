"The drawing of a job: parameters and task values of its tasks, read from the YAML and from the notebooks' code."
import io
import json

import pytest
from rich.console import Console

from mlops_nb.bundle.drawing import (
    COMPUTED,
    draw,
    draw_graph,
    layers,
    task_inputs,
    task_outputs,
    unset_values,
    value_references,
    values_set,
)
from mlops_nb.bundle.load import load_bundle
from mlops_nb.errors import MlopsError


def notebook(folder, *cells: str, kind: str = "code"):
    file = folder / "a.ipynb"
    file.write_text(json.dumps({"cells": [{"cell_type": kind, "metadata": {}, "source": cell} for cell in cells]}))
    return file


@pytest.mark.parametrize("code, names", [
    ("task.set_value('a', 1)", ["a"]), ("set_value('a', 1)", ["a"]),
    ("mlops_nb.task.set_value(value=1, key='a')", ["a"]),
    ("dbutils.jobs.taskValues.set(key='a', value=1)", ["a"]), ("dbutils.jobs.taskValues.set('a', 1)", ["a"]),
    ("def f():\n  if x: task.set_value('a', 1)\n  task.set_value('b', 1)\n  task.set_value('a', 2)", ["a", "b"]),
    ("task.set_value(name, 1)", [COMPUTED]), ("task.set_value(f'a{i}', 1)", [COMPUTED]),
    ("task.set_value()", [COMPUTED]),
    ("# task.set_value('a', 1)", []), ("'''\ntask.set_value('a', 1)\n'''", []), ("task.get_value('x', 'a')", []),
    ("settings.set('a', 1)", []), ("%pip install x\ntask.set_value('a', 1)", ["a"]), ("!ls\n?x", []),
    ("for x in y:\n    %time f()\n    task.set_value('a', x)", ["a"]),
    ("x = (7\n  % 2)\ntask.set_value('a', x)", ["a"]),
    ("%%sql\nselect 1", []), ("", [])])
def test_values_are_found_in_the_code(code, names, tmp_path):
    assert values_set(notebook(tmp_path, "x = 1", code)) == names
    assert values_set(notebook(tmp_path, code, kind="markdown")) == []


def test_a_notebook_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(MlopsError, match="a.ipynb, cell 2, line 1: "):
        values_set(notebook(tmp_path, "x = 1", "x = = 1"))
    with pytest.raises(MlopsError, match="cannot read .*no.ipynb as a notebook"): values_set(tmp_path / "no.ipynb")
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    with pytest.raises(MlopsError, match="cannot read .*half.ipynb as a notebook"): values_set(tmp_path / "half.ipynb")


JOB = {
    "parameters": [{"name": "as_of", "default": "latest"}, {"name": "unseen", "default": "x"}],
    "tasks": [
        {"task_key": "last", "depends_on": [{"task_key": "loop"}], "run_if": "ALL_DONE", "disabled": True,
         "notebook_task": {"notebook_path": "last.ipynb", "base_parameters": {"of": "{{tasks.first.values.b}}"}}},
        {"task_key": "loop", "depends_on": [{"task_key": "first"}], "for_each_task": {
            "inputs": "{{tasks.first.values.list}}",
            "task": {"task_key": "day", "notebook_task": {"notebook_path": "day.ipynb",
                                                          "base_parameters": {"at": "{{input}}", "as_of": "never"}}}}},
        {"task_key": "first", "notebook_task": {"notebook_path": "[first].ipynb"}},
    ]}
DECLARED = {"[first].ipynb": {"as_of": 1}, "day.ipynb": {"as_of": 1, "at": 1}, "last.ipynb": {"of": 1}}
INPUTS = {"first": {"as_of": "latest"}, "loop": {"at": "{{input}}", "as_of": "latest"},
          "last": {"of": "{{tasks.first.values.b}}"}}


def printed(renderable, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_inputs_and_outputs_of_tasks():
    assert task_inputs(JOB, DECLARED.get) == INPUTS
    assert task_outputs(JOB, lambda path: [path]) == {"first": ["[first].ipynb"], "loop": [], "last": ["last.ipynb"]}
    assert task_inputs({"tasks": []}, DECLARED.get) == task_outputs({"tasks": []}, list) == {}
    assert value_references(JOB) == [("last", "first", "b"), ("loop", "first", "list")]


def test_values_that_are_used_and_never_set():
    assert unset_values(JOB, {"first": ["b", "list"]}) == []
    assert unset_values(JOB, {"first": ["b"]}) == [("loop", "first", "list")]
    assert unset_values(JOB, {"first": [COMPUTED]}) == []
    assert unset_values(JOB, {}) == [("last", "first", "b"), ("loop", "first", "list")]


def test_rows_follow_the_dependencies():
    assert layers(JOB["tasks"]) == [["first"], ["loop"], ["last"]]
    assert layers([{"task_key": "b"}, {"task_key": "a"}]) == [["b", "a"]] and layers([]) == []
    wide = [{"task_key": "z", "depends_on": [{"task_key": "a"}, {"task_key": "b"}]}, {"task_key": "a"},
            {"task_key": "b", "depends_on": [{"task_key": "a"}]}]
    assert layers(wide) == [["a"], ["b"], ["z"]]


def test_the_drawing_shows_all_inputs_and_outputs_and_reads_no_name_as_markup():
    text = printed(draw_graph(JOB, INPUTS, {"first": ["b", "more"], "loop": [], "last": []}))
    for words in ("[first].ipynb", "as_of = latest", "b -> last", "more", "of = {{tasks.first.values.b}}",
                  "for each of {{tasks.first.values.list}}: day.ipynb", "loop, run_if ALL_DONE",
                  "list: the notebook of first does not set it"):
        assert words in text, words
    assert text.index("─ first ─") < text.index("─ loop ─") < text.index("─ last ─") and text.count("▼") == 2
    assert printed(draw_graph({"tasks": []}, {}, {})).strip() == ""


def test_the_drawing_fits_a_narrow_terminal():
    text = printed(draw_graph(JOB, INPUTS, task_outputs(JOB, lambda path: [])), width=50)
    assert max(map(len, text.splitlines())) <= 50


def test_a_job_of_a_bundle(project):
    train = project.notebook("train", "task.set_value('model_version', 3)", parameters='as_of: str = "latest"')
    deploy = project.notebook("deploy", "pass", parameters='version: str = ""')
    project.job("deploy", [{"task_key": "deploy", "notebook_task": deploy}])
    project.job("train", [
        {"task_key": "train", "notebook_task": train},
        {"task_key": "hand_over", "depends_on": [{"task_key": "train"}], "run_job_task": {
            "job_id": "${resources.jobs.deploy.id}",
            "job_parameters": {"version": "{{tasks.train.values.model_version}}"}}},
    ], parameters=[{"name": "as_of", "default": "2013-04-01"}, {"name": "target", "default": "${bundle.target}"}])
    text = printed(draw(load_bundle(project.root), "train"))
    for words in ("nbs/train.ipynb", "as_of = 2013-04-01", "model_version -> hand_over", "job deploy",
                  "version = {{tasks.train.values.model_version}}"):
        assert words in text, words
    assert "target" not in text and "does not set" not in text
    project.job("other", [{"task_key": "a", "notebook_task": {"notebook_path": "/Workspace/Shared/a"}}],
                parameters=[{"name": "as_of", "default": "latest"}])
    assert "as_of = latest" in printed(draw(load_bundle(project.root), "other"))
    with pytest.raises(MlopsError, match="no job 'trian'"): draw(load_bundle(project.root), "trian")
