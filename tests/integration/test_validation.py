"""Registered versions with one fault each: validation refuses each by its own check, and writes that to the version."""
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from mlops_nb.deployment import aliases, lineage, validation, validation_checks
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.features import client, training_set
from mlops_nb.features import spec as feature_spec
from mlops_nb.features.spec import TRAINING_DATA, Column, FeatureSpec
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models import metrics, model_card, registry
from mlops_nb.workflow import deploying, validating
from mlops_nb.workflow.rows import input_types
from mlops_nb.workflow.training import signature

pytestmark = [pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*type hint")]
NAME = "dev.flights.late_arrival"
COSTS = {"missed": 5, "false_warning": 1}
RULES = {"predicts": {}, "signature": {}, "tags": {}, "description": {}, "card": {}, "forbidden": {},
         "size": {"max_bytes": 1_000_000}, "held_out": {"min_rows": 5000},
         "metrics": {"roc_auc": {"threshold": 0.70, "greater_is_better": True}},
         "logged": {"tolerance": 0.000001}, "improvement": {"min_relative_change": 0.02},
         "calibration": {"max_error": 0.05}, "slices": {"min_rows": 500, "max_relative_change": 0.05},
         "latency": {"max_milliseconds": 180}, "robust": {}}
CODE = """
import time

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


def informative(rows):
    temperature = pd.to_numeric(rows.temperature).clip(-5, 5).fillna(-1.0).to_numpy("float64")
    return 1 / (1 + np.exp(-temperature))


def predict(rows):
    {body}


class Example(PythonModel):
    def predict(self, context, model_input, params=None): return predict(model_input)


set_model(Example())
"""
BODIES = {
    "good": "return informative(rows)",
    "raises": "raise RuntimeError('no trees')",
    "nan": "return np.full(len(rows), np.nan)",
    "shape": "return np.column_stack([informative(rows)] * 2)",
    "count": "return informative(rows)[1:] if len(rows) > 1 else informative(rows)",
    "unfair": "return np.where(rows.carrier == 'MQ', 0.7, informative(rows))",
    "weak": "return np.where(pd.to_numeric(rows.wind_gust) > 0, informative(rows), 0.3)",
    "shifted": "return np.clip(informative(rows) + 0.09, 0, 0.98)",
    "strict": "known = {'JFK': 1.0, 'EWR': 1.0, 'LGA': 1.0}\n"
              "    return informative(rows) * rows.origin.fillna('JFK').map(known).to_numpy()",
    "slow": "time.sleep(0.2 if len(rows) == 1 and rows.origin.notna().all() else 0)\n    return informative(rows)",
}


def held_out():
    random, count = np.random.default_rng(5), 8000
    rows = pd.DataFrame({name: ["x"] * count if kind == "string" else np.zeros(count)
                         for name, kind in input_types(FLIGHTS).items()})
    rows = rows.assign(temperature=random.normal(-1, 1.3, count), wind_gust=random.normal(size=count),
                       origin=random.choice(["JFK", "EWR", "LGA"], count),
                       carrier=random.choice(["AA", "UA", "MQ"], count, p=[0.5, 0.42, 0.08]),
                       hour_band="9-12", distance_band="2000+")
    label = (random.uniform(size=count) < 1 / (1 + np.exp(-rows.temperature))).astype(int).to_numpy()
    return validation_checks.HeldOut(rows, label, np.full(count, label.mean()), np.arange(count) // 320,
                                     FLIGHTS.problem, FLIGHTS.slice_columns)


HELD = held_out()
TAGS = {"as_of": "2013-04-01", "trained_through": "2013-03-03", "held_out_from": "2013-03-04",
        "held_out_to": "2013-03-31", "owner": "us", "threshold": "0.2", "baseline_threshold": "0.9",
        "git_sha": "abc", "read_versions": "{}"}


def true_metrics(body, held=HELD):
    "The metrics of a model with this code, as its run logs them; empty if it cannot predict."
    namespace = {}
    exec(CODE.replace("{body}", body), namespace)
    try: model = metrics.binary_metrics(held.label, namespace["predict"](held.rows), 0.2, COSTS)
    except Exception: return {}
    baseline = metrics.binary_metrics(held.label, held.baseline, 0.9, COSTS)
    return model | {f"baseline_{name}": value for name, value in baseline.items()}


def spec(types):
    return FeatureSpec(tuple(Column(name, TRAINING_DATA, kind) for name, kind in types.items()))


def logged_model(folder, body):  # -> mlflow ModelInfo
    "Log a model with this code and its feature spec to the active run."
    import mlflow
    code = folder / "example_model.py"
    code.write_text(CODE.replace("{body}", body))
    examples = training_set.TrainingSet(None, None, None, spec(input_types(FLIGHTS)), ())
    return client.log_model(examples, code, "late_arrival", mlflow.pyfunc, signature=signature(FLIGHTS),
                            input_example=HELD.rows[list(FLIGHTS.features)].head(3), pip_requirements=["mlflow"])


def version_of(world, body="good", tags=None, card=None, logged=None, description="It forecasts.", change=None,
               name=NAME, env=None):
    "Register a good version with the given changes."
    import mlflow
    env, tags = env or world.env, TAGS if tags is None else tags
    with mlflow.start_run(experiment_id=registry.experiment_id(env, "late_arrival"), tags=TAGS) as run:
        mlflow.log_param("held_out_days", 28)
        mlflow.log_metrics(true_metrics(BODIES[body]) | (logged or {}))
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
    governance = model_card.read_governance(env.root)
    generated = ("Purpose", "Owner", "Limits", "Licence of the data")
    sections = {name: "Text." for name in governance["required_sections"] if name not in generated}
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        def held_out(use_case, spark, env, tags, recorded):
            return HELD if validating.recorded_split(use_case, tags, recorded) else None
        patch.setattr(validating, "held_out", held_out)
        for name in (NAME, NAME.replace("dev.", "prod.")): registry.client(env).create_registered_model(name)
        card = model_card.model_card("late_arrival", governance, sections)
        yield SimpleNamespace(env=env, folder=folder, models={}, card=card, governance=governance)


def validated(world, version, env=None):
    "The results of the validation job, and the version after it."
    env = env or world.env
    pending = validation.begin_validation(env, version.name, version.version)
    checks = validation_checks.checks(RULES, validating.gather_evidence(FLIGHTS, None, env, pending))
    results = validation.validate_version(env, pending.name, pending.version, checks)
    return results, registry.get_version(env, version.name, version.version)


def with_signature(**parts):
    "A change of the signature in the file MLmodel; without parts the signature is removed."
    def change(folder):
        mlmodel = yaml.safe_load((folder / "MLmodel").read_text())
        if parts: mlmodel["signature"] |= parts
        else: del mlmodel["signature"]
        (folder / "MLmodel").write_text(yaml.safe_dump(mlmodel))
    return change


def without_spec(folder): (folder / "data/feature_store/feature_spec.yaml").unlink()
def without_file(folder): (folder / "data/feature_store/raw_model/MLmodel").unlink()
def other_spec(folder):
    other = feature_spec.to_dict(spec({**input_types(FLIGHTS), "tailnum": "string"}))
    (folder / "data/feature_store/feature_spec.yaml").write_text(yaml.safe_dump(other))
def without(*names): return {tag: value for tag, value in TAGS.items() if tag not in names}
def large(folder): (folder / "more.bin").write_bytes(bytes(1_000_000))


# tests/unit has every fault as data; the fast suite has the faults that only a stored model can have
FAULTS = [
    ("predicts", "raised RuntimeError: no trees", dict(body="raises")),
    ("predicts", "3 of 3 predictions are not finite", dict(body="nan")),
    ("predicts", "shape (3, 2), not (3,)", dict(body="shape")),
    ("predicts", "shape (2,), not (3,)", dict(body="count")),
    ("predicts", "the model cannot be loaded", dict(change=without_file)),
    ("signature", "the model has no signature", dict(change=with_signature())),
    ("signature", "inputs that are not features: tailnum",
     dict(change=with_signature(inputs='[{"type": "string", "name": "tailnum", "required": false}, '
                                       + signature(FLIGHTS).inputs.to_json()[1:]))),
    ("signature", "no readable feature spec", dict(change=without_spec)),
    ("signature", "tailnum (string in the spec stored with the model, absent among the inputs)",
     dict(change=other_spec)),
    ("tags", "the version has no tag 'git_sha'", dict(tags=without("git_sha"))),
    ("tags", "tag 'threshold' is '0.9', but '0.2' was recorded", dict(tags=TAGS | {"threshold": "0.9"})),
    ("tags", "tag 'trained_through' is '2013-01-01', but '2013-03-03'",
     dict(tags=TAGS | {"trained_through": "2013-01-01"})),
    ("description", "the version has no description", dict(description="")),
    ("card", "the card has no section 'Limits'", dict(card="only Limits")),
    ("size", "at most 1,000,000 are allowed", dict(change=large)),
    ("metrics", "roc_auc is 0.", dict(body="weak")),
    ("logged", "log_loss was logged as 0.010000, computed is 0.", dict(logged={"log_loss": 0.01})),
    ("calibration", "at most 0.05 is allowed", dict(body="shifted")),
    ("slices", "carrier MQ: log_loss", dict(body="unfair")),
    ("latency", "at most 180 ms is allowed", dict(body="slow")),
    ("robust", "on unseen categories: 50 of 50 predictions are not finite", dict(body="strict")),
]
STORED_MODEL_FAULTS = ("raised RuntimeError", "no readable feature spec", "at most 1,000,000")  # not in tests/unit


@pytest.mark.parametrize(("check", "reason", "given"), [
    pytest.param(*fault, marks=[] if fault[1].startswith(STORED_MODEL_FAULTS) else pytest.mark.slow)
    for fault in FAULTS],
    ids=lambda value: value if isinstance(value, str) else "")
def test_each_fault_is_refused_by_its_check_alone(world, check, reason, given):
    if given.get("card"): given = {"card": world.card.replace("## Limits", "## Other")}
    results, version = validated(world, version_of(world, **given))
    failures = validation.failures(results)
    assert {line.split(": ")[0] for line in failures} == {check}, failures
    assert reason in " ".join(failures)
    assert version.tags[validation.STATUS] == "FAILED"
    assert reason[:40] in version.tags[f"check_{check}"] and reason[:40] in version.description
    with pytest.raises(MlopsError, match="failed its validation"):
        validation.require_passed(NAME, version.version, results)


def test_a_good_version_passes_and_keeps_its_description_also_after_the_champion_was_deleted(world):
    deleted = version_of(world)
    registry.client(world.env).set_registered_model_alias(NAME, "champion", deleted.version)
    registry.client(world.env).delete_model_version(NAME, deleted.version)
    good = version_of(world)
    registry.client(world.env).set_model_version_tag(NAME, good.version, "check_old", "a check that no longer exists")
    results, good = validated(world, good)
    assert list(results) == list(RULES) and not any(results.values()), results
    check_tags = {tag: value for tag, value in good.tags.items() if tag.startswith("check_")}
    assert check_tags == {f"check_{name}": "passed" for name in RULES}
    assert good.tags[validation.STATUS] == "PASSED" and good.description.startswith("It forecasts.\n\n## Validation")


def test_forged_tags_and_metrics_do_not_change_the_verdict_and_a_refusal_moves_no_alias(world):
    "A worse version has the status, check tags and metrics of a good one."
    good = version_of(world)
    registry.client(world.env).set_registered_model_alias(NAME, "champion", good.version)
    forged_tags = TAGS | {validation.STATUS: "PASSED", "check_metrics": "passed"}
    forged = version_of(world, "weak", logged={"roc_auc": 0.9, "log_loss": 0.1}, tags=forged_tags)
    results, forged = validated(world, forged)
    assert "roc_auc is 0.6" in results["metrics"][0]
    assert [reason.split(" was ")[0] for reason in results["logged"]] == ["log_loss", "roc_auc"]
    assert forged.tags[validation.STATUS] == "FAILED" and "is required" in forged.tags["check_metrics"]
    assert aliases.points_to(world.env, NAME, "champion") == int(good.version)


def test_a_job_that_cannot_read_its_tables_leaves_no_earlier_pass(world, monkeypatch):
    version = version_of(world, tags=TAGS | {validation.STATUS: "PASSED"})
    def missing_table_version(*_): raise MlopsError("no version 3 of dev.flights.bronze_flights")
    monkeypatch.setattr(validating, "held_out", missing_table_version)
    with pytest.raises(MlopsError, match="no version 3"): validated(world, version)
    assert registry.get_version(world.env, NAME, version.version).tags[validation.STATUS] == "PENDING"


def test_dev_can_read_the_verdict_of_prod(world):
    prod = replace(load_env("prod"), state=world.folder, home="local", tracking_uri=world.env.tracking_uri,
                   registry_uri=world.env.registry_uri)
    name = prod.model("late_arrival")
    validated(world, version_of(world, "unfair", env=prod, name=name), prod)
    version = registry.get_version(world.env, name, 1)
    assert version.tags[validation.STATUS] == "FAILED"
    assert "carrier MQ" in version.tags["check_slices"] and "| slices | carrier MQ" in version.description
    with pytest.raises(MlopsError, match="target 'dev' may not write"): validation.begin_validation(world.env, name, 1)


def test_a_forbidden_feature_is_refused_by_that_check_alone(world):
    evidence = validating.gather_evidence(FLIGHTS, None, world.env, version_of(world))
    evidence = replace(evidence, governance=world.governance | {"forbidden_features": ["wind_gust"]})
    failures = validation.failures(validation.run_checks(validation_checks.checks(RULES, evidence)))
    assert failures == ["forbidden: feature 'wind_gust' is forbidden: its name contains 'wind_gust'"]


def test_too_few_held_out_flights_are_refused_by_that_check_alone(world, monkeypatch):
    too_few = validation_checks.HeldOut(HELD.rows.head(4800), HELD.label[:4800], HELD.baseline[:4800],
                                        HELD.days[:4800], FLIGHTS.problem, FLIGHTS.slice_columns)
    monkeypatch.setattr(validating, "held_out", lambda *_: too_few)
    results, version = validated(world, version_of(world, logged=true_metrics(BODIES["good"], too_few)))
    assert validation.failures(results) == ["held_out: 4,800 held-out rows, at least 5,000 are needed"]
    assert version.tags[validation.STATUS] == "FAILED"
    assert version.tags["check_held_out"].startswith("4,800 held-out rows")


def test_a_model_not_better_than_the_heuristic_is_refused_by_that_check_alone(world, monkeypatch):
    namespace = {}
    exec(CODE.replace("{body}", BODIES["good"]), namespace)
    prediction = namespace["predict"](HELD.rows)
    monkeypatch.setattr(validating, "held_out", lambda *_: replace(HELD, baseline=prediction))
    baseline = metrics.binary_metrics(HELD.label, prediction, 0.9, COSTS)
    logged = true_metrics(BODIES["good"]) | {f"baseline_{name}": value for name, value in baseline.items()}
    results, _ = validated(world, version_of(world, logged=logged))
    failures = validation.failures(results)
    assert len(failures) == 2
    assert all(line.startswith("improvement: log_loss against the baseline: unchanged") for line in failures)


def test_the_error_of_an_unreachable_registry_does_not_contain_the_password(world, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    down = replace(world.env, tracking_uri="http://me:secret@127.0.0.1:9", registry_uri="http://me:secret@127.0.0.1:9")
    try:
        with pytest.raises(MlopsError, match="no MLflow server answers at http://127.0.0.1:9: ") as caught:
            validation.begin_validation(down, NAME, 1)
        assert "secret" not in str(caught.value)
    finally: registry.client(world.env)


CHAIN = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Chain(PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return [text.upper() for text in model_input]


set_model(Chain())
"""


def logged_code(folder, source, **options):
    "Log code as a model, without the wrapper that `client.log_model` adds."
    import mlflow
    code = folder / "example_model.py"
    code.write_text(source)
    return mlflow.pyfunc.log_model(name="m", python_model=str(code), pip_requirements=["mlflow"], **options)


def chain(folder): return logged_code(folder, CHAIN, input_example=["a"])
def unsigned(folder): return logged_code(folder, CODE.replace("{body}", BODIES["good"]))
def regression(folder):
    body = "return 100 * rows.temperature.to_numpy('float64')"
    return logged_code(folder, CODE.replace("{body}", body), input_example=HELD.rows[["temperature"]].head(3))


def with_code(source):
    "A change of the model's code, which MLflow executes when it loads the model."
    def change(folder): next(folder.rglob("example_model.py")).write_text(source)
    return change


def emptied(folder):
    for path in folder.rglob("*"):
        if path.is_file(): path.unlink()


# by what another program or a hand did: the model, the tags of run and version, and the reasons that must be given
FOREIGN = {
    "text": (chain, {}, {"predicts": "the input example is a list", "signature": "the inputs have no names"}),
    "regression": (regression, {},
                   {"predicts": "are outside 0 to 1", "signature": "features missing from the inputs: "}),
    "no signature": (unsigned, {}, {"predicts": "no input example", "signature": "the model has no signature"}),
    "no files": (emptied, {}, {"predicts": "the model cannot be loaded", "signature": "not evaluated: "}),
    "exit": (with_code("import sys; sys.exit(0)"), {}, {"predicts": "cannot be loaded: SystemExit: 0"}),
    "no run": ("good", None, {"tags": "has no run", "held_out": "not evaluated: ", "metrics": "not evaluated: "}),
    "threshold": ("good", {"threshold": "high"}, {"metrics": "tag 'threshold' is 'high', not a number"}),
    "date": ("good", {"as_of": "yesterday"}, {"held_out": "not evaluated: the tags do not define"}),
    "tables": ("good", {"read_versions": "[1]"}, {"held_out": "not evaluated: the tags do not define"}),
    "days": ("good", {"held_out_days": "many"}, {"held_out": "not evaluated: the tags do not define"}),
    "card": ("good", {"card": b"\xff\xfe"}, {"card": "the card cannot be read: "}),
}
PREDICTS = ("date", "tables", "days", "card")  # versions that a comparison can still use
FAST = ("text", "exit", "no run", "threshold")


def foreign_version(world, model, given):
    "Register a version as another program, or a person by hand, can do it."
    import mlflow
    tags = TAGS | {name: value for name, value in (given or {}).items() if name in TAGS}
    with mlflow.start_run(experiment_id=registry.experiment_id(world.env, "late_arrival"), tags=tags) as run:
        mlflow.log_param("held_out_days", (given or {}).get("held_out_days", 28))
        if "card" in (given or {}):
            (world.folder / model_card.CARD).write_bytes(given["card"])
            mlflow.log_artifact(world.folder / model_card.CARD)
        is_logged = model in (chain, regression, unsigned)
        info = model(world.folder) if is_logged else logged_model(world.folder, BODIES["good"])
        files = Path(mlflow.artifacts.download_artifacts(info.model_uri))
        if callable(model) and not is_logged: model(files)
    if given is None: return registry.client(world.env).create_model_version(NAME, files.as_uri())  # no run, no tags
    return registry.client(world.env).create_model_version(NAME, f"models:/{info.model_id}", run.info.run_id, tags)


@pytest.mark.parametrize("fault", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
                                   for name in FOREIGN])
def test_a_version_that_another_program_registered_fails_with_reasons(world, fault):
    model, given, expected = FOREIGN[fault]
    version = foreign_version(world, model, given)
    results, version = validated(world, version)
    assert list(results) == list(RULES) and version.tags[validation.STATUS] == "FAILED"
    for check, reason in expected.items(): assert reason in " ".join(results[check]), results[check]
    assert not any("AttributeError" in reason or "KeyError" in reason for reason in sum(results.values(), []))
    evidence = validating.gather_evidence(FLIGHTS, None, world.env, version)
    for shown in (lambda: validation_checks.plot_metrics(evidence, RULES["metrics"]),  # the next cells of the notebook
                  lambda: validation_checks.slice_changes(evidence, 500)):
        with suppress(validation.NotEvaluated): shown()
    with pytest.raises(MlopsError, match="failed its validation, for"):
        validation.require_passed(NAME, version.version, results)
    assert lineage.lineage(world.env, version)["version"]["validation"] == "FAILED"
    if fault in PREDICTS: assert deploying.contender(FLIGHTS, version, HELD.rows).point == {"threshold": 0.2}
    else:
        with pytest.raises(MlopsError): deploying.contender(FLIGHTS, version, HELD.rows)  # of a comparison
