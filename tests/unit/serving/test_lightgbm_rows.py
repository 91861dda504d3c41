"""The C functions of LightGBM give the predictions of its Python package, to the last bit."""
import gc
import math
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_models import FEATURES, ROWS, booster, encoding_of

from mlops_nb.errors import MlopsError
from mlops_nb.models import fitted_model
from mlops_nb.serving import lightgbm_rows
from mlops_nb.serving.lightgbm_rows import BoosterRows

KINDS = [("binary", "late", True), ("regression", "distance", False), ("poisson", "distance", False)]
NUMBERS = st.floats() | st.sampled_from([0.0, -0.0, 1e-40, 1e300, -1e300, 0.5, 1.0, 2.0, 3.0, -1.0, 1e9, 2**31, 900.0])


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'raw' if kind[2] else 'normal'}")
def pair(request, tmp_path_factory):
    "A booster of the package, the same from its file, and whether its raw score is predicted."
    objective, label, is_raw = request.param
    file = tmp_path_factory.mktemp("booster") / "booster.txt"
    booster(objective, label).save_model(file)
    return booster(objective, label), BoosterRows(file, is_raw), is_raw


@settings(max_examples=40)
@given(rows=st.lists(st.lists(NUMBERS, min_size=len(FEATURES), max_size=len(FEATURES)), min_size=1, max_size=5))
def test_one_row_and_many_rows_are_predicted_as_by_the_package(pair, rows):
    package, from_file, is_raw = pair
    expected = package.predict(np.array(rows), raw_score=is_raw).tolist()
    assert from_file.predict_rows(rows) == expected
    assert [from_file.predict_row(row) for row in rows] == expected


def test_all_rows_of_a_table_in_one_call(pair):
    package, from_file, is_raw = pair
    numbers = fitted_model.encode(ROWS, encoding_of("binary"))
    assert from_file.predict_rows(numbers.tolist()) == package.predict(numbers, raw_score=is_raw).tolist()
    assert from_file.predict_rows([]) == []


def test_a_row_with_another_number_of_values_is_an_error(pair):
    for values in ([1.0], [1.0] * (len(FEATURES) + 1)):
        with pytest.raises(Exception, match="4"): pair[1].predict_row(values)
        with pytest.raises(ValueError, match="have not 4 numbers"): pair[1].predict_rows([values])


def test_threads_share_a_booster(pair):
    package, from_file, is_raw = pair
    rows = [[0.0, float(i), 1.0, math.nan] for i in range(-500, 2500, 7)]
    expected = package.predict(np.array(rows), raw_score=is_raw).tolist()
    with ThreadPoolExecutor(8) as pool:
        singly = [list(pool.map(from_file.predict_row, rows)) for _ in range(5)]
        together = list(pool.map(from_file.predict_rows, [rows] * 5))
    assert singly == together == [expected] * 5


def test_the_memory_of_the_library_is_freed_with_the_object(tmp_path, monkeypatch):
    booster("binary").save_model(tmp_path / "booster.txt")
    calls, call = [], lightgbm_rows.call_lightgbm
    def recording_call(name, *arguments):
        calls.append(name)
        call(name, *arguments)
    monkeypatch.setattr(lightgbm_rows, "call_lightgbm", recording_call)
    rows = BoosterRows(tmp_path / "booster.txt", is_raw=True)
    reference = weakref.ref(rows)
    del rows
    gc.collect()
    assert reference() is None
    assert calls[-2:] == ["LGBM_FastConfigFree", "LGBM_BoosterFree"]


def test_what_is_no_booster_of_ours_is_refused_with_lightgbms_reason(tmp_path, capfd):
    with pytest.raises(MlopsError, match="BoosterCreateFromModelfile failed: Could not open"):
        BoosterRows(tmp_path / "missing.txt", is_raw=True)
    import lightgbm
    data = lightgbm.Dataset(np.arange(60.0)[:, None], np.arange(60) % 3, params={"verbose": -1, "min_data_in_leaf": 1})
    settings = {"objective": "multiclass", "num_class": 3, "verbose": -1, "num_threads": 1}
    lightgbm.train(settings, data, 1).save_model(tmp_path / "classes.txt")
    with pytest.raises(MlopsError, match="predicts 3 numbers per row"):
        BoosterRows(tmp_path / "classes.txt", is_raw=True)


def test_a_process_that_predicts_imports_neither_pandas_nor_lightgbm(tmp_path):
    booster("binary").save_model(tmp_path / "booster.txt")
    code = ("import sys\nfrom mlops_nb.serving.fast_model import FastModel\n"
            "from mlops_nb.serving.lightgbm_rows import BoosterRows\n"
            "print(BoosterRows(sys.argv[1], True).predict_row([1.0, 2.0, 0.0, 3.0]))\n"
            "print({'pandas', 'numpy', 'lightgbm', 'mlflow', 'pyspark', 'sklearn'} & sys.modules.keys())")
    command = [sys.executable, "-c", code, str(tmp_path / "booster.txt")]
    prediction, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(prediction) == booster("binary").predict(np.array([[1.0, 2.0, 0.0, 3.0]]), raw_score=True)[0]
    assert modules == "set()"
