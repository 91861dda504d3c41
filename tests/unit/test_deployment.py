"""The decision, and the aliases under kills, races and wrong wishes. The log is kept in a dict here; Spark's is tested elsewhere."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb import deployment, registry
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError

pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),  # MLflow's own, at import
              pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
COSTS = dict(missed=5, false_warning=1)
RULE = dict(metric="log_loss", greater_is_better=False, min_rows=100, min_relative_change=0.01)
LABEL = np.tile([0, 0, 0, 1], 100)


def sure(name, p): return deployment.Contender(name, np.where(LABEL == 1, p, 1 - p), 0.5)


@settings(deadline=None)
@given(st.floats(0.5, 0.99), st.floats(0.5, 0.99))
def test_the_decision_is_that_of_the_arithmetic(new, old):
    found = deployment.compare(LABEL, sure("v2", new), sure("v1", old), RULE, COSTS)
    assert found.decision == ("promote" if np.log(new) / np.log(old) <= 0.99 + 1e-12 else "keep")
    assert found.rows == 400 and list(found.metrics) == ["v2", "v1"]


def test_a_metric_of_which_more_is_better():
    rule = RULE | {"metric": "roc_auc", "greater_is_better": True}
    good, bad = sure("v2", 0.9), deployment.Contender("v1", np.tile([0.2, 0.2, 0.8, 0.8], 100), 0.5)
    assert deployment.compare(LABEL, good, bad, rule, COSTS).decision == "promote"
    assert deployment.compare(LABEL, bad, good, rule, COSTS).decision == "keep"


@pytest.mark.parametrize("label", [np.array([]), np.zeros(500, int), LABEL[:99]])
def test_too_little_to_compare_on_decides_nothing(label):
    of = lambda name: deployment.Contender(name, np.full(len(label), 0.3), 0.5)
    found = deployment.compare(label, of("v2"), of("v1"), RULE, COSTS)
    assert found.decision == "undecided" and f"{len(label)} rows" in found.reason and found.metrics.empty


NAME = "dev.flights.late_arrival"


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    return replace(load_env("dev"), state=folder, home="local", tracking_uri=uri, registry_uri=uri)


numbers = itertools.count()


@pytest.fixture
def name(env, monkeypatch):
    "A fresh model of three versions, and a log without Spark."
    log = {}
    monkeypatch.setattr(deployment, "read_log", lambda spark, env, name: [dict(row) for _, row in sorted(log.items())])
    monkeypatch.setattr(deployment, "write_log", lambda spark, env, row: log.update({row["move"]: dict(row)}))
    name = f"{NAME}_{next(numbers)}"
    registry.client(env).create_registered_model(name)
    for _ in range(3): registry.client(env).create_model_version(name, source=str(env.state))
    return name


def state(env, name):
    aliases = {alias: deployment.points_to(env, name, alias) for alias in ("champion", "challenger", "previous_champion")}
    return aliases, deployment.read_log(None, env, name)


def deploy(env, name, version, reason="better"):
    "What a deployment does, aliases only."
    deployment.move_alias(None, env, name, "challenger", version, "passed validation")
    deployment.move_alias(None, env, name, "champion", version, reason, expected=deployment.points_to(env, name, "champion"))


def test_moves_keep_the_previous_champion_and_are_recorded_in_order(env, name):
    for version in (1, 2, 3, 2): deploy(env, name, version)
    aliases, log = state(env, name)
    assert aliases == {"champion": 2, "challenger": 2, "previous_champion": 3}
    champions = [(row["from_version"], row["to_version"]) for row in log if row["alias"] == "champion"]
    assert champions == [(None, 1), (1, 2), (2, 3), (3, 2)]
    assert [row["move"] for row in log] == list(range(1, 9)) and {row["state"] for row in log} == {"done"}


def test_again_changes_nothing(env, name):
    deploy(env, name, 1); deploy(env, name, 2)
    before = state(env, name)
    deploy(env, name, 2)
    assert state(env, name) == before
    assert deployment.move_alias(None, env, name, "champion", 2, "once more") is False


class Killed(BaseException):
    "As sudden as SIGKILL for what is stored: no handler of ours catches it."


@pytest.mark.parametrize("effect", ["before", "after"])
@pytest.mark.parametrize("step", range(7))
def test_a_kill_at_any_step_then_the_same_again_ends_like_an_undisturbed_run(env, name, monkeypatch, step, effect):
    deploy(env, name, 1); deploy(env, name, 2)
    with monkeypatch.context() as patched:
        calls = itertools.count()
        def dying(real):
            def call(*given, **named):
                if next(calls) != step: return real(*given, **named)
                if effect == "after": real(*given, **named)
                raise Killed
            return call
        for function in ("write_log", "set_alias"): patched.setattr(deployment, function, dying(getattr(deployment, function)))
        with pytest.raises(Killed): deploy(env, name, 3)
    assert deployment.points_to(env, name, "champion") in (2, 3)  # never none
    deploy(env, name, 3)
    aliases, log = state(env, name)
    assert aliases == {"champion": 3, "challenger": 3, "previous_champion": 2}
    assert [(r["move"], r["alias"], r["from_version"], r["to_version"], r["state"]) for r in log] == [
        (1, "challenger", None, 1, "done"), (2, "champion", None, 1, "done"), (3, "challenger", 1, 2, "done"),
        (4, "champion", 1, 2, "done"), (5, "challenger", 2, 3, "done"), (6, "champion", 2, 3, "done")]


def test_an_undisturbed_deployment_has_seven_steps(env, name, monkeypatch):
    "Or the test above leaves some out."
    deploy(env, name, 1); deploy(env, name, 2)
    calls = []
    for function in ("write_log", "set_alias"):
        real = getattr(deployment, function)
        monkeypatch.setattr(deployment, function, lambda *given, real=real: (calls.append(real), real(*given)))
    deploy(env, name, 3)
    assert len(calls) == 7


def test_a_move_that_never_happened_gives_its_place_in_the_log_to_the_next(env, name, monkeypatch):
    deploy(env, name, 1)
    with monkeypatch.context() as patched:
        patched.setattr(deployment, "set_alias", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed): deployment.move_alias(None, env, name, "champion", 2, "wanted two")
    assert deployment.move_alias(None, env, name, "champion", 3, "wants three")
    log = state(env, name)[1]
    assert [(r["to_version"], r["reason"], r["state"]) for r in log if r["alias"] == "champion"] == [
        (1, "better", "done"), (3, "wants three", "done")]


def test_a_champion_that_was_not_compared_with_is_not_displaced(env, name):
    deploy(env, name, 1)
    deploy(env, name, 3)  # another deployment was faster
    with pytest.raises(MlopsError, match="champion of .* was version 1 when v2 was compared, and is 3 now"):
        deployment.move_alias(None, env, name, "champion", 2, "compared with v1", expected=1)
    with pytest.raises(MlopsError, match="was version None when v2 was compared, and is 3 now"):
        deployment.move_alias(None, env, name, "champion", 2, "there was none", expected=None)
    assert state(env, name)[0]["champion"] == 3


def test_what_does_not_exist_is_named(env, name):
    with pytest.raises(MlopsError, match=f"no alias 'champion' in model {name}\n  there are none"): deployment.champion(env, name)
    with pytest.raises(MlopsError, match="no version '9' in model .*\n  .*1, 2, 3"): deployment.move_alias(None, env, name, "champion", 9, "")
    with pytest.raises(MlopsError, match="no model 'dev.flights.late_arival'"): deployment.champion(env, "dev.flights.late_arival")
    with pytest.raises(MlopsError, match="no model is named"): deployment.move_alias(None, env, "", "champion", 1, "")
    with pytest.raises(MlopsError, match="whole number from 1 on, not 'v1'"): deployment.move_alias(None, env, name, "champion", "v1", "")
    assert state(env, name)[1] == []


def test_only_its_own_catalog(env, name):
    deploy(env, name, 1)
    prod = replace(env, target="prod", read=("prod",), write=("prod",))
    reader = replace(prod, read=("prod", "dev"))
    for alias in ("champion", "challenger"):
        with pytest.raises(MlopsError, match="target 'prod' may not write"): deployment.move_alias(None, reader, name, alias, 1, "")
    with pytest.raises(MlopsError, match="target 'prod' may not read"): deployment.champion(prod, name)
    assert int(deployment.champion(reader, name).version) == 1
