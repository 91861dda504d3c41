"""The bodies of the scoring protocol: what is accepted, and the reasons of what is refused."""
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlops_nb.serving.scoring_protocol import (
    Answer,
    Refusal,
    client_request_id,
    decoded_body,
    error_answer,
    parsed_body,
    row_count,
    rows_of,
)

SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=3), inner, max_size=3))
FIELDS = st.sampled_from(["dataframe_split", "dataframe_records", "instances", "inputs", "params", "columns", "data"])
REQUESTS = st.dictionaries(FIELDS, VALUES | st.dictionaries(FIELDS, VALUES), max_size=3)
ROWS = [{"origin": "JFK", "flight": 1}, {"origin": None, "flight": 2.5}]


@pytest.mark.parametrize("request_", [
    {"dataframe_split": {"columns": ["origin", "flight"], "index": [0, 1], "data": [["JFK", 1], [None, 2.5]]}},
    {"dataframe_records": ROWS}, {"instances": ROWS}, {"inputs": ROWS},
    {"inputs": {"origin": ["JFK", None], "flight": [1, 2.5]}}])
def test_every_form_gives_the_same_rows(request_):
    request = parsed_body(json.dumps(request_).encode())
    assert rows_of(request) == ROWS
    assert row_count(request) == 2


@pytest.mark.parametrize("request_", [{"instances": [[1.0, 2.0]]}, {"inputs": [[1.0]]}, {"instances": [1, 2]},
                                      {"inputs": 3}, {"messages": []}])
def test_tensors_have_no_rows(request_): assert rows_of(parsed_body(json.dumps(request_).encode())) is None


@pytest.mark.parametrize(("body", "reason"), [
    (b"", "the body is not JSON: Expecting value: line 1 column 1"),
    (b'{"inputs": [1,]}', "the body is not JSON"), (b"[1]", "the body is an array; send a JSON object"),
    (b'"inputs"', "the body is a string"), (b"null", "the body is null"), (b"NaN", "the body is a single value"),
    (b'{"inputs": "\xff"}', "the body is not UTF-8"), (b'{"inputs": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "too deep"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", "more than 4,300 digits"), (b"{}", "no rows: send one of .* it has no field"),
    (b'{"data": []}', "it has data"), (b'{"dataframe_split": {}, "instances": []}', "dataframe_split and instances")])
def test_a_body_that_is_no_request_is_refused_with_the_reason(body, reason):
    with pytest.raises(Refusal, match=reason) as refused: parsed_body(body)
    answer = refused.value.answer
    assert answer.status == 400
    assert json.loads(answer.body) == {"error_code": "BAD_REQUEST", "message": refused.value.message}


@pytest.mark.parametrize(("form", "value", "reason"), [
    ("dataframe_split", [], "an object with columns and data"), ("dataframe_split", {"data": []}, "columns and data"),
    ("dataframe_split", {"columns": [1], "data": []}, "an array of names"),
    ("dataframe_split", {"columns": ["a", "a"], "data": []}, "a name twice"),
    ("dataframe_split", {"columns": ["a"], "data": {}}, "an array of rows"),
    ("dataframe_split", {"columns": ["a"], "data": [[1], [1, 2]]}, r"data\[1\] of dataframe_split must be"),
    ("dataframe_records", {}, "an array of objects"), ("dataframe_records", [{}, 1], r"dataframe_records\[1\]"),
    ("instances", [{}, []], r"instances\[1\] has to be an object"),
    ("inputs", {"a": [1], "b": [1, 2]}, "differ in length: a 1, b 2")])
def test_rows_that_cannot_be_read_are_refused_with_the_reason(form, value, reason):
    with pytest.raises(Refusal, match=reason): rows_of({form: value})


def test_numbers_beyond_doubles_are_read_as_mlflow_reads_them():
    request = parsed_body(b'{"inputs": [NaN, -Infinity, 1e999, 36893488147419103232]}')
    assert request["inputs"][1:] == [-float("inf"), float("inf"), 2**65]
    assert request["inputs"][0] != request["inputs"][0]


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"inputs": "\\ud800"}')
def test_any_body_is_a_request_or_refused(body):
    for parse in (parsed_body, decoded_body):
        try: request = parse(body)
        except Refusal as refusal: assert refusal.status == 400
        else: assert type(request) is dict


@given(REQUESTS)
def test_any_request_has_rows_or_is_refused(request_):
    assert row_count(request_) >= 0
    try: rows = rows_of(request_)
    except Refusal as refusal: assert refusal.status == 400
    else: assert rows is None or all(type(row) is dict for row in rows)


def test_the_senders_name_of_a_request_can_be_stored():
    assert client_request_id({"client_request_id": "a-1"}) == "a-1"
    assert client_request_id({"client_request_id": 7}) is None is client_request_id({})
    assert client_request_id(parsed_body(b'{"inputs": 1, "client_request_id": "\\ud800"}')) == "?"


def test_a_message_with_half_a_surrogate_pair_is_an_answer():
    assert error_answer(400, "BAD_REQUEST", "no column \ud800") == Answer(
        400, b'{"error_code":"BAD_REQUEST","message":"no column ?"}')
