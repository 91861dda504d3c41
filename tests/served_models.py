"""Models in folders, as the tests of serving load them: LightGBM versions of this project, and others of MLflow."""
import json
import warnings
from functools import cache
from pathlib import Path

import lightgbm
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from mlops_nb.features import feature_model
from mlops_nb.features.client import save_model
from mlops_nb.features.spec import TRAINING_DATA, Column, FeatureSpec
from mlops_nb.models import fitted_model

FEATURES = ("origin", "distance", "carrier", "delay")
CATEGORIES = {"origin": ["EWR", "JFK", "LGA"], "carrier": ["AA", "None", "UA"]}
ROWS = pd.DataFrame({"origin": ["EWR", "JFK", "LGA", None] * 150, "carrier": ["UA", "AA", "None"] * 200,
                     "distance": np.linspace(-500, 2500, 600), "delay": np.where(np.arange(600) % 5, 7.5, np.nan)})
LATE = (ROWS["origin"] == "JFK") ^ (ROWS["distance"] > 900) ^ (ROWS["carrier"] == "UA")
SIGNATURE = ModelSignature(Schema([ColSpec("string" if name in CATEGORIES else "double", name) for name in FEATURES]))


def encoding_of(problem: str) -> dict:
    encoding = {"kind": "lightgbm", "problem": problem, "features": list(FEATURES), "categories": CATEGORIES}
    return encoding | ({"calibration": {"slope": 0.8, "intercept": -0.3}} if problem == "binary" else {})


@cache
def booster(objective: str, label: str = "late"):  # -> lightgbm Booster
    "A booster on the features; the label is `late`, or the distance for a regression."
    encoding, settings = encoding_of("regression"), {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 3}
    target = LATE if label == "late" else ROWS["distance"] + 500 + ROWS["delay"].fillna(0)
    data = lightgbm.Dataset(fitted_model.encode(ROWS, encoding), target, categorical_feature=[0, 2], params=settings)
    return lightgbm.train({"objective": objective, **settings}, data, 12)


def fitted_files(folder: Path, problem: str) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"booster": str(folder / "booster.txt"), "encoding": str(folder / "encoding.json")}
    of_problem = booster("binary") if problem == "binary" else booster("regression", "distance")
    of_problem.save_model(files["booster"])
    Path(files["encoding"]).write_text(json.dumps(encoding_of(problem)))
    return files


def save_quietly(folder: Path, **options) -> Path:
    "Save a model of MLflow without its advice on input examples and type hints."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(folder, pip_requirements=[], **options)
    return folder


def plain_version(folder: Path, problem: str = "binary", **options) -> Path:
    "A fitted model without a feature spec."
    given = {"python_model": fitted_model.__file__, "artifacts": fitted_files(folder / "files", problem),
             "signature": SIGNATURE}
    return save_quietly(folder / "model", **given | options)


def version_with_spec(folder: Path, problem: str = "binary") -> Path:
    "A fitted model as the feature client logs it."
    spec = FeatureSpec(tuple(Column(name, TRAINING_DATA, "string" if name in CATEGORIES else "double")
                             for name in FEATURES))
    store = folder / "feature_store"
    save_model(store, mlflow.pyfunc, fitted_model.__file__, spec, artifacts=fitted_files(folder / "files", problem),
               signature=SIGNATURE, pip_requirements=[], input_example=ROWS[list(FEATURES)].head(3))
    return save_quietly(folder / "model", loader_module="feature_model", data_path=str(store), signature=SIGNATURE,
                        code_paths=[feature_model.__file__], input_example=ROWS[list(FEATURES)].head(3))


def code_version(folder: Path, predict: str,  # the body of `predict`
                 signature=None, **options) -> Path:
    "A model from code: `predict(context, model_input, params=None)`."
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"        {line}" for line in predict.splitlines())
    (folder / "code.py").write_text(
        "import mlflow\nimport numpy as np\nimport pandas as pd\n\nclass Model(mlflow.pyfunc.PythonModel):\n"
        f"    def predict(self, context, model_input, params=None):\n{lines}\n\nmlflow.models.set_model(Model())\n")
    return save_quietly(folder / "model", python_model=str(folder / "code.py"), signature=signature, **options)


class FakeFeatures:
    "The interface of RequestFeatures: a lookup of the distance by the origin, in a dict."
    required, outputs, is_local = ("origin", "carrier"), FEATURES, True
    distances = {"JFK": 1000.0, "LGA": 250}

    def complete(self, rows):
        from mlops_nb.serving.scoring_protocol import bad_request
        for row in rows:
            if "origin" not in row: raise bad_request("the request has no 'origin'")
        features = [{"distance": self.distances.get(row["origin"]), "delay": None, "carrier": None} for row in rows]
        return [{name: (values | row)[name] for name in FEATURES} for values, row in zip(features, rows, strict=True)]

    def close(self): pass
