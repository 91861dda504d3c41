"""Models of every kind: what was fitted is what is read from its files, without this project and without pickle."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightgbm
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from mlops_nb.errors import MlopsError
from mlops_nb.models import fitted_model, learners
from mlops_nb.models.learners import LIGHTGBM, function_learner, sklearn_learner

FEATURES, LEVELS = ["size", "colour"], ["blue", "red"]
rng = np.random.default_rng(11)
ROWS = pd.DataFrame({"size": np.where(rng.random(300) < 0.1, np.nan, rng.normal(size=300)),
                     "colour": rng.choice(["blue", "red", None], 300)})
SCORE = ROWS["size"].fillna(0).to_numpy() + 2 * (ROWS.colour == "red").to_numpy()
LABEL = (SCORE + rng.normal(size=300) > 1).astype(int)
ODD = pd.DataFrame({"size": [np.nan, 1e9, -3.0], "colour": ["green", None, ""]})  # new texts, nulls
FUNCTIONS = '''
from dataclasses import dataclass
import numpy as np

@dataclass
class Line:
    base: float
    slope: float

def fit(frame, label, parameters):
    slope, base = np.polyfit(frame["size"].fillna(0), label, 1)
    return {"base": base, "slope": slope, "means": np.array([label.mean()]), "levels": ["a", None]}

def predict(state, frame):
    line = Line(state["base"], state["slope"])
    return np.clip(line.base + line.slope * frame["size"].fillna(0), 0.01, 0.99)
'''


def encoding_of(kind: str, problem: str, slope: float = 1.0) -> dict:
    encoding = {"kind": kind, "problem": problem, "features": FEATURES, "categories": {"colour": LEVELS}}
    return encoding | {"calibration": {"slope": slope, "intercept": 0.3}} if problem == "binary" else encoding


def pipeline(estimator):
    texts = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return make_pipeline(make_column_transformer((texts, ["colour"]), (SimpleImputer(), ["size"])), estimator)


def own_functions(folder: Path):
    file = folder / "own_functions.py"
    file.write_text(FUNCTIONS)
    return fitted_model.read_module(str(file))


def read_from(files: dict) -> fitted_model.FittedModel:
    model = fitted_model.FittedModel()
    model.load_context(SimpleNamespace(artifacts=files))
    return model


def trees(problem, **parameters):
    objective = {"binary": "binary", "regression": "regression"}[problem]
    return {"rounds": 5, "parameters": {"objective": objective, "verbose": -1, "num_leaves": 4, **parameters}}


ESTIMATORS = {
    "logistic": ("binary", lambda: pipeline(LogisticRegression())),
    "forest": ("binary", lambda: pipeline(RandomForestClassifier(5, random_state=1))),
    "histogram": ("binary", lambda: pipeline(HistGradientBoostingClassifier(max_iter=3))),
    "boosting": ("binary", lambda: pipeline(lightgbm.LGBMClassifier(n_estimators=3, verbose=-1)).set_output(
        transform="pandas")),
    "linear": ("regression", lambda: pipeline(LinearRegression())),
    "trees": ("regression", lambda: pipeline(RandomForestRegressor(5, random_state=1)))}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_that_is_read_predicts_like_scikit_learn(name, tmp_path):
    problem, make = ESTIMATORS[name]
    learner, label = sklearn_learner(make), LABEL if problem == "binary" else SCORE
    learner.check(problem, {"parameters": {}})
    encoding = encoding_of("sklearn", problem, slope=0.5)
    fitted = learner.fit(ROWS, label, encoding, {"parameters": {}})
    prediction = read_from(learner.write(tmp_path, fitted, encoding)).predict(None, ROWS)
    expected = make().fit(ROWS.fillna({"colour": np.nan}), label)
    if problem == "regression": assert np.allclose(prediction, expected.predict(ROWS.fillna({"colour": np.nan})))
    else:
        of_class = expected.predict_proba(ROWS.fillna({"colour": np.nan}))[:, 1]
        assert np.allclose(prediction, expit(0.5 * logit(np.clip(of_class, 1e-6, 1 - 1e-6)) + 0.3))
    assert prediction.dtype == np.float64 and prediction.shape == (300,)
    trusted = json.loads((tmp_path / "encoding.json").read_text())["trusted"]
    assert not fitted_model.foreign_types(trusted)


def test_probabilities_stay_as_they_are_without_calibration():
    p = np.array([0.0, 1e-9, 0.3, 1.0])
    assert np.array_equal(fitted_model.calibrated(p, {"slope": 1.0, "intercept": 0.0}), p)


@pytest.mark.parametrize("problem", ["binary", "regression"])
def test_a_booster_predicts_any_row_like_lightgbm(problem, tmp_path):
    encoding, label = encoding_of("lightgbm", problem, slope=0.5), LABEL if problem == "binary" else SCORE
    booster = LIGHTGBM.fit(ROWS, label, encoding, trees(problem, min_data_in_leaf=5))
    model = read_from(LIGHTGBM.write(tmp_path, booster, encoding))
    numbers = np.column_stack([ROWS["size"], ROWS.colour.map({"blue": 0, "red": 1})])
    expected = booster.predict(numbers)
    if problem == "binary": expected = expit(0.5 * logit(expected) + 0.3)
    assert np.allclose(model.predict(None, ROWS), expected)
    assert np.isfinite(model.predict(None, ODD)).all()
    assert model.predict(None, ODD.iloc[:0]).shape == (0,)


TEXTS = st.one_of(st.none(), st.sampled_from(["blue", "red", "green", ""]))
NUMBERS = st.one_of(st.none(), st.integers(-9, 9), st.floats(-1e6, 1e6))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(NUMBERS, TEXTS), max_size=6))
def test_encoding_and_decoding_give_the_known_values_back(pairs):
    frame = pd.DataFrame(pairs, columns=FEATURES, dtype=object)
    encoding = encoding_of("lightgbm", "binary")
    decoded = learners.decode(fitted_model.encode(frame, encoding), encoding)
    for (number, text), (other_number, other_text) in zip(pairs, decoded.itertuples(index=False), strict=True):
        assert np.isnan(other_number) if number is None else other_number == number
        assert other_text == text if text in LEVELS else pd.isna(other_text)
    columns = fitted_model.feature_columns(frame, encoding)
    assert columns.dtypes.tolist() == [np.float64, object]
    assert [None if pd.isna(text) else text for text in columns.colour] == [text for _, text in pairs]


def test_own_functions_are_read_with_their_state(tmp_path):
    module = own_functions(tmp_path)
    learner, encoding = function_learner(module.fit, module.predict), encoding_of("functions", "regression")
    fitted = learner.fit(ROWS, SCORE, encoding, {"parameters": {}})
    model = read_from(learner.write(tmp_path, fitted, encoding))
    slope, base = np.polyfit(ROWS["size"].fillna(0), SCORE, 1)
    assert np.allclose(model.predict(None, ROWS), (base + slope * ROWS["size"].fillna(0)).clip(0.01, 0.99))
    assert model.predict(None, ROWS.iloc[:0]).shape == (0,)


def test_versions_with_other_code_do_not_share_a_module(tmp_path):
    modules = []
    for number in (1, 2):
        file = tmp_path / f"{number}.py"
        file.write_text(f"VALUE = {number}")
        modules.append(fitted_model.read_module(str(file)))
    assert modules[0].__name__ != modules[1].__name__ and [module.VALUE for module in modules] == [1, 2]
    assert not list(tmp_path.rglob("__pycache__"))  # reading a version writes nothing beside it


@pytest.mark.parametrize("line", ["from mlops_nb.errors import MlopsError", "from . import other", "import mlops_nb"])
def test_a_file_that_imports_the_project_cannot_be_stored(line, tmp_path):
    file = tmp_path / "of_project.py"
    file.write_text(f"def predict(state, frame):\n    {line}\n    return frame['size']\n")
    module = fitted_model.read_module(str(file))
    with pytest.raises(MlopsError, match="imports .*\n.* import libraries only"):
        function_learner(module.predict, module.predict).check("binary", {"parameters": {}})


def doubled(values): return 2 * values


def test_types_of_other_libraries_are_neither_written_nor_read(tmp_path):
    make = sklearn_learner(lambda: make_pipeline(FunctionTransformer(doubled), LinearRegression()))
    encoding = {"kind": "sklearn", "problem": "regression", "features": ["size"], "categories": {}}
    fitted = make.fit(ROWS.dropna(), SCORE[ROWS.notna().all(axis=1)], encoding, {"parameters": {}})
    with pytest.raises(MlopsError, match="doubled"): make.write(tmp_path, fitted, encoding)
    with pytest.raises(ValueError, match="subprocess.Popen: only types of"):
        fitted_model.read_object(str(tmp_path / "estimator.skops"), ["numpy.dtype", "subprocess.Popen"])
    assert fitted_model.foreign_types(["sklearn_evil.Type", "numpy.dtype"]) == ["sklearn_evil.Type"]


def test_labels_of_one_class_are_an_error_of_the_rows():
    learner = sklearn_learner(LogisticRegression)
    with pytest.raises(MlopsError, match="all 300 labels to learn from are 1\n"):
        learner.fit(ROWS, np.ones(300), encoding_of("sklearn", "binary"), {"parameters": {}})


@pytest.mark.parametrize(("problem", "conf", "message"), [
    ("binary", trees("regression"), "the objective is 'regression'.*\n.*binary, cross_entropy"),
    ("regression", trees("binary"), "the objective is 'binary'.*\n.*poisson"),
    ("binary", trees("binary", sigmoid=2), "sigmoid is 2"),
    ("binary", trees("binary", num_leafs=3), "no parameter 'num_leafs'\n.*'num_leaf'"),
    ("binary", trees("binary") | {"rounds": True}, "rounds is True"),
    ("binary", trees("binary") | {"rounds": 1.5}, "rounds is 1.5")])
def test_lightgbm_refuses_settings_that_it_would_misread(problem, conf, message):
    with pytest.raises(MlopsError, match=message): LIGHTGBM.check(problem, conf)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", ["logistic", "trees"])
def test_estimated_contributions_add_up_to_each_prediction(name):
    problem, make = ESTIMATORS[name]
    learner, encoding = sklearn_learner(make), encoding_of("sklearn", problem)
    fitted = learner.fit(ROWS, LABEL if problem == "binary" else SCORE, encoding, {"parameters": {}})
    sample = learner.contributions(fitted, encoding, ROWS)
    prediction = fitted_model.predictions(fitted, encoding, sample.shown)
    assert sample.values.shape == (learners.EXPLAINED_ROWS, 2) and sample.total_rows == 300
    assert np.allclose(sample.values.sum(1) + sample.base, logit(prediction) if problem == "binary" else prediction)
    assert np.abs(sample.values).mean(0).min() > 0.1  # both features move the prediction


READ_WITHOUT_PROJECT = """
import json, sys
sys.modules["mlops_nb"] = None  # an import of the project is an ImportError
import mlflow, pandas as pd
rows = pd.read_json(sys.argv[1], orient="split", dtype={"colour": object})
print(json.dumps([mlflow.pyfunc.load_model(path).predict(rows).tolist() for path in sys.argv[2:]]))
"""


@pytest.mark.slow
def test_mlflow_serves_every_kind_without_this_project_and_without_pickle(tmp_path):
    import mlflow
    own = own_functions(tmp_path)
    kinds = {"lightgbm": (LIGHTGBM, trees("binary")), "functions": (function_learner(own.fit, own.predict), None),
             "sklearn": (sklearn_learner(ESTIMATORS["forest"][1]), None)}
    rows, expected, paths = ROWS.dropna().head(20), [], []
    for kind, (learner, conf) in kinds.items():
        encoding = encoding_of(kind, "binary")
        fitted = learner.fit(ROWS, LABEL, encoding, conf or {"parameters": {}})
        (tmp_path / kind).mkdir()
        mlflow.pyfunc.save_model(tmp_path / "models" / kind, python_model=fitted_model.__file__, pip_requirements=[],
                                 artifacts=learner.write(tmp_path / kind, fitted, encoding))
        expected.append(fitted_model.predictions(fitted, encoding, rows).tolist())
        paths.append(str(tmp_path / "models" / kind))
    rows.to_json(tmp_path / "rows.json", orient="split", double_precision=15)
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    result = subprocess.run([sys.executable, "-c", READ_WITHOUT_PROJECT, tmp_path / "rows.json", *paths],
                            capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert np.allclose(json.loads(result.stdout.splitlines()[-1]), expected)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pkl", ".pickle", ".joblib")]


def test_the_code_of_a_version_imports_libraries_only():
    modules = learners.imported_modules(Path(fitted_model.__file__).read_text())
    tops = {name.partition(".")[0] for name in modules}
    assert tops - set(sys.stdlib_module_names) == {"numpy", "pandas", "mlflow", "skops", "lightgbm"}
    assert not any(name.startswith(".") for name in modules)
    assert ast.parse(Path(fitted_model.__file__).read_text()).body[-1].value.func.id == "set_model"
