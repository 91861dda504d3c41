"""The rows in payloads: every form of a request, and bodies that do not match."""
import json
import sqlite3
from contextlib import closing

import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from mlops_nb.serving.exact_model import failed_answer
from mlops_nb.serving.inference_log import BODIES, PASSED, VERSION_FAILED, exploder, field_text, scored_rows
from mlops_nb.serving.scoring_protocol import Answer, bad_request, error_answer

ROWS = [{"origin": "JFK", "distance": 760}, {"origin": "LGA", "distance": None}]
FORMS = {
    "dataframe_split": {"columns": ["origin", "distance"], "index": [7, 8], "data": [["JFK", 760], ["LGA", None]]},
    "dataframe_records": ROWS, "instances": ROWS, "inputs": {"origin": ["JFK", "LGA"], "distance": [760, None]}}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_named_columns_gives_the_same_rows(form):
    request = json.dumps({form: FORMS[form], "client_request_id": "a", "params": {"quantile": 0.5}})
    assert scored_rows(request, '{"predictions": [0.25, 0.5]}') == list(zip(ROWS, (0.25, 0.5), strict=True))


def test_a_single_value_in_inputs_is_one_row():
    rows = scored_rows('{"inputs": {"origin": "JFK", "distance": 760}}', '{"predictions": [1]}')
    assert rows == [(ROWS[0], 1.0)]


@pytest.mark.parametrize("form", ["instances", "inputs"])
def test_tensors_have_predictions_and_no_fields(form):
    assert scored_rows(json.dumps({form: [[1, 2], [3, 4]]}), '{"predictions": [0.5, 0.25]}') == [({}, 0.5), ({}, 0.25)]


@pytest.mark.parametrize(("answer", "values"), [
    ([[0.5], [0.25]], [0.5, 0.25]), ([{"p": 0.5}, {"p": 1}], [0.5, 1.0]), ({"p": [0.5, 0.25]}, [0.5, 0.25]),
    ([True, None], [1.0, None]), (["late", [0.5, 0.5]], [None, None])])
def test_a_prediction_is_one_number_or_unknown(answer, values):
    rows = scored_rows(json.dumps({"instances": ROWS}), json.dumps({"predictions": answer}))
    assert [prediction for _, prediction in rows] == values


@pytest.mark.parametrize(("request_text", "response"), [
    ("no JSON", '{"predictions": []}'), ('{"instances": [{"a": 1}]}', '{"predictions": [1, 2]}'),
    ('{"instances": [{"a": 1}]}', '{"error_code": "BAD_REQUEST"}'), ("[]", '{"predictions": [1]}'),
    ('{"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}', '{"predictions": [1]}'),
    ('{"dataframe_split": []}', '{"predictions": [1]}'), ("{}", "5"), ('{"inputs": 5}', '{"predictions": 5}')])
def test_bodies_that_do_not_match_leave_one_row_without_a_number(request_text, response):
    assert exploded([(request_text, response)], ["a"]) == [
        {"databricks_request_id": "0", "row_number": None, "row_count": 0, "prediction": None, "a": None}]


def test_a_version_is_to_blame_for_its_own_errors_and_not_for_those_of_requests():
    evaluating = MlflowException("Encountered an unexpected error while evaluating the model. Verify that the input is "
                                 "compatible with the model for inference.", error_code=BAD_REQUEST)
    evaluating.__context__ = ValueError("no tree")
    answers = {"failed": failed_answer(ZeroDivisionError("division")), "evaluating": failed_answer(evaluating),
               "ended": error_answer(500, "INTERNAL_ERROR", "Served model 'late' failed"),
               "slow": error_answer(504, "DEADLINE_EXCEEDED", "Served model 'late' did not answer within 5 seconds."),
               "full": error_answer(429, "REQUEST_LIMIT_EXCEEDED", "Too many concurrent requests"),
               "wrong": failed_answer(bad_request("the body has no rows")),
               "right": Answer(200, b'{"predictions": []}'),
               "schema": failed_answer(MlflowException("Failed to enforce schema of data", error_code=BAD_REQUEST))}
    with closing(sqlite3.connect(":memory:")) as store:
        store.execute("CREATE TABLE payload (name, status_code, response)")
        rows = [(name, answer.status, answer.body.decode()) for name, answer in answers.items()]
        store.executemany("INSERT INTO payload VALUES (?, ?, ?)", [*rows, ("no body", 400, None)])
        blamed = {row[0] for row in store.execute(f"SELECT name FROM payload WHERE {VERSION_FAILED}")}
    assert blamed == {"failed", "evaluating", "ended", "slow"}


def exploded(bodies: list[tuple], names: list[str]) -> list[dict]:
    "The rows of payloads whose ids are their positions."
    count = range(len(bodies))
    values = [[str(i) for i in count], [None for _ in count], [0 for _ in count], [200 for _ in count],
              ["e" for _ in count], *map(list, zip(*bodies, strict=True))]
    table = pa.table(values, [*PASSED, *BODIES])
    rows = pa.Table.from_batches(exploder(names)(table.to_batches())).to_pylist()
    named = dict(zip((f"column_{i}" for i in range(3 + len(names))), ["row_number", "row_count", "prediction", *names],
                     strict=True))
    return [{named.get(name, name): value for name, value in row.items() if name not in PASSED[1:]} for row in rows]


def test_a_batch_keeps_the_id_of_each_request_and_numbers_its_rows():
    bodies = [(json.dumps({"instances": ROWS}), '{"predictions": [0.25, 0.5]}'), ("x", "y"),
              (json.dumps({"inputs": {"origin": ["EWR"]}}), '{"predictions": [0.75]}')]
    rows = exploded(bodies, ["origin", "distance"])
    assert [(row["databricks_request_id"], row["row_number"], row["row_count"]) for row in rows] == [
        ("0", 0, 2), ("0", 1, 2), ("1", None, 0), ("2", 0, 1)]
    assert [row["origin"] for row in rows] == ["JFK", "LGA", None, "EWR"]
    assert [row["distance"] for row in rows] == ["760", None, None, None]


@pytest.mark.parametrize(("value", "text"), [
    (None, None), ("JFK", "JFK"), (3, "3"), (3.0, "3"), (-0.5, "-0.5"), (1e300, "1e+300"), (True, "true"),
    (2**60, str(2**60)), (float("nan"), "NaN"), ([1, "a"], '[1, "a"]')])
def test_a_field_is_text_that_sql_can_cast(value, text): assert field_text(value) == text
