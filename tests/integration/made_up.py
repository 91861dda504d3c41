"""Versions with made-up predictions and a real deployment: each predicts the true class with another probability."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlops_nb.deployment import comparison, promotion
from mlops_nb.env import Env, load_env
from mlops_nb.models import registry
from mlops_nb.models.problem_types import BINARY

NAME = "dev.flights.late_arrival"
RULE = dict(mode="compare", metric="log_loss", greater_is_better=False, min_rows=100, min_relative_change=0.01,
            confidence=0.95, floor=0.9)
COSTS = dict(missed=5, false_warning=1)
LABEL, DAYS = np.tile([0, 0, 0, 1], 100), np.repeat(np.arange("2013-06-01", "2013-06-21", dtype="M8[D]"), 20)
TRUE_CLASS = {None: 0.5, 1: 0.6, 2: 0.8, 3: 0.7}  # probability of the true class by version; None is the baseline


def home(folder: Path) -> Env:
    "Target dev on Sail with a state in this folder."
    uri = f"sqlite:///{folder}/mlflow.db"
    return replace(load_env("dev"), state=Path(folder), lakehouse=f"{folder}/lakehouse", engine="sail", home="local",
                   tracking_uri=uri, registry_uri=uri)


def contender(number: int | None) -> comparison.Contender:
    "The predictions of a version, or of the baseline."
    name = f"v{number}" if number else "the baseline"
    probability = TRUE_CLASS[number]
    return comparison.Contender(name, np.where(LABEL == 1, probability, 1 - probability), {"threshold": 0.5})


def meet(version, champion) -> promotion.Match:
    incumbent = contender(int(champion.version) if champion else None)
    return promotion.Match(LABEL, DAYS, contender(int(version.version)), incumbent, BINARY)


def three_versions(env: Env) -> None:
    "Register versions 1 to 3, which have passed their validation."
    registry.client(env).create_registered_model(NAME)
    for as_of in ("2013-04-01", "2013-05-01", "2013-06-01"):
        tags = {"model_validation_status": "PASSED", "as_of": as_of}
        registry.client(env).create_model_version(NAME, source=str(env.state), tags=tags)


def deploy(env: Env, spark, number: int, meet=meet) -> str:
    "Compare a version with the Champion, as the task `deploy` does, and return the decision."
    return promotion.deploy(spark, env, registry.get_version(env, NAME, number), RULE, COSTS, meet)[0]
