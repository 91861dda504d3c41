"""Scoring batches with one version of a model: what is sent to the model, and what it may answer."""
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


def model(*columns, answer=lambda frame: np.zeros(len(frame))):
    "A model with a signature of (type, name) columns."
    schema = Schema([ColSpec(kind, name) for kind, name in columns]) if columns else None
    return SimpleNamespace(metadata=SimpleNamespace(get_input_schema=lambda: schema), predict=answer)


@given(st.lists(st.one_of(st.none(), st.integers(-2**31, 2**31 - 1)), max_size=20))
def test_counts_become_the_numbers_that_the_signature_wants(values):
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


@pytest.mark.parametrize("answer", [lambda f: [0.1, 0.2], lambda f: np.array([[0.1], [0.2]]),
                                    lambda f: pd.Series([0.1, 0.2]), lambda f: pd.DataFrame({"p": [0.1, 0.2]})])
def test_one_number_a_row_in_any_wrapping(answer):
    assert scoring.predict(model(answer=answer), pa.table({"x": [1, 2]}), ("x",)).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("answer", [lambda f: [0.1], lambda f: np.zeros((2, 2)), lambda f: ["a", "b"], lambda f: 0.5])
def test_any_other_answer_is_an_error(answer):
    with pytest.raises(MlopsError, match="the model answers 2 rows with"):
        scoring.predict(model(answer=answer), pa.table({"x": [1, 2]}), ("x",))


def test_a_feature_that_is_missing_is_named():
    with pytest.raises(MlopsError, match="no feature 'xx' in the rows"):
        scoring.check_features(model(), ("xx",), ["x", "y"])


def test_what_the_model_requires_must_be_among_the_features():
    with pytest.raises(MlopsError, match="the model requires 'z'"):
        scoring.check_features(model(("double", "z")), ("x",), ["x", "z"])


@pytest.mark.parametrize("tags", [{}, {"threshold": ""}, {"threshold": "high"}])
def test_a_version_without_threshold_is_an_error(tags):
    with pytest.raises(MlopsError, match="version 3 of model dev.s.m has no tag 'threshold' that is a number"):
        scoring.threshold_of(SimpleNamespace(name="dev.s.m", version=3, tags=tags))


def test_a_packed_model_is_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    (tmp_path / "data" / "booster.txt").write_text("tree\n" * 1000)
    with zipfile.ZipFile(io.BytesIO(scoring.packed(str(tmp_path)))) as archive:
        assert archive.namelist() == ["MLmodel", "data/booster.txt"]
        assert archive.read("data/booster.txt") == b"tree\n" * 1000


def test_a_model_too_large_to_travel_is_refused(tmp_path, monkeypatch):
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    monkeypatch.setattr(scoring, "LARGEST", 10)
    with pytest.raises(MlopsError, match="at most 10 can be sent"): scoring.packed(str(tmp_path))
