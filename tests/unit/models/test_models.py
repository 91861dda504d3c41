"""Metrics against simple reference implementations; registration that is killed between two steps."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb import conf
from mlops_nb.env import folder_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import calibration, evidence, intervals, metrics, registry, slices
from mlops_nb.models.day_resampling import number_days, resample
from mlops_nb.models.fingerprint import code_digest, data_digest, find_run, register_run
from mlops_nb.models.problem_types import BINARY, loss_change

COSTS = dict(missed=5, false_warning=1)
probabilities = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
scored_rows = st.lists(st.tuples(st.integers(0, 1), probabilities), min_size=2, max_size=40)


def has_both_labels(rows) -> bool: return len({label for label, _ in rows}) == 2


@given(scored_rows.filter(has_both_labels))
def test_the_cheapest_threshold_is_the_lowest_of_minimal_cost(rows):
    label, prediction = map(np.array, zip(*rows, strict=True))
    def cost(threshold): return sum(5 * (y and p < threshold) + (not y and p >= threshold) for y, p in rows)
    cheapest = metrics.cheapest_threshold(label, prediction, COSTS)
    assert cost(cheapest) == min(map(cost, prediction))
    assert cheapest == min(p for p in prediction if cost(p) == cost(cheapest))


@given(st.lists(st.integers(0, 10**6), min_size=40, max_size=40, unique=True),
       st.lists(st.integers(0, 1), min_size=40, max_size=40))
def test_calibration_error_is_the_mean_distance_in_tenths(millionths, label):
    rows = sorted(zip([m / 10**6 for m in millionths], label, strict=True))
    tenths = [rows[i:i + 4] for i in range(0, 40, 4)]
    expected = sum(abs(sum(p for p, _ in tenth) - sum(y for _, y in tenth)) for tenth in tenths) / 40
    error = metrics.calibration_error([y for _, y in rows], [p for p, _ in rows])
    assert error == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_one_constant_is_its_distance_from_the_share():
    assert metrics.calibration_error([1, 0, 0, 0], [0.5] * 4) == pytest.approx(0.25)


def test_metrics_by_hand():
    values = metrics.binary_metrics([1, 0, 1, 0], [0.8, 0.4, 0.3, 0.1], 0.35, COSTS)
    assert values["log_loss"] == pytest.approx(-np.mean(np.log([0.8, 0.6, 0.3, 0.9])))
    assert values["roc_auc"] == 0.75 and values["brier_score"] == pytest.approx((0.04 + 0.16 + 0.49 + 0.01) / 4)
    assert (values["precision_score"], values["recall_score"], values["business_cost"]) == (0.5, 0.5, (5 + 1) / 4)
    assert values["example_count"] == 4


@pytest.mark.parametrize("label", [[0, 0], [1, 1], [0, 2], [], [0, np.nan, 1]])
def test_labels_other_than_both_0_and_1_are_refused(label):
    with pytest.raises(MlopsError): metrics.binary_metrics(label, [0.5] * len(label), 0.5, COSTS)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -0.3), (1.0, 0.0), (1.7, 0.4)])
def test_calibration_recovers_slope_and_intercept(slope, intercept):
    rng = np.random.default_rng(1)
    uncalibrated = rng.beta(2, 5, 60_000)
    label = (rng.random(len(uncalibrated)) < calibration.calibrate(uncalibrated, slope, intercept)).astype(int)
    fitted = calibration.fit_calibration(label, uncalibrated)
    assert fitted["slope"] == pytest.approx(slope, abs=0.05)
    assert fitted["intercept"] == pytest.approx(intercept, abs=0.06)


@settings(max_examples=30)
@given(st.permutations(range(6)))
def test_the_digest_of_data_does_not_depend_on_the_order_of_rows(order):
    frame = pd.DataFrame({"a": ["x", "y", None, "x", "z", "z"], "b": [1.0, np.nan, 3.0, 4.0, 5.0, 5.0]})
    assert data_digest(frame.iloc[list(order)]) == data_digest(frame)


def test_the_digest_of_data_depends_on_every_value_name_and_row():
    frame = pd.DataFrame({"a": ["x", "y"], "b": [1.0, 2.0]})
    changed = [frame.rename(columns={"b": "c"}), frame.assign(b=[1.0, 2.0 + 1e-12]), frame.iloc[:1],
               pd.concat([frame, frame.iloc[:1]]), frame.assign(b=[2.0, 1.0]), frame[["b", "a"]],
               frame.assign(a=["x", None])]
    assert len({data_digest(f) for f in [frame, *changed]}) == 1 + len(changed)


def test_the_digest_of_code_changes_with_the_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "some_model_code.py"
    file.write_text("x = 1")
    before = code_digest("some_model_code")
    file.write_text("x = 2")
    assert before != code_digest("some_model_code")


def test_code_version_marks_uncommitted_changes(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "a").write_text("1")
    for arguments in (["init"], ["add", "a"], ["commit", "-m", "a"]): git(*arguments)
    env = folder_env(tmp_path)
    clean = evidence.code_version(env)
    (tmp_path / "a").write_text("2")
    assert (clean["git_dirty"], evidence.code_version(env)) == ("false", {**clean, "git_dirty": "true"})
    assert len(clean["git_sha"]) == 40


def test_configuration_errors_name_file_and_key(tmp_path):
    (tmp_path / "conf").mkdir()
    def problems(content): return conf.setting_problems(content, {"rounds": conf.A_COUNT})
    def read(): return conf.read_conf(tmp_path, "train.yml", problems)
    with pytest.raises(MlopsError, match="no file 'train.yml' in conf"): read()
    (tmp_path / "conf/train.yml").write_text("rounds: 3\nronds: 3\n")
    with pytest.raises(MlopsError, match="conf/train.yml:2: ronds: no key 'ronds'\n  did you mean"): read()
    (tmp_path / "conf/train.yml").write_text("rounds: [3\n")
    with pytest.raises(MlopsError, match="conf/train.yml:"): read()


# ---- registration

NAME = "dev.flights.late_arrival"


def logged_run(env, experiment, fingerprint, status="FINISHED"):
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    mlflow = registry.client(env)
    run = mlflow.create_run(experiment, tags={"fingerprint": fingerprint, "as_of": "2013-04-01"})
    model = mlflow.create_logged_model(experiment, "m", source_run_id=run.info.run_id)
    mlflow.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    mlflow.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    if status != "RUNNING": mlflow.set_terminated(run.info.run_id, status)
    return run.info.run_id


def test_an_unfinished_run_is_not_reused_and_is_closed(env):
    experiment = registry.experiment_id(env, "open")
    interrupted, failed = logged_run(env, experiment, "f", "RUNNING"), logged_run(env, experiment, "f", "FAILED")
    assert find_run(env, experiment, "f") is None
    def status(run_id): return registry.client(env).get_run(run_id).info.status
    assert (status(interrupted), status(failed)) == ("KILLED", "FAILED")
    finished = logged_run(env, experiment, "f")
    assert find_run(env, experiment, "f").info.run_id == finished
    assert find_run(env, experiment, "another") is None
    assert find_run(env, experiment, "f", lambda run: run.info.run_id != finished) is None


@pytest.mark.parametrize("killed_at", ["register_model", "set_tag", None])
def test_a_kill_during_registration_creates_no_second_version(env, monkeypatch, killed_at):
    import mlflow
    name = f"{NAME}_{killed_at}".lower()
    run_id = logged_run(env, registry.experiment_id(env, "kill"), "f")
    with monkeypatch.context() as patched:
        if killed_at == "register_model":  # after the version was registered
            real = mlflow.register_model
            patched.setattr(mlflow, "register_model", lambda *a, **k: (real(*a, **k), 1 / 0))
        if killed_at == "set_tag": patched.setattr(mlflow.MlflowClient, "set_tag", lambda *a, **k: 1 / 0)
        if killed_at:
            with pytest.raises(ZeroDivisionError): register_run(env, name, run_id, ["as_of"])
        else: register_run(env, name, run_id, ["as_of"])
    version = register_run(env, name, run_id, ["as_of"])
    assert registry.version_numbers(env, name) == [1]
    assert version.run_id == run_id and version.tags["as_of"] == "2013-04-01"
    assert registry.client(env).get_run(run_id).data.tags["model_version"] == "1"


def test_a_deleted_version_is_registered_again(env):
    run_id = logged_run(env, registry.experiment_id(env, "deleted"), "f")
    register_run(env, NAME + "_deleted", run_id, ["as_of"])
    registry.client(env).delete_model_version(NAME + "_deleted", "1")
    assert int(register_run(env, NAME + "_deleted", run_id, ["as_of"]).version) == 2


def test_registering_a_model_of_another_target_is_refused(env):
    run_id = logged_run(env, registry.experiment_id(env, "refused"), "f")
    with pytest.raises(MlopsError, match="target 'dev' may not write prod.flights.late_arrival"):
        register_run(env, "prod.flights.late_arrival", run_id, ["as_of"])
    assert registry.client(env).search_registered_models("name = 'prod.flights.late_arrival'") == []


HOLD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from mlops_nb.models import registry
from mlops_nb.env import load_env
with registry.lock(replace(load_env("dev"), state=Path(sys.argv[1]), home="local"), "m"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["../x", "../../../x", "/x", "a/b", "a\0", "..", ".", ""])
def test_a_lock_has_no_file_outside_of_its_folder(env, name):
    with pytest.raises(MlopsError, match="is not a valid name of a lock"), registry.lock(env, name): pass
    assert not (env.state / "x.lock").exists()


def test_each_name_of_three_long_parts_has_a_lock_of_its_own(env):
    names = [".".join(["x" * 255, "y" * 255, letter * 255]) for letter in "ab"]
    files = [registry.lock_file(env.state, name) for name in names]
    assert len(set(files)) == 2 and {file.parent for file in files} == {env.state / "locks"}
    assert registry.lock_file(env.state, "dev.flights.m") == env.state / "locks" / "dev.flights.m.lock"
    with registry.lock(env, names[0]): assert files[0].exists()


def test_the_lock_excludes_other_processes_and_a_kill_releases_it(env):
    command = [sys.executable, "-c", HOLD, str(env.state)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=env.root)
    message = "another process has held the lock of m for 0.1 seconds"
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MlopsError, match=message), registry.lock(env, "m", timeout=0.1): pass
        holder.kill()
    with registry.lock(env, "m", timeout=5): pass


# ---- fast metrics, intervals and slices

@settings(max_examples=30)
@given(scored_rows.filter(has_both_labels), st.floats(0, 1))
def test_the_fast_metrics_equal_those_of_scikit_learn(rows, threshold):
    label, prediction = map(np.array, zip(*rows, strict=True))
    expected = metrics.binary_metrics(label, prediction, threshold, COSTS)
    fast = metrics.fast_metrics(label, prediction, threshold, COSTS)
    assert {**fast, "example_count": len(label)} == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_95_percent_intervals_cover_the_true_value():
    "The true log loss is known; rows of one day share a random effect; 60 samples."
    rng, covered = np.random.default_rng(3), 0
    truth = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    for _ in range(60):
        days = np.repeat(np.arange(28), 50)
        shock = rng.normal(0, 0.1, 28)[days]
        label = (rng.random(len(days)) < 0.3 + shock).astype(int)
        numbered = number_days(days)
        statistics = intervals.metric_statistics(label, np.full(len(days), 0.3), 0.5, COSTS, numbered)
        result = resample(statistics["log_loss"][0], numbered.count)
        covered += result.low <= truth <= result.high
    assert covered >= 50  # a bootstrap of rows, which assumes independence, covers it in about 35


def test_the_interval_of_a_paired_change():
    rng = np.random.default_rng(5)
    days, p = np.repeat(np.arange(28), 200), rng.beta(2, 6, 5600)
    label = (rng.random(5600) < p).astype(int)
    new, old = p, np.clip(p * 1.2, 0.001, 0.99)
    change = loss_change(BINARY, label, new, old, days)
    assert change.low < change.value < change.high < 0
    assert change.value == pytest.approx(metrics.mean_log_loss(label, new) / metrics.mean_log_loss(label, old) - 1)
    same = loss_change(BINARY, label, p, p, days)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(MlopsError, match="at least 5 groups, not 1"): loss_change(BINARY, label, p, p, days * 0)


def test_small_slices_are_listed_without_a_log_loss():
    rows = pd.DataFrame({"origin": ["JFK"] * 600 + ["LGA"] * 20 + [None] * 5})
    label, days = np.arange(625) % 2, np.arange(625) % 7
    table = slices.slice_metrics(rows, label, {"model": np.full(625, 0.5)}, days, 500, BINARY).set_index("value")
    assert table.rows.to_dict() == {"JFK": 600, "LGA": 20, "nan": 5}
    assert table.log_loss.notna().to_dict() == {"JFK": True, "LGA": False, "nan": False}
    assert table.log_loss["JFK"] == pytest.approx(np.log(2))
