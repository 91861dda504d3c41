"""Versions with one fault each, registered and loaded as any other: the gate refuses each by its own check, and says so on the version."""
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from mlops_nb.deployment import aliases, validation, validation_checks
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features import client, training_set
from mlops_nb.features.spec import TRAINING_DATA, Column, FeatureSpec
from mlops_nb.flights import train, validate
from mlops_nb.flights.feature_engineering import FEATURES, SLICES
from mlops_nb.models import metrics, model_card, registry

pytestmark = [pytest.mark.filterwarnings("ignore:.*IProgress not found"), pytest.mark.filterwarnings("ignore:.*type hint")]
NAME = "dev.flights.late_arrival"
COSTS = {"missed": 5, "false_warning": 1}
RULES = {"predicts": {}, "signature": {}, "tags": {}, "description": {}, "card": {}, "forbidden": {}, "size": {"max_bytes": 1_000_000},
         "held_out": {"min_rows": 5000}, "metrics": {"roc_auc": {"threshold": 0.70, "greater_is_better": True}},
         "logged": {"tolerance": 0.000001}, "improvement": {"min_relative_change": 0.02}, "calibration": {"max_error": 0.05},
         "slices": {"min_rows": 500, "max_relative_change": 0.05}, "latency": {"max_milliseconds": 180}, "robust": {}}
CODE = """
import time

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


def known(rows): return 1 / (1 + np.exp(-pd.to_numeric(rows.temperature).clip(-5, 5).fillna(-1.0).to_numpy("float64")))


def answer(rows):
    {body}


class Crafted(PythonModel):
    def predict(self, context, model_input, params=None): return answer(model_input)


set_model(Crafted())
"""
BODIES = {
    "good": "return known(rows)",
    "raises": "raise RuntimeError('no trees')",
    "nan": "return np.full(len(rows), np.nan)",
    "shape": "return np.column_stack([known(rows)] * 2)",
    "count": "return known(rows)[1:] if len(rows) > 1 else known(rows)",
    "unfair": "return np.where(rows.carrier == 'MQ', 0.7, known(rows))",
    "weak": "return np.where(pd.to_numeric(rows.wind_gust) > 0, known(rows), 0.3)",
    "shifted": "return np.clip(known(rows) + 0.09, 0, 0.98)",
    "strict": "return known(rows) * rows.origin.fillna('JFK').map({'JFK': 1.0, 'EWR': 1.0, 'LGA': 1.0}).to_numpy()",
    "slow": "time.sleep(0.2 if len(rows) == 1 and rows.origin.notna().all() else 0)\n    return known(rows)",
}


def held_out():
    random, count = np.random.default_rng(5), 8000
    rows = pd.DataFrame({name: ["x"] * count if kind == "string" else np.zeros(count) for name, kind in train.input_types().items()})
    rows = rows.assign(temperature=random.normal(-1, 1.3, count), wind_gust=random.normal(size=count), origin=random.choice(["JFK", "EWR", "LGA"], count),
                       carrier=random.choice(["AA", "UA", "MQ"], count, p=[0.5, 0.42, 0.08]), hour_band="9-12", distance_band="2000+")
    label = (random.uniform(size=count) < 1 / (1 + np.exp(-rows.temperature))).astype(int).to_numpy()
    return validation_checks.HeldOut(rows, label, np.full(count, label.mean()), np.arange(count) // 400, SLICES)


HELD = held_out()
TAGS = {"as_of": "2013-04-01", "trained_through": "2013-03-03", "held_out_from": "2013-03-04", "held_out_to": "2013-03-31", "owner": "us",
        "threshold": "0.2", "baseline_threshold": "0.9", "git_sha": "abc", "read_versions": "{}"}


def honest(body, held=HELD):
    "The metrics of a model by what its code says, as a run would log them; none if it says nothing."
    space = {}
    exec(CODE.replace("{body}", body), space)
    try: own = metrics.binary_metrics(held.label, space["answer"](held.rows), 0.2, COSTS)
    except Exception: return {}
    return own | {f"baseline_{k}": v for k, v in metrics.binary_metrics(held.label, held.baseline, 0.9, COSTS).items()}


def spec(types):
    return FeatureSpec(tuple(Column(name, TRAINING_DATA, kind) for name, kind in types.items()))


def logged_model(folder, body):  # -> mlflow ModelInfo
    "A model of these few lines, with its spec, in the active run."
    import mlflow
    code = folder / "crafted.py"
    code.write_text(CODE.replace("{body}", body))
    return client.log_model(training_set.TrainingSet(None, None, None, spec(train.input_types()), ()), code, "late_arrival", mlflow.pyfunc,
                              signature=train.signature(), input_example=HELD.rows[FEATURES].head(3),
                              pip_requirements=["mlflow"])


def version_of(world, body="good", tags=None, card=None, said=None, description="It forecasts.", change=None, name=NAME, env=None):
    "A registered version, good but for what is given."
    import mlflow
    env, tags = env or world.env, TAGS if tags is None else tags
    with mlflow.start_run(experiment_id=registry.experiment_id(env, "late_arrival"), tags=TAGS) as run:
        mlflow.log_param("held_out_days", 28)
        mlflow.log_metrics(honest(BODIES[body]) | (said or {}))
        mlflow.log_text(card or world.card, model_card.CARD)
        if change or body not in world.models: model = logged_model(world.folder, BODIES[body]).model_id
        if change: change(Path(mlflow.artifacts.download_artifacts(f"models:/{model}")))
        elif body in world.models: model = world.models[body]
        else: world.models[body] = model
    version = registry.client(env).create_model_version(name, f"models:/{model}", run.info.run_id, tags)
    registry.client(env).update_model_version(name, version.version, description)
    return registry.get_version(env, name, version.version)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "An empty registry, and held-out flights that are not read from tables."
    folder = tmp_path_factory.mktemp("gate")
    uri = f"sqlite:///{folder}/mlflow.db"
    env = replace(load_env("dev"), state=folder, home="local", tracking_uri=uri, registry_uri=uri)
    demanded = model_card.read_governance(env.root)
    sections = {name: "Said." for name in demanded["required_sections"] if name not in ("Purpose", "Owner", "Limits", "Licence of the data")}
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        patch.setattr(validate, "held_out", lambda spark, env, tags, recorded: HELD if validate.periods_of(tags, recorded) else None)
        for name in (NAME, NAME.replace("dev.", "prod.")): registry.client(env).create_registered_model(name)
        yield SimpleNamespace(env=env, folder=folder, models={}, card=model_card.model_card("late_arrival", demanded, sections), demanded=demanded)


def judged(world, version, env=None):
    "What the job does with a version, and the version after it."
    env = env or world.env
    begun = validation.begin_validation(env, version.name, version.version)
    results = validation.validate_version(env, begun.name, begun.version, validation_checks.checks(RULES, validate.gather(None, env, begun)))
    return results, registry.get_version(env, version.name, version.version)


def edited(**words):
    "A change of what the model says of itself."
    def change(folder):
        said = yaml.safe_load((folder / "MLmodel").read_text())
        said["signature"] |= words
        (folder / "MLmodel").write_text(yaml.safe_dump({k: v for k, v in said.items() if k != "signature" or words}))
    return change


def without_spec(folder): (folder / "data/feature_store/feature_spec.yaml").unlink()
def without_file(folder): (folder / "data/feature_store/raw_model/MLmodel").unlink()
def other_spec(folder): (folder / "data/feature_store/feature_spec.yaml").write_text(yaml.safe_dump(client.to_dict(spec({**train.input_types(), "tailnum": "string"}))))
def without(*names): return {tag: value for tag, value in TAGS.items() if tag not in names}
def large(folder): (folder / "more.bin").write_bytes(bytes(1_000_000))


# unit/test_gate.py has every fault on predictions alone; in the fast suite are those that a stored model brings with it
FAULTS = [
    ("predicts", "raised RuntimeError: no trees", dict(body="raises")),
    ("predicts", "3 of 3 predictions are not finite", dict(body="nan")),
    ("predicts", "shape (3, 2), not (3,)", dict(body="shape")),
    ("predicts", "shape (2,), not (3,)", dict(body="count")),
    ("predicts", "the model cannot be loaded", dict(change=without_file)),
    ("signature", "the model has no signature", dict(change=edited())),
    ("signature", "inputs that are no features: tailnum",
     dict(change=edited(inputs='[{"type": "string", "name": "tailnum", "required": false}, ' + train.signature().inputs.to_json()[1:]))),
    ("signature", "no feature spec", dict(change=without_spec)),
    ("signature", "tailnum (string in the spec stored with the model, absent among the inputs)", dict(change=other_spec)),
    ("tags", "the version has no tag 'git_sha'", dict(tags=without("git_sha"))),
    ("tags", "tag 'threshold' is '0.9', but '0.2' was recorded", dict(tags=TAGS | {"threshold": "0.9"})),
    ("tags", "tag 'trained_through' is '2013-01-01', but '2013-03-03'", dict(tags=TAGS | {"trained_through": "2013-01-01"})),
    ("description", "the version has no description", dict(description="")),
    ("card", "the card has no section 'Limits'", dict(card="only Limits")),
    ("size", "at most 1,000,000 are allowed", dict(change=large)),
    ("metrics", "roc_auc value threshold check failed", dict(body="weak")),
    ("logged", "log_loss was logged as 0.010000, computed it is 0.", dict(said={"log_loss": 0.01})),
    ("calibration", "at most 0.05 is allowed", dict(body="shifted")),
    ("slices", "carrier MQ: log_loss", dict(body="unfair")),
    ("latency", "at most 180 are allowed", dict(body="slow")),
    ("robust", "on unseen categories: 50 of 50 predictions are not finite", dict(body="strict")),
]
OF_THE_FILE = ("raised RuntimeError", "no feature spec", "at most 1,000,000")  # what only a stored model shows; all else is in tests/unit


@pytest.mark.parametrize(("check", "reason", "given"), [
    pytest.param(*fault, marks=[] if any(words in fault[1] for words in OF_THE_FILE) else pytest.mark.slow) for fault in FAULTS],
    ids=lambda value: value if isinstance(value, str) else "")
def test_each_fault_is_refused_by_its_check_alone(world, check, reason, given):
    if given.get("card"): given = {"card": world.card.replace("## Limits", "## Other")}
    results, version = judged(world, version_of(world, **given))
    told = validation.failures(results)
    assert {line.split(": ")[0] for line in told} == {check}, told
    assert reason in " ".join(told)
    assert version.tags[validation.STATUS] == "FAILED" and reason[:40] in version.tags[f"check_{check}"] and reason[:40] in version.description
    with pytest.raises(MlopsError, match="failed its validation"): validation.require_passed(NAME, version.version, results)


def test_a_good_version_passes_wherever_a_champion_was_deleted_and_keeps_its_page(world):
    gone = version_of(world)
    registry.client(world.env).set_registered_model_alias(NAME, "champion", gone.version)
    registry.client(world.env).delete_model_version(NAME, gone.version)
    good = version_of(world)
    registry.client(world.env).set_model_version_tag(NAME, good.version, "check_of_old", "a check that is no more")
    results, good = judged(world, good)
    assert list(results) == list(RULES) and not any(results.values()), results
    assert {k: v for k, v in good.tags.items() if k.startswith("check_")} == {f"check_{name}": "passed" for name in RULES}
    assert good.tags[validation.STATUS] == "PASSED" and good.description.startswith("It forecasts.\n\n## Validation")


def test_what_is_written_by_hand_changes_nothing_and_a_refusal_moves_no_alias(world):
    "Status, check tags and metrics of a worse version are made those of a good one; the Champion stays."
    good = version_of(world)
    registry.client(world.env).set_registered_model_alias(NAME, "champion", good.version)
    forged = version_of(world, "weak", said={"roc_auc": 0.9, "log_loss": 0.1}, tags=TAGS | {validation.STATUS: "PASSED", "check_metrics": "passed"})
    results, forged = judged(world, forged)
    assert "roc_auc = 0.6" in results["metrics"][0] and [reason.split(" was ")[0] for reason in results["logged"]] == ["log_loss", "roc_auc"]
    assert forged.tags[validation.STATUS] == "FAILED" and "threshold check failed" in forged.tags["check_metrics"]
    assert aliases.points_to(world.env, NAME, "champion") == int(good.version)


def test_a_job_that_cannot_read_leaves_no_pass_of_earlier(world, monkeypatch):
    version = version_of(world, tags=TAGS | {validation.STATUS: "PASSED"})
    def gone(*_): raise MlopsError("no version 3 of dev.flights.bronze_flights")
    monkeypatch.setattr(validate, "held_out", gone)
    with pytest.raises(MlopsError, match="no version 3"): judged(world, version)
    assert registry.get_version(world.env, NAME, version.version).tags[validation.STATUS] == "PENDING"


def test_the_verdict_of_prod_is_read_from_dev(world):
    prod = replace(load_env("prod"), state=world.folder, home="local", tracking_uri=world.env.tracking_uri, registry_uri=world.env.registry_uri)
    name = prod.model("late_arrival")
    judged(world, version_of(world, "unfair", env=prod, name=name), prod)
    seen = registry.get_version(world.env, name, 1)
    assert seen.tags[validation.STATUS] == "FAILED" and "carrier MQ" in seen.tags["check_slices"] and "| slices | carrier MQ" in seen.description
    with pytest.raises(MlopsError, match="target 'dev' may not write"): validation.begin_validation(world.env, name, 1)


def test_a_forbidden_feature_is_refused_by_that_check_alone(world):
    found = validate.gather(None, world.env, version_of(world))
    found = replace(found, governance=world.demanded | {"forbidden_features": ["wind_gust"]})
    told = validation.failures(validation.run_checks(validation_checks.checks(RULES, found)))
    assert told == ["forbidden: feature 'wind_gust' is forbidden: its name holds 'wind_gust'"]


def test_one_that_was_judged_on_too_few_flights_is_refused_by_that_check_alone(world, monkeypatch):
    few = validation_checks.HeldOut(HELD.rows.head(4800), HELD.label[:4800], HELD.baseline[:4800], HELD.days[:4800], SLICES)
    monkeypatch.setattr(validate, "held_out", lambda *_: few)
    results, version = judged(world, version_of(world, said=honest(BODIES["good"], few)))
    assert validation.failures(results) == ["held_out: 4,800 held-out rows, at least 5,000 are needed"]
    assert version.tags[validation.STATUS] == "FAILED" and version.tags["check_held_out"].startswith("4,800 held-out rows")


def test_one_that_is_no_better_than_the_heuristic_is_refused_by_that_check_alone(world, monkeypatch):
    space = {}
    exec(CODE.replace("{body}", BODIES["good"]), space)
    said = honest(BODIES["good"])
    monkeypatch.setattr(validate, "held_out", lambda *_: replace(HELD, baseline=space["answer"](HELD.rows)))
    same = metrics.binary_metrics(HELD.label, space["answer"](HELD.rows), 0.9, COSTS)
    results, _ = judged(world, version_of(world, said=said | {f"baseline_{k}": v for k, v in same.items()}))
    told = validation.failures(results)
    assert len(told) == 2 and all(line.startswith("improvement: log_loss changes by +0.0%") for line in told)


def test_a_registry_that_is_down_is_told_in_a_sentence_without_the_password(world, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    down = replace(world.env, tracking_uri="http://me:secret@127.0.0.1:9", registry_uri="http://me:secret@127.0.0.1:9")
    try:
        with pytest.raises(MlopsError, match="the registry at http://127.0.0.1:9 does not answer as it should") as caught:
            validation.begin_validation(down, NAME, 1)
        assert "secret" not in str(caught.value)
    finally: registry.client(world.env)
