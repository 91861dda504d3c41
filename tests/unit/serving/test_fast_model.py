"""The fast model answers what the exact model answers, or nothing."""
import ast
import copy
import json
import math
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from served_models import CATEGORIES, FEATURES, SIGNATURE, FakeFeatures, code_version, plain_version, version_with_spec

from mlops_nb.errors import MlopsError
from mlops_nb.serving.exact_model import ExactModel
from mlops_nb.serving.fast_model import FastModel, code_definitions
from mlops_nb.serving.scoring_protocol import parsed_body

ROW = {"origin": "JFK", "distance": 1200.5, "carrier": "UA", "delay": None}
TEXTS = st.sampled_from([*CATEGORIES["origin"], *CATEGORIES["carrier"], "", "ZRH", "JFK\0", "jfk", "\ud800", "nan"])
CLEAN_TEXTS, CLEAN_NUMBERS = TEXTS | st.none(), st.none() | st.integers() | st.floats() | st.integers(-10**30, 10**400)
NESTED = st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
ODD = st.booleans() | st.text(max_size=3) | NESTED | st.sampled_from(["12.5", "1e3", " 7 ", "nan", "inf"])
CLEAN_ROWS = st.fixed_dictionaries({name: CLEAN_TEXTS if name in CATEGORIES else CLEAN_NUMBERS for name in FEATURES})
ODD_VALUES = {name: CLEAN_TEXTS | CLEAN_NUMBERS | ODD for name in (*FEATURES, "extra")}
ODD_ROWS = st.fixed_dictionaries({}, optional=ODD_VALUES)
FORMS = st.sampled_from(["dataframe_records", "instances", "inputs"])


def split(rows, columns=FEATURES, **others):
    data = [[row[name] for name in columns] for row in rows]
    return {"dataframe_split": {"columns": list(columns), "data": data} | others}


@pytest.fixture(scope="module", params=["plain", "with spec", "regression"])
def pair(request, tmp_path_factory):  # -> fast model, exact model
    "The two models of one folder; the spec is ignored, as of a model that gets all its features."
    save = version_with_spec if request.param == "with spec" else plain_version
    folder = save(tmp_path_factory.mktemp("version"), "regression" if request.param == "regression" else "binary")
    return FastModel(folder), ExactModel(folder)


def assert_same_or_none(pair, body: bytes) -> bool:  # whether the fast model answered
    "Compare the answers of both models."
    fast, exact = pair
    request = parsed_body(body)
    before = copy.deepcopy(request)
    answer = fast.invoke(request)
    assert repr(request) == repr(before), "another model may get the same request"
    if answer is None: return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas, of odd numbers
        expected = exact.invoke(body)
    assert (answer.status, expected.status) == (200, 200), (body, answer, expected)
    assert_same_predictions(answer.body, expected.body)
    return True


def assert_same_predictions(given: bytes, expected: bytes):
    (name, predictions), = json.loads(given).items()
    assert name == "predictions"
    assert given.decode() == json.dumps({"predictions": predictions})
    np.testing.assert_allclose(predictions, json.loads(expected)["predictions"], rtol=0, atol=1e-12, strict=True)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(CLEAN_ROWS, min_size=1, max_size=3), columns=st.permutations([*FEATURES, "extra"]))
@example(rows=[ROW | {"distance": 10**400}], columns=[*FEATURES])
@example(rows=[ROW | {"distance": -math.inf}, ROW | {"delay": math.nan}], columns=[*FEATURES])
@example(rows=[ROW | {"carrier": None}, ROW], columns=[*FEATURES])
def test_clean_rows_get_the_same_predictions(pair, rows, columns):
    rows = [row | {"extra": [row["delay"], {}]} for row in rows]
    bodies = [split(rows, columns), split(rows, columns, index=list(range(len(rows)))), {"dataframe_records": rows},
              {"instances": [{name: row[name] for name in columns if name != "extra"} for row in rows]}]
    fits = all(abs(value) < 1e308 for row in rows for value in row.values() if type(value) is int)
    for i, request in enumerate(bodies):
        is_fast = assert_same_or_none(pair, json.dumps(request).encode())
        if i < 3 and fits: assert is_fast, "a clean request is answered by the fast model"


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ODD_ROWS | CLEAN_ROWS, max_size=3), form=FORMS)
@example(rows=[ROW | {"carrier": None}], form="instances")  # NumPy makes the level 'None' of it
@example(rows=[ROW | {"origin": "JFK\0"}], form="instances")  # NumPy makes the level 'JFK' of it
@example(rows=[ROW, ROW | {"distance": True}], form="dataframe_records")
@example(rows=[ROW | {"distance": "12"}], form="dataframe_records")
@example(rows=[ROW, {**ROW, "extra": 1}], form="instances")
def test_odd_rows_get_the_same_predictions_or_are_left_to_the_exact_model(pair, rows, form):
    assert_same_or_none(pair, json.dumps({form: rows}).encode())


@pytest.mark.parametrize("request_", [
    split([ROW]) | {"params": {"a": 1}}, split([ROW]) | {"unknown": 1}, split([ROW]) | {"input": 1}, split([]),
    split([ROW], index=["a"]), split([ROW], index=[0, 1]), split([ROW], index={}), split([ROW], more=1),
    split([ROW], ["origin", "distance", "carrier"]), split([ROW], [*FEATURES, "origin"]),
    {"dataframe_split": {"columns": [*FEATURES, 4], "data": [[*ROW.values(), 1]]}},
    {"dataframe_split": {"columns": list(FEATURES), "data": [list(ROW.values())[:3]]}}, {"dataframe_split": None},
    {"dataframe_split": {"columns": list(FEATURES), "data": {}}}, {"dataframe_split": {"columns": {}, "data": []}},
    {"dataframe_split": {"data": [[1, 2, 3, 4]]}}, {"dataframe_split": {"columns": list(FEATURES), "data": [ROW]}},
    {"dataframe_records": []}, {"dataframe_records": ROW}, {"dataframe_records": [ROW, 1]}, {"dataframe_records": None},
    {"dataframe_records": [{}]}, {"instances": [[1, 2, 3, 4]]}, {"inputs": ROW}, {"inputs": [[1]]}, {"instances": 1}],
    ids=lambda request: json.dumps(request)[:60])
def test_what_is_not_clean_is_left_to_the_exact_model(pair, request_): assert pair[0].invoke(request_) is None


def test_a_request_may_have_a_name(pair):
    assert pair[0].invoke(split([ROW]) | {"client_request_id": "a"}).body == pair[0].invoke(split([ROW])).body


def test_columns_in_another_order_by_turns_and_from_threads(pair):
    fast, orders = pair[0], [[*FEATURES], [*reversed(FEATURES)], ["extra", *FEATURES]]
    rows = [ROW | {"distance": float(i), "extra": 1} for i in range(-400, 2400, 20)]
    expected = [fast.invoke({"dataframe_records": [row]}).body for row in rows]
    def bodies(order): return [fast.invoke(split([row], order)).body for row in rows]
    with ThreadPoolExecutor(6) as pool: answers = list(pool.map(bodies, orders * 4))
    assert answers == [expected] * 12


def test_a_closed_model_leaves_all_to_the_exact_one(tmp_path):
    fast = FastModel(plain_version(tmp_path))
    assert fast.invoke(split([ROW])).status == 200
    fast.close()
    assert fast.invoke(split([ROW])) is None


def test_looked_up_features_give_the_same_answers(tmp_path):
    folder = version_with_spec(tmp_path)
    pair = FastModel(folder, FakeFeatures()), ExactModel(folder, FakeFeatures())
    rows = [{"origin": "JFK", "carrier": "UA"}, {"origin": "LGA", "carrier": None, "delay": 5}, {"origin": "ZRH"},
            {"origin": "LGA", "distance": 2**53 + 1}, {"origin": "LGA", "distance": True}, {"origin": None}]
    for row in rows:
        columns = {name: [value] for name, value in row.items()}
        for request in ({"dataframe_records": [row]}, {"instances": [row]}, {"inputs": columns}):
            is_fast = assert_same_or_none(pair, json.dumps(request).encode())
            assert is_fast == (row.get("distance") != 2**53 + 1)
    assert assert_same_or_none(pair, json.dumps({"dataframe_records": rows[:3]}).encode())
    for request in ({"dataframe_records": [{"carrier": "UA"}]}, {"dataframe_split": {"data": []}}):
        body = json.dumps(request).encode()
        fast, exact = pair[0].invoke(parsed_body(body)), pair[1].invoke(body)
        assert (fast.status, fast.body) == (400, exact.body)
    assert pair[0].invoke({"instances": [[1.0]]}) is None is pair[0].invoke({"dataframe_records": []})


@pytest.mark.parametrize(("file", "old", "new"), [
    ("fitted_model.py", "slope * booster", "2 * slope * booster"), ("fitted_model.py", "codes < 0", "codes < 1"),
    ("MLmodel", '"double"', '"float"'), ("MLmodel", "from_type_hint: false", "from_type_hint: true"),
    ("artifacts/encoding.json", '"lightgbm"', '"sklearn"'), ("artifacts/encoding.json", '"binary"', '"ranking"'),
    ("artifacts/encoding.json", '"JFK"', '"EWR"'), ("artifacts/encoding.json", '"delay"', '"lateness"'),
    ("artifacts/booster.txt", "tree", "no tree"), ("artifacts/encoding.json", "{", "[")])
def test_a_version_that_differs_has_no_fast_path(tmp_path, capfd, file, old, new):
    folder = plain_version(tmp_path)
    assert FastModel.load(folder) is not None
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    assert FastModel.load(folder) is None


def test_other_models_have_no_fast_path(tmp_path):
    with pytest.raises(MlopsError, match="no LightGBM version of this project"):
        FastModel(code_version(tmp_path / "code", "return [1.0]", SIGNATURE))
    assert FastModel.load(plain_version(tmp_path / "unsigned", signature=None)) is None
    assert FastModel.load(tmp_path) is None
    folder = version_with_spec(tmp_path / "spec")
    code = folder / "code/feature_model.py"
    code.write_text(code.read_text().replace("return self.model.predict(", "return 2 * self.model.predict("))
    assert FastModel.load(folder) is None
    features = FakeFeatures()
    features.outputs = FEATURES[:2]
    with pytest.raises(MlopsError, match="the spec lacks"): FastModel(plain_version(tmp_path / "plain"), features)


def test_a_signature_with_params_and_optional_columns_is_fast_without_them(tmp_path):
    columns = [ColSpec("string" if name in CATEGORIES else "double", name, required=False) for name in FEATURES]
    signature = ModelSignature(Schema(columns), params=ParamSchema([ParamSpec("a", "double", 1.0)]))
    folder = plain_version(tmp_path, signature=signature)
    pair = FastModel(folder), ExactModel(folder)
    assert assert_same_or_none(pair, json.dumps({"dataframe_records": [ROW]}).encode())
    assert not assert_same_or_none(pair, json.dumps({"dataframe_records": [{"origin": "JFK"}]}).encode())


def test_a_version_of_databricks_client_is_answered_by_its_inner_model(tmp_path):
    folder = version_with_spec(tmp_path)
    mlmodel = (folder / "MLmodel").read_text()
    shutil.rmtree(folder / "code")
    (folder / "MLmodel").write_text(mlmodel.replace("module: feature_model", "module: databricks.feature_store.mlflow"))
    assert assert_same_or_none((FastModel(folder), ExactModel(folder)), json.dumps(split([ROW])).encode())


def test_code_is_compared_without_comments_and_docstrings():
    source = 'class A:\n    "One."\n    def b(self):\n        "Two."\n        return 1  # three\n'
    bare = "class A:\n    def b(self): return 1"
    assert code_definitions(source, ["A"]) == code_definitions(bare, ["A"]) == {"A": ast.dump(ast.parse(bare).body[0])}
    assert code_definitions(source, ["A"]) != code_definitions(source.replace("1", "2"), ["A"])
