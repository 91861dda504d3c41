"""Scoring batches with one version of a model: what the model is given, and what it may return."""
import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.types import ColSpec, Schema

from mlops_nb.errors import MlopsError
from mlops_nb.models import scoring


def zeros(frame): return np.zeros(len(frame))


def model(*columns, predict=zeros):
    "Return a model with a signature of (type, name) columns."
    schema = Schema([ColSpec(kind, name) for kind, name in columns]) if columns else None
    return SimpleNamespace(metadata=SimpleNamespace(get_input_schema=lambda: schema), predict=predict)


@given(st.lists(st.one_of(st.none(), st.integers(-2**31, 2**31 - 1)), max_size=20))
def test_numbers_are_cast_to_the_types_of_the_signature(values):
    frame = scoring.model_input(model(("double", "x")), pa.table({"x": pa.array(values, pa.int32())}), ("x",))
    assert frame.x.dtype == "float64" and [None if np.isnan(v) else v for v in frame.x] == values


def test_columns_come_in_the_order_of_the_features():
    batch = pa.record_batch({"b": [1], "c": ["u"], "a": [2.5]})
    frame = scoring.model_input(model(("double", "a"), ("long", "b"), ("string", "c")), batch, ("c", "a", "b"))
    assert list(frame) == ["c", "a", "b"] and frame.iloc[0].tolist() == ["u", 2.5, 1]


def test_a_number_that_would_lose_digits_is_an_error():
    with pytest.raises(pa.ArrowInvalid): scoring.model_input(model(("long", "x")), pa.table({"x": [1.5]}), ("x",))


def test_without_a_signature_columns_stay_as_they_are():
    assert scoring.model_input(model(), pa.table({"x": pa.array([1], pa.int32())}), ("x",)).x.dtype == "int32"


@pytest.mark.parametrize("predictions", [[0.1, 0.2], np.array([[0.1], [0.2]]), pd.Series([0.1, 0.2]),
                                         pd.DataFrame({"p": [0.1, 0.2]})], ids=lambda value: type(value).__name__)
def test_one_number_per_row_in_any_container(predictions):
    constant = model(predict=lambda frame: predictions)
    assert scoring.predict_batch(constant, pa.table({"x": [1, 2]}), ("x",)).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("predictions", [[0.1], np.zeros((2, 2)), ["a", "b"], 0.5], ids=str)
def test_any_other_result_is_an_error(predictions):
    with pytest.raises(MlopsError, match="the model returns .* for 2 rows"):
        scoring.predict_batch(model(predict=lambda frame: predictions), pa.table({"x": [1, 2]}), ("x",))


def test_a_missing_feature_is_named():
    with pytest.raises(MlopsError, match="no feature 'xx' in the rows"):
        scoring.check_features(model(), ("xx",), ["x", "y"])


def test_a_required_column_must_be_among_the_features():
    with pytest.raises(MlopsError, match="the model requires 'z'"):
        scoring.check_features(model(("double", "z")), ("x",), ["x", "z"])


@pytest.mark.parametrize("tags", [{}, {"threshold": ""}, {"threshold": "high"}])
def test_a_version_without_threshold_is_an_error(tags):
    with pytest.raises(MlopsError, match="version 3 of model dev.s.m has no tag 'threshold' that is a number"):
        scoring.threshold_of(SimpleNamespace(name="dev.s.m", version=3, tags=tags))


def test_a_packed_model_holds_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    (tmp_path / "data" / "booster.txt").write_text("tree\n" * 1000)
    with zipfile.ZipFile(io.BytesIO(scoring.packed(str(tmp_path)))) as archive:
        assert archive.namelist() == ["MLmodel", "data/booster.txt"]
        assert archive.read("data/booster.txt") == b"tree\n" * 1000


def test_a_model_too_large_to_be_sent_is_refused(tmp_path, monkeypatch):
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    monkeypatch.setattr(scoring, "MAX_PACKED_BYTES", 10)
    with pytest.raises(MlopsError, match="at most 10 can be sent"): scoring.packed(str(tmp_path))
