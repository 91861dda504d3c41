"""Values of parameters are refused before anything starts: of the job, of the jobs that it runs, and in the YAML."""
import shutil
from pathlib import Path

import pytest
from sizes import thinned
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.bundle.load import load_bundle
from mlops_nb.bundle.parameters import rule_of_value
from mlops_nb.bundle.passed_values import check_passed, passed_values
from mlops_nb.errors import MlopsError, ParameterError

pytestmark = pytest.mark.usefixtures("no_settings")
ROOT = Path(__file__).parents[3]
WRONG = [  # job, parameters, what the error says
    ("train", {"as_of": "2024-13-13"}, "'as_of' is '2024-13-13'\n  it must be a date such as 20"),
    ("train", {"as_of": "yesterday"}, "'as_of' is 'yesterday'"), ("train", {"as_of": ""}, "'as_of' is ''"),
    ("train", {"as_of": "2023-02-29"}, "'as_of' is '2023-02-29'"), ("train", {"tune": "maybe"}, "must be bool"),
    ("train", {"as_of": "2031-01-01"}, "a day without data\n  write a day from 2013-01-02 to 2014-01-01"),
    ("eda", {"as_of": "2012-01-01"}, "a day without data"),
    ("batch_inference", {"as_of": "2013-06-01", "replay_days": "-3"}, "'replay_days' is '-3'"),
    ("batch_inference", {"as_of": "2013-12-30", "replay_days": "9"}, "the end of 9 days from 2013-12-30 on"),
    ("demo", {"first_day": "2013-13-01"}, "'first_day', the as_of of job 'features': .* is '2013-13-01'"),
    ("demo", {"retrain_day": "2031-01-01"}, "'retrain_day', the as_of of job 'train': .*a day without data"),
    ("demo", {"replay_days": "many"}, "replay_days.* must be int"),
    ("automl", {"max_trials": "0"}, "'max_trials' is '0'"), ("automl", {"timeout_minutes": "nan"}, "'timeout_minutes'"),
    ("monitor", {"granularity": "1 mont"}, "no granularity '1 mont'"),
    ("deploy", {}, "job 'deploy' needs model_name and model_version"),
    ("compare", {"first": "a/1"}, "job 'compare' needs second\n"), ("reproduce", {}, "mlops run train -t dev")]


@pytest.mark.parametrize(("job", "given", "message"), thinned(WRONG))
def test_a_wrong_value_starts_nothing_and_leaves_no_run(job, given, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(ROOT)
    words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    with pytest.raises(ParameterError, match=f"(?s){message}"):
        CliRunner().invoke(cli.app, ["run", job, *words], catch_exceptions=False)
    assert "no runs yet" in CliRunner().invoke(cli.app, ["runs"]).output
    assert not (tmp_path / "state/runs").exists()


def test_values_that_are_right_are_accepted():
    for job, values in {"train": {"as_of": "latest"}, "compare": {"first": "a/1", "second": "b@champion", "as_of": ""},
                        "batch_inference": {"as_of": "2013-04-01", "replay_days": "366"}}.items():
        check_passed(passed_values(load_bundle(root=ROOT), job, values))
    assert not rule_of_value("source", "-3") and not rule_of_value("held_out_days", 28)


@pytest.mark.parametrize(("name", "old", "new", "place"), thinned([
    ("demo.job.yml", '{as_of: "{{job.parameters.first_day}}"}', "{as_of: 2013-31-01}", "demo.job.yml"),
    ("eda.job.yml", '"2013-04-01"', '"2013-04-31"', "eda.job.yml"),
    ("batch_inference.job.yml", "{name: replay_days, default: \"1\"}", "{name: replay_days, default: \"-1\"}",
     "batch_inference.job.yml"),
    ("automl.job.yml", "automl_experiment.ipynb}", "automl_experiment.ipynb, base_parameters: {rows: \"0\"}}",
     "automl.job.yml")]))
def test_values_in_the_yaml_are_checked_with_their_line(name, old, new, place, tmp_path, monkeypatch):
    for folder in ("conf", "nbs/flights", "resources"): shutil.copytree(ROOT / folder, tmp_path / folder)
    for other in ("databricks.yml", "mlops_nb"): (tmp_path / other).symlink_to(ROOT / other)
    monkeypatch.chdir(tmp_path)
    before, kept, after = (tmp_path / "resources" / name).read_text().partition(old)
    assert kept
    (tmp_path / "resources" / name).write_text(before + new + after)
    result = CliRunner().invoke(cli.app, ["validate"])
    line = before.count("\n") + 1
    assert result.exit_code == 1 and f"resources/{place}:{line}: " in result.output, result.output
    with pytest.raises(MlopsError): CliRunner().invoke(cli.app, ["run", "train"], catch_exceptions=False)
