"""From a trial to conf/train.yml: names, rounding, and which losses decide."""
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import mean_squared_error

from mlops_nb.commands import automl as command
from mlops_nb.errors import MlopsError
from mlops_nb.models.learners import check_booster_parameters, function_learner
from mlops_nb.models.problem_types import REGRESSION
from mlops_nb.workflow import automl_settings, learning
from mlops_nb.workflow.rows import GROUPS, ROW_GROUP
from mlops_nb.workflow.use_case import UseCase
from mlops_nb.yaml_files import plain, read_yaml

PARCELS = UseCase(model="minutes", problem=REGRESSION, key=("parcel",), label="minutes", rows=None, labels=None,
                  source=("parcels",), features=("distance",), lookups=None)
TRAIN = """\
held_out_share: 0.2   # by hash
blocks: 3
min_rows: 50
rounds: 4  # few
parameters:   # of LightGBM
  objective: regression
  num_leaves: 3
  min_child_samples: 9  # by its other name
  deterministic: true
  force_row_wise: true
  verbose: -1
min_slice_rows: 10
custom_metrics: {}
"""
PARAMETERS = {"rounds": 60, "learning_rate": 0.123456, "num_leaves": 8, "min_child_samples": 5,
              "colsample_bytree": 0.987654, "reg_lambda": 0.001}


def parcels() -> pd.DataFrame:
    random = np.random.default_rng(1)
    frame = pd.DataFrame({"distance": random.uniform(0, 20, 600), ROW_GROUP: random.integers(0, GROUPS, 600)})
    return frame.assign(minutes=10 + 2 * frame.distance + random.normal(0, 1, 600))


@pytest.fixture
def project(tmp_path):
    "The folder of a project, and its settings."
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/train.yml").write_text(TRAIN)
    return tmp_path, learning.read_train(PARCELS, tmp_path)


def proposal_for(conf: dict, **changes) -> automl_settings.SettingsProposal:
    proposed = automl_settings.trial_settings(PARCELS, conf, PARAMETERS)
    present = automl_settings.present_settings(conf, list(proposed))
    losses = {"training": 2.0, "held_out": 2.0}
    return automl_settings.SettingsProposal(**{
        "as_of": "2024-04-01", "search": "automl_minutes_2024-04-01_0a", "run_id": "f00d", "choice": "", "loss": "RMSE",
        "present": present, "proposed": proposed, "present_losses": losses, "proposed_losses": losses, **changes})


def test_the_parameters_of_a_trial_have_the_names_of_the_file(project):
    proposed = proposal_for(project[1]).proposed
    assert proposed == {"rounds": 60, "parameters.learning_rate": 0.1235, "parameters.num_leaves": 8,
                        "parameters.min_child_samples": 5, "parameters.feature_fraction": 0.9877,
                        "parameters.lambda_l2": 0.001}
    check_booster_parameters(automl_settings.with_settings(PARCELS, project[1], proposed)["parameters"])


def test_what_is_written_is_what_training_reads(project):
    root, conf = project
    proposal = proposal_for(conf)
    command.write_settings(root, proposal)
    written = learning.read_train(PARCELS, root)
    assert written == automl_settings.with_settings(PARCELS, conf, proposal.proposed)
    text = (root / "conf/train.yml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(command.NOTE_MARK)]
    assert [line for line in TRAIN.splitlines() if line not in kept] == [
        "rounds: 4  # few", "  num_leaves: 3", "  min_child_samples: 9  # by its other name"]
    for fact in ("as of 2024-04-01", "automl_minutes_2024-04-01_0a", "run f00d", "notebook/notebook.ipynb"):
        assert fact in text
    again = proposal_for(written)
    assert again.is_present and command.verdict(again, True, True)[0] is False
    with pytest.raises(MlopsError, match="has changed since the search began: rounds"):
        command.write_settings(root, proposal)
    assert (root / "conf/train.yml").read_text() == text


def test_the_same_proposal_gives_the_same_file(project):
    root, conf = project
    file = root / "conf/train.yml"
    command.write_settings(root, proposal_for(conf))
    first = file.read_text()
    file.write_text(TRAIN)
    command.write_settings(root, proposal_for(conf))
    assert file.read_text() == first
    later = proposal_for(plain(read_yaml(first, "train.yml")), as_of="2024-05-01", run_id="beef")
    later.proposed["rounds"] = 61
    command.write_settings(root, later)
    text = file.read_text()
    assert "f00d" not in text and text.count(command.NOTE_MARK) == first.count(command.NOTE_MARK)


def test_the_losses_are_those_of_models_that_have_not_seen_the_rows(project):
    conf, rows = project[1], parcels()
    training, held_out = rows.head(400), rows.tail(200)
    losses = automl_settings.losses_of(PARCELS, training, held_out, conf)
    block = learning.blocks_of(training[ROW_GROUP], 3)
    predicted = np.empty(400)
    for number in range(3):
        trained = learning.learn(PARCELS, training[block != number], conf)
        predicted[block == number] = learning.predict(PARCELS, trained, training[block == number])
    assert losses["training"] == pytest.approx(mean_squared_error(training.minutes, predicted) ** 0.5)
    fitted = learning.learn(PARCELS, training, conf)
    expected = mean_squared_error(held_out.minutes, learning.predict(PARCELS, fitted, held_out)) ** 0.5
    assert losses["held_out"] == pytest.approx(expected)


def test_held_out_rows_do_not_decide(project):
    lower, higher = {"training": 1.0, "held_out": 9.0}, {"training": 3.0, "held_out": 1.0}
    assert command.verdict(proposal_for(project[1], proposed_losses=lower), True, False)[0]
    worse = proposal_for(project[1], proposed_losses=higher)
    assert not command.verdict(worse, True, False)[0] and command.verdict(worse, True, True)[0]
    assert not command.verdict(proposal_for(project[1]), True, False)[0]  # equal


def test_another_learner_gets_no_settings():
    from dataclasses import replace
    other = replace(PARCELS, learner=function_learner(len, print))
    with pytest.raises(MlopsError, match="the learner of minutes is functions; AutoML proposes parameters of lightgbm"):
        automl_settings.best_of_learner(other, [])
    with pytest.raises(MlopsError, match="no trial of the family lightgbm"):
        automl_settings.best_of_learner(PARCELS, [])
