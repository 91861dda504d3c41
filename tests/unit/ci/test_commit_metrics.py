"""The check of a commit's metrics: what is paired, what is refused, and what a person reads."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mlops_nb.ci import commit_metrics, metric_change
from mlops_nb.ci.metric_change import TrainingResults, is_worse, match_change, paired_match
from mlops_nb.errors import MlopsError
from mlops_nb.git import git
from mlops_nb.models.problem_types import BINARY, REGRESSION

RULE = {"metric": "log_loss", "greater_is_better": False, "min_rows": 1000, "min_relative_change": 0.005,
        "confidence": 0.95, "floor": 0.7, "mode": "compare"}
COSTS = {"missed": 5, "false_warning": 1}


def results(name: str, noise: float, seed: int = 0, label_seed: int = 1) -> TrainingResults:
    "Predictions of 28 days with 200 rows: the true chance with noise on the scale of log odds."
    draws, noises = np.random.default_rng(label_seed), np.random.default_rng(seed)
    days = pd.date_range("2013-03-01", periods=28).date.repeat(200)
    odds = draws.normal(-1, 0.8, len(days)) + np.repeat(draws.normal(0, 0.3, 28), 200)
    label = (draws.uniform(size=len(days)) < 1 / (1 + np.exp(-odds))).astype(float)
    prediction = 1 / (1 + np.exp(-(odds + noises.normal(0, noise, len(days)))))
    rows = pd.DataFrame({"row": np.arange(len(days)), "group": days, "label": label, "prediction": prediction})
    return TrainingResults(name, {"log_loss": log_loss(label, prediction)}, {"threshold": "0.3"}, rows)


def change_of(candidate, base, problem=BINARY, rule=RULE):
    return match_change(paired_match(problem, base, candidate), rule, COSTS)


def test_the_metrics_are_those_of_scikit_learn_on_the_common_rows():
    base, candidate = results("main", 0.1, seed=2), results("this commit", 0.5, seed=3)
    fewer = replace(candidate, predictions=candidate.predictions.iloc[::2].sample(frac=1, random_state=1))
    change = change_of(fewer, base)
    kept = candidate.predictions.iloc[::2]
    both = base.predictions.iloc[::2]
    assert change.comparison.rows == len(kept)
    for column, rows in (("this commit", kept), ("main", both)):
        assert change.metrics.loc["log_loss", column] == pytest.approx(log_loss(rows.label, rows.prediction))
        assert change.metrics.loc["roc_auc", column] == pytest.approx(roc_auc_score(rows.label, rows.prediction))
    expected = log_loss(kept.label, kept.prediction) / log_loss(both.label, both.prediction) - 1
    assert change.comparison.change == pytest.approx(expected) and is_worse(change)


@pytest.mark.slow
def test_noise_refuses_nothing_and_a_better_commit_neither():
    pairs = [[results(name, 0.15, 2 * n + i, label_seed=n) for i, name in enumerate("ab")] for n in range(20)]
    refused = [is_worse(change_of(*pair)) for pair in pairs]
    assert sum(refused) <= 1
    assert not is_worse(change_of(results("a", 0.05), results("b", 0.6, seed=5)))


def test_a_metric_that_is_better_when_it_is_higher():
    rule = RULE | {"metric": "roc_auc", "greater_is_better": True, "floor": 0.5}
    worse, good = results("worse", 1.5, seed=4), results("good", 0.05, seed=5)
    assert is_worse(change_of(worse, good, rule=rule)) and not is_worse(change_of(good, worse, rule=rule))


def test_what_cannot_be_compared_is_refused_unless_the_other_commit_stored_nothing():
    base, candidate = results("main", 0.1), results("this commit", 2.0, seed=9)
    other = candidate.predictions.assign(row=lambda rows: rows.row + 1_000_000)
    flipped = candidate.predictions.assign(label=lambda rows: 1 - rows.label)
    for predictions in (None, other, flipped):
        assert paired_match(BINARY, base, replace(candidate, predictions=predictions)) is None
    use_case = type("UseCase", (), {"problem": BINARY})
    change = metric_change.metric_change(use_case, replace(base, predictions=None), candidate, RULE, COSTS)
    assert list(change.metrics.index) == ["log_loss"] and not is_worse(change)
    text = commit_metrics.judged(change, "main", accepted=False).text
    assert "**Passed.**" in text and "The other commit stored no predictions" in text
    few = candidate.predictions.head(RULE["min_rows"] - 1)
    for predictions in (other, flipped, few):
        change = metric_change.metric_change(use_case, base, replace(candidate, predictions=predictions), RULE, COSTS)
        result = commit_metrics.judged(change, "main", accepted=False)
        assert result.refused and "**Refused:** the metrics cannot be compared." in result.text
        assert not commit_metrics.judged(change, "main", accepted=True).refused


def test_a_key_that_two_rows_have_is_a_mistake_of_the_use_case():
    base, candidate = results("main", 0.1), results("this commit", 0.1, seed=9)
    twice = replace(candidate, predictions=pd.concat([candidate.predictions, candidate.predictions.head(1)]))
    with pytest.raises(MlopsError, match="this commit has held out two rows of one key"):
        paired_match(BINARY, base, twice)


def test_a_negative_metric_that_rises_is_better():
    table = pd.DataFrame({"this commit": {"r2_score": -0.1}, "main": {"r2_score": -0.2}})
    change = metric_change.MetricChange(table, None, RULE, REGRESSION)
    assert metric_change.metric_cells(change) == [["r2_score", "-0.2000", "-0.1000", "50.0% better"]]


def test_a_number_is_compared_by_its_own_metrics():
    rule = RULE | {"metric": "root_mean_squared_error", "floor": 100}
    base, candidate = results("main", 0.1), results("this commit", 1.5, seed=8)
    tags = {"prediction_interval": ""}
    change = change_of(replace(candidate, tags=tags), replace(base, tags=tags), REGRESSION, rule)
    rows = candidate.predictions
    expected = float(np.sqrt(((rows.label - rows.prediction) ** 2).mean()))
    assert change.metrics.loc["root_mean_squared_error", "this commit"] == pytest.approx(expected) and is_worse(change)


def test_a_refused_commit_reads_what_mends_it_and_an_accepted_one_passes():
    change = change_of(results("this commit", 1.0, seed=7), results("main (1a2b3c4)", 0.1))
    refused, accepted = (commit_metrics.judged(change, "main (1a2b3c4)", flag) for flag in (False, True))
    assert refused.refused and "**Refused:** this commit lowers the metric." in refused.text
    assert "mlops ci metrics --accept (on a pull request: the label metrics-accepted)" in refused.text
    assert not accepted.refused and "**Accepted:**" in accepted.text and "To mend it" not in accepted.text


def test_the_base_is_where_the_branch_begins_and_an_unknown_one_names_the_command(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    def commit(message): git(tmp_path, *author, "commit", "-q", "--allow-empty", "-m", message)
    commit("first")
    first = git(tmp_path, "rev-parse", "HEAD")
    git(tmp_path, "switch", "-q", "-c", "feature")
    assert commit_metrics.base_commit(tmp_path, "main") == first and not commit_metrics.is_changed(tmp_path, first)
    commit("of the feature")
    git(tmp_path, "switch", "-q", "main")
    commit("of main")
    git(tmp_path, "switch", "-q", "feature")
    assert commit_metrics.base_commit(tmp_path, "main") == first and commit_metrics.is_changed(tmp_path, first)
    with pytest.raises(MlopsError) as caught: commit_metrics.base_commit(tmp_path, "origin/main")
    assert "git fetch origin main" in caught.value.hint
