"""Problems in the files of conf/ are reported before a job reads them."""
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.conf_checks import conf_problems
from mlops_nb.errors import MlopsError
from mlops_nb.models.tuning import check_space, check_tuning, tuning_problems

ROOT = Path(__file__).parents[2]
KNOWN = ["depth", "rate"]
TRAIN = ("rounds: 9\nparameters:\n  depth: 3\n"
         "search_space:\n  {}: {{low: 1, high: 9}}\noptions:\n  - {{depth: 4, {}: 3}}\n")


@pytest.mark.parametrize("entry, message", [
    (None, "the search space of 'depth' is None"), ({"choices": []}, "has no choices"),
    ({"choices": "ab"}, "has no choices"),
    ({"choices": [1], "low": 1}, "no key 'low'"), ({"low": 1, "hihg": 2}, "no key 'hihg'"),
    ({"low": 1}, "has neither low and high nor choices"),
    ({"low": "1", "high": 2}, "goes from '1' to 2"), ({"low": 2, "high": 2}, "goes from 2 to 2"),
    ({"low": 1, "high": 2, "log": "yes"}, "log is 'yes'"),
    ({"low": 0, "high": 2, "log": True}, "begins at 0 on a logarithmic scale")])
def test_entries_of_a_space_that_make_no_sense(entry, message):
    with pytest.raises(MlopsError, match=message): check_space({"depth": entry}, KNOWN)


@pytest.mark.parametrize("options, message", [
    ({}, "the options are {}"), ([None], "option 0 is None"), ([{"depth": 1}, {}], "option 1 is {}"),
    ([{"dept": 1}], "no parameter 'dept', which option 0 sets")])
def test_options_that_make_no_sense(options, message):
    assert [problem for _, problem, _ in tuning_problems({"options": options}, KNOWN)] == [message]


def test_all_mistakes_are_reported_at_once():
    conf = {"search_space": {"dept": {"choices": [1]}, "rate": {"low": 1}}, "options": [{"depth": 1, "raet": 2}]}
    message = r"(?s)conf/train.yml: search_space.dept: .*'depth'.*search_space.rate: .*options\[0\].raet: .*'rate'"
    with pytest.raises(MlopsError, match=message): check_tuning(conf, KNOWN)
    check_tuning({"search_space": {"rate": {"low": 0.1, "high": 1, "log": True}}, "options": [{"depth": 1}]}, KNOWN)
    check_tuning({}, KNOWN)  # tuning is optional


@pytest.fixture
def conf(project, monkeypatch):
    "A small project, and a function that writes a file of its conf/."
    monkeypatch.chdir(project.root)
    project.notebook("a", "1")
    project.job("a", [{"task_key": "a", "notebook_task": {"notebook_path": "../nbs/a.ipynb"}}])
    return lambda name, text: project.path(f"conf/{name}").write_text(text)


@pytest.mark.parametrize("name, text, place, message", [
    ("train.yml", TRAIN.format("dept", "rounds"), "conf/train.yml:5: search_space.dept", "did you mean 'depth'?"),
    ("train.yml", TRAIN.format("depth", "round"), "conf/train.yml:7: options[0].round", "did you mean 'rounds'?"),
    ("features.yml", "t:\n  columns:\n    c: {type: doubel}\n", "conf/features.yml:3: t.columns.c.type",
     "did you mean 'double'?")])
def test_validate_reports_problems_in_conf(conf, name, text, place, message):
    assert CliRunner().invoke(cli.app, ["validate"]).exit_code == 0
    conf(name, text)
    result = CliRunner().invoke(cli.app, ["validate"])
    assert result.exit_code == 1 and place in result.output and message in result.output
    with pytest.raises(MlopsError, match="the bundle has 1 problem"):
        CliRunner().invoke(cli.app, ["run", "a"], catch_exceptions=False)


def test_correct_files_have_no_problems(conf):
    conf("train.yml", TRAIN.format("depth", "rounds"))
    assert conf_problems(Path.cwd()) == conf_problems(ROOT) == []
