"""Problems in the files of conf/ are reported before a job reads them."""
import shutil
from pathlib import Path

import pytest
from sizes import thinned
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.bundle.load import load_bundle
from mlops_nb.conf_checks import conf_problems
from mlops_nb.errors import MlopsError
from mlops_nb.models.tuning import check_space, check_tuning, tuning_problems

pytestmark = pytest.mark.usefixtures("no_settings")
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
    assert conf_problems(load_bundle()) == conf_problems(load_bundle(root=ROOT)) == []


BROKEN = [  # file, text, its replacement, the key and what both commands say about it
    ("train.yml", "rounds: 200", "ronds: 200", "ronds: no key 'ronds'", "did you mean 'rounds'?"),
    ("train.yml", "blocks: 3 ", "blocks: 1 ", "blocks: 1 is not valid", "a whole number from 2 to 100"),
    ("train.yml", "held_out_days: 28 ", "held_out_days: 400 ", "held_out_days: 400 days leave none",
     "less than 364"),
    ("train.yml", "rounds: 200", "rounds: 1000000", "rounds: 1000000 is not valid", "from 1 to 100,000"),
    ("train.yml", "warned_share: mlops", "log_loss: mlops", "custom_metrics.log_loss: ", "choose another name"),
    ("train.yml", ":warned_share", ":LONGEST_TITLE", "custom_metrics.warned_share: ", "is 60, not a function"),
    ("train.yml", "mlops_nb.workflow.evaluation:warned_share", "':'", "custom_metrics.warned_share: ",
     "names no function"),
    ("train.yml", "choices: [true, false]", "choices: [true, maybe]", "search_space.extra_trees.choices[1]: ",
     "LightGBM refuses extra_trees"),
    ("train.yml", "high: 100.0", "high: .inf", "search_space.lambda_l2: ", "both must be finite numbers"),
    ("train.yml", "{rounds: 308", "{rounds: null", "options[0]: rounds is None", "a whole number from 1 to 100,000"),
    ("train.yml", "missed: 5", "missed: five", "costs.missed: 'five' is not valid", "greater than 0"),
    ("train.yml", "learning_rate: 0.1\n", "learning_rat: 0.1\n", "parameters.learning_rat: ",
     "did you mean 'learning_rate'?"),
    ("train.yml", "num_leaves: 15\n", "num_leaves: 1\n", "parameters.num_leaves: ", "must be > 1"),
    ("train.yml", ":warned_share", ":warnd_share", "custom_metrics.warned_share: ", "warnd_share"),
    ("train.yml", "feature_fraction: {low: 0.2, high: 1.0}", "feature_fraction: {low: 0.2, high: 7}",
     "search_space.feature_fraction.high: ", "must be <= 1.0"),
    ("validation.yml", "predicts: {}", "predict: {}", "checks.predict: ", "'predicts'?"),
    ("validation.yml", "max_bytes", "max_byte", "checks.size.max_byte: ", "max_bytes"),
    ("validation.yml", "    roc_auc: {threshold: 0.70", "    roc_auc: {threshold: 7",
     "checks.metrics.roc_auc.threshold: ", "from 0 to 1"),
    ("validation.yml", "    log_loss: {", "    logloss: {", "checks.metrics.logloss: ",
     "did you mean 'log_loss'?"),
    ("validation.yml", "confidence: 0.95", "confidence: 95", "deployment.confidence: ",
     "from 0.5 on, less than 1"),
    ("validation.yml", "threshold: 0.65", "threshold: abc", "checks.metrics.log_loss.threshold: 'abc' is not valid",
     "a number from 0 on"),
    ("validation.yml", "threshold: 0.65, greater_is_better: false", "threshold: 0.65, greater_is_better: 'no'",
     "checks.metrics.log_loss.greater_is_better: 'no' is not valid", "false for log_loss"),
    ("validation.yml", "{min_relative_change: 0.05, g", "{min_relative_change: 5, g",
     "checks.metrics.business_cost.min_relative_change: 5", "less than 1"),
    ("validation.yml", "tolerance: 0.000001", "tolerance: '0.1'", "checks.logged.tolerance: ", "remove the quotes"),
    ("validation.yml", "max_milliseconds: 500", "max_milliseconds: 0", "checks.latency.max_milliseconds: 0",
     "a number greater than 0"),
    ("validation.yml", "floor: 0.65", "floor: -1", "deployment.floor: -1 is no value of log_loss", "from 0 on"),
    ("validation.yml", "min_days: 14 ", "min_days: 14.5 ", "deployment.min_days: 14.5", "a whole number from 14 on"),
    ("validation.yml", "confidence: 0.95", "confidence: 0.2", "deployment.confidence: 0.2", "from 0.5 on"),
    ("validation.yml", "mode: compare", "mode: compete", "deployment.mode: 'compete'", "compare or direct"),
    ("monitoring.yml", "name: late_flights", "name: count", "monitor.custom_metrics[3].name: ", "rename it"),
    ("monitoring.yml", "nullif(heuristic_loss, 0)", "nullif(no_such_metric, 0)",
     "monitor.custom_metrics[2].definition: ", "no metric 'no_such_metric'"),
    ("monitoring.yml", "output_data_type: *double", "output_data_type: double",
     "monitor.custom_metrics[1].output_data_type: ", "StructField"),
    ("monitoring.yml", "sliced_columns: []", "sliced_columns: [orign]", "sliced_columns[0]: ",
     "did you mean 'origin'?"),
    ("monitoring.yml", "hour_band,", "hour_bond,", "monitor.slicing_exprs[2]: ", "'hour_band'?"),
    ("monitoring.yml", "metric: loss_ratio", "metric: loss_ration", "thresholds[0].metric: ",
     "did you mean 'loss_ratio'?"),
    ("monitoring.yml", "column: prediction\n", "column: predicton\n", "thresholds[2].column: ",
     "did you mean 'prediction'?"),
    ("monitoring.yml", "false_alarm_rate: 0.01\n  # Too", "false_alarm_rate: 1.5\n  # Too",
     "thresholds[0].false_alarm_rate: ", "a share below 0.5"),
    ("monitoring.yml", "at_most: 0.2", "at_most: -1", "thresholds[2].at_most: -1 is no value of population_stability",
     "it must be a number from 0 on"),
    ("monitoring.yml", "at_most: 0.2", "min_rows: 99999999999999\n    at_most: 0.2", "thresholds[2].min_rows: ",
     "a whole number from 0 to 1,000,000,000,000"),
    ("monitoring.yml", "granularities: [1 week, 1 month]", "granularities: []",
     "monitor.inference_log.granularities: [] is not valid", "write at least one"),
    ("monitoring.yml", "granularities: [1 week, 1 month]", "granularities: [1 week, 1 week]",
     "monitor.inference_log.granularities: ", "names one twice"),
    ("monitoring.yml", "[1 week, 1 month]", "[99999999 weeks]",
     "monitor.inference_log.granularities[0]: no granularity", "1 to 52 weeks"),
    ("monitoring.yml", "definition: model_loss /", "definition: modl_loss /",
     "monitor.custom_metrics[2].definition: ", "modl_loss"),
    ("monitoring.yml", "definition: model_loss / nullif(heuristic_loss, 0)", "definition: model_loss / nullif(",
     "monitor.custom_metrics[2].definition: ", "'(' is never closed"),
    ("governance.yml", "required_tags: [", "required_tags: [[", "'[' is never closed", "close it by ']'"),
    ("governance.yml", "contact:", "contakt:", "contakt: no key", "did you mean 'contact'?"),
    ("governance.yml", "Slices, Explanation", "Slice, Explanation", "required_sections[4]: ",
     "did you mean 'Slices'?"),
    ("governance.yml", "git_sha", "git_sah", "required_tags[6]: ", "did you mean 'git_sha'?"),
    ("governance.yml", "[passenger,", "[plane,", "forbidden_features[0]: feature 'plane_age' is forbidden",
     "remove the feature"),
    ("governance.yml", "git_sha,", "owner,", "required_tags: ", "a list of different texts"),
    ("features.yml", "  columns:\n    faa: {type: string, nullable: false}", "  columns:",
     "airport.columns: the key column 'faa'", "write faa: {type"),
    ("features.yml", "carrier_daily:", "carier_daily:", "carier_daily: no feature table",
     "did you mean 'carrier_daily'?"),
    ("features.yml", "plane_age:", "plane_aeg:", "plane.columns.plane_aeg: ", "'plane_age'?"),
    ("features.yml", "{type: int, nullable: false, values: [0, 1, 2]}", "{type: integer, nullable: false}",
     "aircraft_recent.columns.aircraft_stage.type: ", "did you mean 'int"),
    ("serving.yml", "challenger: true", "chalenger: true", "chalenger: no key", "did you mean 'challenger'?"),
    ("serving.yml", "shadow: false", "shadow: sometimes", "shadow: 'sometimes' is not valid", "true or false"),
    ("retraining.yml", "max_refused: 3 ", "max_refused: 0 ", "max_refused: 0 is not valid", "from 1 to 1,000"),
    ("retraining.yml", "cooldown_days: 21 ", "cooldown_days: 99999999999999 ", "cooldown_days: 99999999999999 is not",
     "a whole number from 0 to 3,650"),
    ("retraining.yml", "rows: 10000 ", "rows: 99999999999999 ", "min_new_labelled_rows: 99999999999999 is not",
     "a whole number from 0 to 1,000,000,000,000"),
    ("retraining.yml", "[schedule, alert]", "[shedule, alert]", "causes[0]: no cause 'shedule'",
     "did you mean 'schedule'?"),
    ("infrastructure.yml", "metric: error_rate", "metric: eror_rate", "thresholds[1].metric: no metric",
     "did you mean 'error_rate'?")]


@pytest.fixture
def flights(tmp_path, monkeypatch):
    "The project of this repository, with a conf/ of its own."
    for name in ("databricks.yml", "resources", "mlops_nb"): (tmp_path / name).symlink_to(ROOT / name)
    for name in ("conf", "nbs/flights"): shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "old", "new", "key", "words"), thinned(BROKEN), ids=range(len(BROKEN)))
def test_the_mistake_is_named_with_its_line_and_what_to_write(flights, name, old, new, key, words):
    file = flights / "conf" / name
    text = file.read_text()
    before, _, after = text.partition(old)
    file.write_text(before + new + after)
    place = f"conf/{name}:{before.count(chr(10)) + 1}: {key}"
    result = CliRunner().invoke(cli.app, ["validate"])
    assert result.exit_code == 1 and place in result.output and words in result.output, result.output


@pytest.mark.parametrize(("name",), thinned((f"{name}.yml",) for name in (
    "features", "governance", "monitoring", "retraining", "serving", "train", "validation")))
def test_a_mistake_in_any_file_is_reported_before_any_job_starts(flights, name):
    with (flights / "conf" / name).open("a") as file: file.write("\nanother: 1\n")
    with pytest.raises(MlopsError, match=rf"conf/{name}:\d+: another: (no key|the table)"):
        CliRunner().invoke(cli.app, ["run", "train"], catch_exceptions=False)
    assert not (flights / "state").exists()  # no run, and no folder of one


@pytest.mark.parametrize(("content", "message"), [
    ("a: 1\n}\n", "conf/train.yml:2: '}' has no opening bracket"),
    ("a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> mine\n", "conf/train.yml:2: a merge conflict is not resolved"),
    ("# a\n# Größe\n".encode("latin-1"), "conf/train.yml:2: the file is not UTF-8: it has the byte 0xf6\n  save"),
    ("a: 1\n".encode("utf-16"), "conf/train.yml:1: the file is not UTF-8: it is UTF-16")])
def test_a_file_that_an_editor_or_git_left_behind(flights, content, message):
    (flights / "conf/train.yml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in CliRunner().invoke(cli.app, ["validate"]).output


def test_a_missing_file_is_named(flights):
    (flights / "conf/train.yml").rename(flights / "conf/trian.yml")
    result = CliRunner().invoke(cli.app, ["validate"])
    assert result.exit_code == 1 and "conf/train.yml: no file 'train.yml' in conf/" in result.output
    assert "did you mean 'trian.yml'?" in result.output


def test_all_mistakes_of_all_files_are_reported_at_once(flights):
    for name in ("train.yml", "governance.yml", "monitoring.yml"):
        with (flights / "conf" / name).open("a") as file: file.write("\nanother: 1\n")
    output = CliRunner().invoke(cli.app, ["validate"]).output
    assert output.count("no key 'another'") == 3


def test_all_parameters_that_the_learner_refuses_are_reported_at_once(flights):
    file = flights / "conf/train.yml"
    text = file.read_text().replace("  feature_fraction: 0.4", "  feature_fraction: 4")
    file.write_text(text.replace("  cat_l2:", "  cat_l22:").replace("  lambda_l2: 20", "  lambda_l2: -20"))
    output = CliRunner().invoke(cli.app, ["validate"]).output
    for name in ("feature_fraction", "cat_l22", "lambda_l2"): assert f": parameters.{name}: " in output, output


@pytest.mark.parametrize(("name", "old", "new"), [
    ("governance.yml", "[passenger, age_group, gender, nationality, religion]", "[]"),
    ("validation.yml", "champion_max_age_days: 180", "champion_max_age_days: null"),
    ("validation.yml", "floor: 0.65", "floor: 1"), ("validation.yml", "tolerance: 0.000001", "tolerance: 1e-6"),
    ("monitoring.yml", "definition: model_loss / nullif(heuristic_loss, 0)",
     "definition: CASE WHEN heuristic_loss > 0 THEN CAST(model_loss AS DOUBLE) END")])
def test_unusual_values_that_are_right(flights, name, old, new):
    file = flights / "conf" / name
    text = file.read_text()
    if "age" in old: text = text.replace("not_worse_than: 0.01", "not_worse_than: null")
    assert old in text
    file.write_text(text.replace(old, new))
    result = CliRunner().invoke(cli.app, ["validate"])
    assert result.exit_code == 0 and "no problem" in result.output, result.output


def test_all_mistakes_of_a_monitor_and_its_thresholds_are_reported_at_once(flights):
    file = flights / "conf/monitoring.yml"
    text = file.read_text().replace("label_col: ", "label: ").replace("slicing_exprs: [", "slicing_expr: [")
    text = text.replace("name: loss_ratio", "name: loss ratio").replace("at_most: 0.2", "at_most: high")
    file.write_text(text.replace("output_data_type: *double", "output: *double", 1))
    output = CliRunner().invoke(cli.app, ["validate"]).output
    for key in ("inference_log.label", "slicing_expr", "custom_metrics[2].name", "custom_metrics[1].output"):
        assert f": monitor.{key}: " in output, output
    assert ": thresholds[2].at_most: 'high' is not valid" in output


def test_all_mistakes_of_a_rule_are_reported_at_once(flights):
    file = flights / "conf/validation.yml"
    text = file.read_text().replace("floor: 0.65", "floor: high").replace("min_rows: 5000 ", "min_rows: 0 ")
    text = text.replace("champion_max_age_days: 180", "champion_max_age_days: null")
    file.write_text(text.replace("mode: compare", "mode: 1").replace("max_bytes: 50000000", "max_byte: 1, max: 2"))
    output = CliRunner().invoke(cli.app, ["validate"]).output
    for key in ("checks.size.max_byte", "checks.size.max", "deployment.mode", "deployment.floor",
                "deployment.min_rows", "deployment.not_worse_than"):
        assert f": {key}: " in output, output


@pytest.mark.parametrize(("old", "new", "key", "words"), [
    ("workload_size: Small", "workload_size: small", "endpoint.workload_size: 'small'", "Small, Medium, Large"),
    ("enabled: true", "enable: true", "endpoint.enable: no key", "did you mean 'enabled'?"),
    ('name: ""', "name: late.arrival", "endpoint.name: 'late.arrival'", "letters, digits, hyphens"),
    ("inference_table: late_arrival", "inference_table: Late-Arrival", "endpoint.inference_table: ", "in lower case")])
def test_a_mistake_in_the_settings_of_the_endpoint_is_named(flights, old, new, key, words):
    file = flights / "databricks.yml"
    text = file.read_text()
    file.unlink()
    assert old in text
    file.write_text(text.replace(old, new))
    output = CliRunner().invoke(cli.app, ["validate"]).output
    assert f"variables.{key}" in output and words in output, output
