"""The exact model answers as MLflow's own scoring server does, which runs beside it as the oracle."""
import asyncio
import json
import math
import re
import warnings

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array
from served_models import FEATURES, FakeFeatures, code_version, version_with_spec

from mlops_nb.errors import MlopsError
from mlops_nb.models.scoring import load_pyfunc, predict_batch
from mlops_nb.serving.exact_model import ExactModel, failed_answer, public_text

TRIP = "when = model_input['when'].dt.dayofyear if 'when' in model_input else 0\n" \
       "flown = model_input['flown'].fillna(-1) if 'flown' in model_input else 0\n" \
       "urgent = model_input['urgent'].astype(bool) if 'urgent' in model_input else False\n" \
       "known = (model_input['origin'] == 'JFK').astype(float)\n" \
       "factor = (params or {}).get('factor', 1)\n" \
       "total = model_input['distance'] + flown + when + 10 * known + urgent + model_input['seats']\n" \
       "return (factor * total).to_numpy()"
COLUMNS = Schema([ColSpec("double", "distance"), ColSpec("string", "origin"), ColSpec("long", "seats"),
                  ColSpec("datetime", "when", required=False), ColSpec("double", "flown", required=False),
                  ColSpec("boolean", "urgent", required=False)])
MODELS = {  # by name: the body of predict, the signature
    "trip": (TRIP, ModelSignature(COLUMNS, params=ParamSchema([ParamSpec("factor", "double", 2.0)]))),
    "tensor": ("return model_input.sum(axis=(1, 2))",
               ModelSignature(Schema([TensorSpec(np.dtype("float32"), (-1, 2, 2))]))),
    "named tensors": ("return {'total': model_input['a'] + model_input['b'].sum(axis=1)}", ModelSignature(Schema(
        [TensorSpec(np.dtype("float64"), (-1,), "a"), TensorSpec(np.dtype("int64"), (-1, 2), "b")]))),
    "arrays": ("return [float(sum(values)) for values in model_input['values']]",
               ModelSignature(Schema([ColSpec(Array(DataType.double), "values")]))),
    "frame": ("return pd.DataFrame({'late': model_input['a'] > 1, 'at': pd.Timestamp('2013-01-01'), 'nan': np.nan})",
              ModelSignature(Schema([ColSpec("double", "a")]))),
    "unsigned": ("return np.asarray(model_input, dtype=float).sum(axis=1)", None),
    "unnamed columns": ("return model_input.iloc[:, 0] * 2",
                        ModelSignature(Schema([ColSpec("double"), ColSpec("long")]))),
}
ROW = {"distance": 100.5, "origin": "JFK", "seats": 3}
FULL = ROW | {"when": "2013-07-01T08:30:00", "flown": 20, "urgent": True}


def split(*rows, **others):
    return {"dataframe_split": {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}} | others


def trips(*rows):
    "The rows in every form."
    return [split(*rows), {"dataframe_records": list(rows)}, {"instances": list(rows)}, {"inputs": list(rows)},
            {"inputs": {name: [row[name] for row in rows] for name in rows[0]}}]


BODIES = {
    "trip": [
        *trips(ROW), *trips(ROW, ROW | {"seats": 1}), *trips(FULL), *trips(FULL, FULL | {"flown": None}),
        *trips(ROW | {"distance": 7}), *trips(ROW | {"when": "2013-07-01"}), *trips(ROW | {"when": None}),
        *trips(ROW | {"when": "2013-07-01T08:30:00Z"}), *trips(ROW | {"when": "soon"}), *trips(ROW | {"when": 0}),
        *trips(ROW | {"extra": "x"}), *trips(ROW | {"origin": None}), *trips(ROW | {"origin": 5}),
        *trips(ROW | {"distance": "100"}), *trips(ROW | {"distance": "far"}), *trips(ROW | {"distance": True}),
        *trips(ROW | {"distance": [1]}), *trips(ROW | {"distance": {}}), *trips(ROW | {"distance": math.nan}),
        *trips(ROW | {"distance": math.inf}), *trips(ROW | {"distance": 10**400}), *trips(ROW | {"distance": 2**70}),
        *trips(ROW | {"seats": 2.5}), *trips(ROW | {"seats": 2.0}), *trips(ROW | {"seats": None}),
        *trips(ROW | {"seats": 2**63}), *trips(ROW | {"urgent": None}), *trips(ROW | {"urgent": "no"}),
        *trips({"distance": 1.0}), *trips({"x": 1}), split(ROW, params={"factor": 3}),
        split(ROW, params={"factor": "x"}), split(ROW, params={"other": 1}), split(ROW, params=[1]),
        split(ROW, params=None), split(ROW, client_request_id="a"), split(ROW, unknown=1),
        split(ROW, signature_name="x"), split(ROW, messages=[]), {"dataframe_records": []},
        {"dataframe_records": {}}, {"dataframe_records": [1]}, {"dataframe_records": [ROW, {}]},
        {"dataframe_records": [ROW, [1]]}, {"dataframe_records": None}, {"dataframe_split": {"data": [[1]]}},
        {"dataframe_split": {"columns": list(ROW), "data": []}},
        {"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}},
        {"dataframe_split": {"columns": list(ROW), "index": [7], "data": [list(ROW.values())]}},
        {"dataframe_split": {"columns": list(ROW), "index": [7, 8], "data": [list(ROW.values())]}},
        {"dataframe_split": {"columns": [*ROW, "seats"], "data": [[*ROW.values(), 1]]}},
        {"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())], "more": 1}}, {"dataframe_split": []},
        {"instances": []}, {"instances": 3}, {"instances": [1, 2]}, {"instances": [ROW, {"distance": 1}]},
        {"inputs": "JFK"}, {"inputs": "/etc/passwd"}, {"inputs": {}},
        {"inputs": {"distance": [1, 2], "origin": ["JFK"], "seats": [1]}}],
    "tensor": [{form: value} for form in ("instances", "inputs") for value in (
        [[[1, 2], [3, 4]]], [[[1.5, 2], [3, 4]], [[0, 0], [0, 1]]], [[1, 2]], [[[1, 2], [3]]], [[["a", 2], [3, 4]]], [],
        [[[None, 2], [3, 4]]], 7, "x", {"a": [1]})] + [{"dataframe_split": {"columns": ["a"], "data": [[1.0]]}}],
    "named tensors": [{"inputs": {"a": [1, 2], "b": [[1, 2], [3, 4]]}}, {"instances": [{"a": 1, "b": [1, 2]}]},
                      {"inputs": {"a": [1.5]}}, {"inputs": {"a": [1], "b": [[1.5, 2]]}}, {"inputs": [1, 2]}],
    "arrays": [*trips({"values": [1, 2.5]}, {"values": [3.0]}), *trips({"values": None}), *trips({"values": ["a"]}),
               *trips({"values": []})],
    "frame": [{"dataframe_records": [{"a": 1}, {"a": 2}]}],
    "unsigned": [{"dataframe_records": [{"a": 1, "b": 2}]}, {"instances": [[1, 2], [3, 4]]}, {"inputs": [["x"]]},
                 {"dataframe_records": [{"a": "x"}]}, {"inputs": {"a": [1]}}],
    "unnamed columns": [{"dataframe_split": {"data": [[1, 2], [3, 4]]}}, {"dataframe_split": {"data": [[1]]}},
                        {"dataframe_split": {"columns": ["a", "b"], "data": [[1.5, 2]]}}, {"inputs": [[1, 2]]}],
}


def post(server, body: bytes) -> httpx.Response:
    "Send a body to an ASGI server of MLflow, in this process."
    async def send():
        transport = httpx.ASGITransport(server, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://mlflow") as client:
            return await client.post("/invocations", content=body, headers={"content-type": "application/json"})
    return asyncio.run(send())


@pytest.fixture(scope="module")
def models(tmp_path_factory):  # -> {name: (exact model, MLflow's server)}
    "Each model, and MLflow's scoring server with the same model."
    from mlflow.pyfunc import scoring_server
    folder, result = tmp_path_factory.mktemp("models"), {}
    for name, (predict, signature) in MODELS.items():
        exact = ExactModel(code_version(folder / name, predict, signature))
        server = scoring_server.init(mlflow.pyfunc.load_model(str(exact.folder)))
        result[name] = exact, server
    return result


@pytest.mark.parametrize("name", BODIES)
def test_answers_are_those_of_mlflows_server(models, name):
    exact, server = models[name]
    statuses = {200: 0, 400: 0}
    for request in BODIES[name]:
        body = json.dumps(request).encode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas, of odd times and numbers
            expected = post(server, body)
            answer = exact.invoke(body)
        assert answer.status == (200 if expected.status_code == 200 else 400), (body, answer, expected.text)
        statuses[answer.status] += 1
        if answer.status == 200: assert answer.body == expected.content, body
        else: assert_is_refusal(answer)
    assert statuses[200] > 0, "no body of this model was accepted"


def assert_is_refusal(answer):
    "An error body with a reason: no trace, no path, not the whole request."
    content = json.loads(answer.body)
    assert list(content) == ["error_code", "message"]
    assert content["error_code"].isupper()
    message = content["message"]
    assert 0 < len(message) <= 1001
    for word in ("Traceback", "/site-packages", "File \"", "mlops_nb", "Failed to predict data '"):
        assert word not in message


@pytest.mark.parametrize(("request_", "reason"), [
    ({"dataframe_records": [{"distance": 1.0}]},
     r"^Failed to enforce schema. Error: Model is missing inputs \['origin', 'seats'\]"),
    ({"dataframe_records": [ROW | {"distance": "far"}]}, "Failed to convert column distance to type 'float64'"),
    ({"dataframe_records": [ROW | {"when": "soon"}]}, "Failed to convert column when"),
    ({"dataframe_records": 1}, "Dataframe records format must be a list of records"),
    ({"dataframe_split": {"columns": ["a"]}}, "must have 'data' field"),
    (split(ROW, params={"factor": "x"}), "Invalid parameters found.*factor"),
    (split(ROW | {"seats": "a"}), "Failed to convert column seats")])
def test_the_reason_is_mlflows(models, request_, reason):
    message = json.loads(models["trip"][0].invoke(json.dumps(request_).encode()).body)["message"]
    assert re.search(reason, message), message


@pytest.mark.parametrize(("predict", "code", "reason"), [
    ("raise ValueError('no file /home/me/models/secret.txt')", "BAD_REQUEST", "ValueError: no file secret.txt"),
    ("raise SystemExit(3)", "BAD_REQUEST", "the model failed: SystemExit: 3"),
    ("raise MemoryError", "BAD_REQUEST", "MemoryError"),
    ("from mlflow.exceptions import MlflowException; raise MlflowException('too far')", "BAD_REQUEST", "too far"),
    ("from mlflow.exceptions import MlflowException as E; raise E.invalid_parameter_value('far')",
     "INVALID_PARAMETER_VALUE", "far"),
    ("import traceback\ntry: 1 / 0\nexcept Exception: raise ValueError('bad: ' + traceback.format_exc())",
     "BAD_REQUEST", "ValueError: bad:"),
    ("return [object()]", "BAD_REQUEST", "TypeError: Object of type object is not JSON serializable"),
    ("raise ValueError('x' * 100_000)", "BAD_REQUEST", "xxx…")])
def test_an_error_of_the_model_is_an_answer_with_its_reason(tmp_path, predict, code, reason):
    answer = ExactModel(code_version(tmp_path, predict)).invoke(b'{"dataframe_records": [{"a": 1}]}')
    assert answer.status == 400
    assert_is_refusal(answer) if "SystemExit" not in predict else None
    content = json.loads(answer.body)
    assert content["error_code"] == code
    assert reason in content["message"]


def test_paths_and_traces_are_taken_out_of_messages():
    assert public_text("no '/opt/app/models/m-1/tree.txt', no C:\\Users\\me\\a.txt") == "no 'tree.txt', no a.txt"
    assert public_text("see file:///srv/models/MLmodel") == "see MLmodel"
    for text in ("a/b", "2013/07/01", "https://www.mlflow.org/docs/latest/models.html", "1 / 2"):
        assert public_text(text) == text
    assert json.loads(failed_answer(RuntimeError("Traceback (most recent call last): ...")).body)["message"] == (
        "the model failed: RuntimeError:")


def test_deep_and_broken_bodies_are_refused(models):
    exact = models["trip"][0]
    cells = [b"[" * depth + b"]" * depth for depth in (50, 900, 100_000)]
    columns = b'"columns": ["distance", "origin", "seats"]'
    for cell in (*cells, b'{"a":' * 900 + b"1" + b"}" * 900):
        for body in (b'{"dataframe_split": {%s, "data": [[%s, "JFK", 1]]}}' % (columns, cell),
                     b'{"instances": [{"distance": %s}]}' % cell, b'{"inputs": %s}' % cell):
            answer = exact.invoke(body)
            assert answer.status == 400, body[:80]
            assert_is_refusal(answer)


def test_a_pickled_model_is_loaded_only_if_its_owner_allows_it(tmp_path, monkeypatch):
    from sklearn.linear_model import LinearRegression
    estimator = LinearRegression().fit(pd.DataFrame({"a": [1.0, 2.0]}), [1.0, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.save_model(estimator, tmp_path / "model", serialization_format="cloudpickle",
                                  signature=ModelSignature(Schema([ColSpec("double", "a")])), pip_requirements=[])
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    with pytest.raises(MlopsError, match="MLFLOW_ALLOW_PICKLE_DESERIALIZATION"): ExactModel(tmp_path / "model")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    answer = ExactModel(tmp_path / "model").invoke(b'{"dataframe_split": {"columns": ["a"], "data": [[3]]}}')
    assert json.loads(answer.body)["predictions"] == pytest.approx([5.0])


def test_a_model_that_fails_on_its_own_example_is_not_warm(tmp_path):
    options = {"input_example": pd.DataFrame({"a": [1.0, math.nan]})}
    good = code_version(tmp_path / "good", "return model_input['a'].to_numpy()", **options)
    bad = code_version(tmp_path / "bad", "return model_input['b'].to_numpy()", **options)
    picky = code_version(tmp_path / "picky", "raise ValueError('zero')", ModelSignature(COLUMNS))
    ExactModel(good).warm()
    ExactModel(picky).warm()  # it was logged without an example: no row is promised to work
    with pytest.raises(MlopsError, match="does not answer its own input example: .*KeyError: 'b'"):
        ExactModel(bad).warm()
    assert ExactModel(good).invoke(b'{"dataframe_records": [{"a": 4}]}').duration_ms > 0


@pytest.fixture(scope="module")
def with_features(tmp_path_factory):
    return ExactModel(version_with_spec(tmp_path_factory.mktemp("spec")), FakeFeatures())


def test_features_are_completed_and_scored_as_in_batch(with_features):
    import pyarrow as pa
    rows = [{"origin": "JFK", "carrier": "UA"}, {"origin": "LGA", "carrier": None, "delay": 5.0}, {"origin": "ZRH"}]
    with_features.warm()
    table = pa.Table.from_pylist(FakeFeatures().complete(rows))
    expected = predict_batch(load_pyfunc(str(with_features.folder)), table, FEATURES)
    for request in ({"dataframe_records": rows}, {"instances": rows}, {"inputs": rows}):
        assert json.loads(with_features.invoke(json.dumps(request).encode()).body)["predictions"] == expected.tolist()
    overridden = with_features.invoke(json.dumps({"instances": [rows[0] | {"distance": 250}]}).encode())
    assert json.loads(overridden.body)["predictions"][0] != expected[0]


@pytest.mark.parametrize(("request_", "reason"), [
    ({"dataframe_records": [{"carrier": "UA"}]}, "the request has no 'origin'"), ({"instances": [[1, 2]]}, "tensors"),
    ({"dataframe_records": []}, "the request has no rows"), ({"dataframe_split": {"data": []}}, "columns and data"),
    ({"dataframe_records": [{"origin": "JFK", "distance": "far"}]}, "the features do not fit the model's signature: "),
    ({"dataframe_records": [{"origin": "JFK", "distance": 1}, {"origin": "JFK", "distance": "far"}]}, "do not fit")])
def test_a_request_whose_features_cannot_be_completed_is_refused(with_features, request_, reason):
    answer = with_features.invoke(json.dumps(request_).encode())
    assert answer.status == 400
    assert reason in json.loads(answer.body)["message"]
