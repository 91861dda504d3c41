"Dynamic value references: detection, literal text, replacement, errors."
import json
import re
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.bundle.references import TIME_PARTS, as_inputs, find_references, parse, resolve_references, time_part
from mlops_nb.errors import MlopsError

ROOT = Path(__file__).parents[3]
START = datetime(2013, 3, 31, 23, 59, 58, 123456, tzinfo=UTC)


def context(**values) -> dict:
    return {
        "job": {"id": 7, "name": "train", "run_id": 12, "repair_count": 0, "start_time": START,
                "parameters": {"as_of": "2013-04-01", "a-b": "dash", "model{}": "braces"},
                "trigger": {"type": "TABLE", "time": START - timedelta(hours=1),
                            "table_update": {"updated_tables": ["dev.flights.predictions"]}}},
        "task": {"name": "deploy", "run_id": 14, "execution_count": 2},
        "tasks": {"train": {"values": values, "result_state": "TIMEDOUT", "error_code": None, "run_id": 13,
                            "execution_count": 1}},
        "workspace": {"id": "0", "url": "http://127.0.0.1:8080"},
    }


@pytest.mark.parametrize("text, expected", [
    ("{{job.id}}", "7"), ("{{job.name}}", "train"), ("{{job.run_id}}", "12"), ("{{job.repair_count}}", "0"),
    ("{{job.parameters.as_of}}", "2013-04-01"), ("{{job.parameters.`a-b`}}", "dash"),
    ("{{job.parameters.`model{}`}}", "braces"), ("{{job.`name`}}", "train"),
    ("{{job.trigger.type}}", "TABLE"), ("{{job.trigger.time.hour}}", "22"),
    ("{{job.trigger.table_update.updated_tables}}", '["dev.flights.predictions"]'),
    ("{{task.name}}", "deploy"), ("{{task.run_id}}", "14"), ("{{task.execution_count}}", "2"),
    ("{{tasks.train.result_state}}", "timedout"), ("{{tasks.train.error_code}}", ""), ("{{tasks.train.run_id}}", "13"),
    ("{{workspace.id}}", "0"), ("{{workspace.url}}", "http://127.0.0.1:8080"),
    ("{{job_id}} {{run_id}} {{parent_run_id}} {{task_key}} {{start_date}}", "7 14 12 deploy 2013-03-31"),
    ("job_{{job.run_id}}", "job_12"), ("{{job.id}}{{job.id}}", "77"), ("{{{job.id}}}", "{7}"),
])
def test_every_kind_of_reference(text, expected):
    assert resolve_references(text, context()) == expected


@pytest.mark.parametrize("text", [
    "", "{}", "{{}}", "{{job.id}", "{job.id}}", "{{ job.id }}", "{{job.id+1}}", "{{job..id}}", "{{.job}}",
    "{{job.id.}}", "{{job-id}}", "{{jobs.id}}", "{{Job.id}}", "{{var.catalog}}", "{{job_id.x}}",
    "{{job.parameters.a-b}}", "{{job.parameters.`a-b}}", "{{jöb.id}}", "{{\njob.id}}"])
def test_unknown_namespaces_and_broken_syntax_stay_as_written(text):
    assert resolve_references(text, context()) == text
    assert find_references(text) == []


@pytest.mark.parametrize("text, message", [
    ("{{job.naem}}", r"\{\{job.naem\}\}: no 'naem' in job\n  did you mean 'name'\? there are: id, name"),
    ("{{job}}", "job is not a single value"), ("{{job.parameters}}", "job.parameters is not a single value\n.*as_of"),
    ("{{job.parameters.asof}}", "no 'asof' in job.parameters\n  did you mean 'as_of'"),
    ("{{job.id.x}}", "job.id is a single value without fields"),
    ("{{job.start_time}}", "job.start_time is not a single value\n.*iso_date"),
    ("{{job.start_time.iso_dat}}", "no 'iso_dat' in job.start_time\n  did you mean 'iso_date'"),
    ("{{job.start_time.year.x}}", "job.start_time.year is a single value without fields"),
    ("{{tasks.trian.values.x}}", "no task 'trian' before this task\n.*train"),
    ("{{tasks.train.values.modle}}", "task 'train' did not set value 'modle'\n.*there are: metrics, model"),
    ("{{tasks.train.values}}", "tasks.train.values is not a single value"),
    ("{{tasks.train}}", "tasks.train is not a single value"),
    ("{{tasks.train.valeus.x}}", "no 'valeus' in tasks.train\n  did you mean 'values'"),
    ("{{tasks.train.values.metrics.auc}}", "tasks.train.values.metrics is a single value"),
    ("{{input}}", "only the task inside a for_each_task has an input"), ("{{input.x}}", "only the task inside"),
    ("{{backfill.iso_date}}", "this run is not a backfill"),
    ("{{job.trigger.file_arrival.location}}", "no 'file_arrival' in job.trigger"),
])
def test_the_error_of_an_unknown_name_lists_the_known_names(text, message):
    with pytest.raises(MlopsError, match=message):
        resolve_references({"deep": [f"before {text} after"]}, context(model="m", metrics={"auc": 0.7}))


def test_a_task_that_set_nothing_is_named():
    with pytest.raises(MlopsError, match="task 'train' did not set value 'x'\n  there are none"):
        resolve_references("{{tasks.train.values.x}}", context())


def test_a_namespace_the_caller_does_not_know_is_an_error_and_not_literal():
    with pytest.raises(MlopsError, match="'workspace' is not available here"):
        resolve_references("{{workspace.url}}", {"job": {}})


def test_what_is_put_in_is_not_searched_again():
    assert resolve_references("{{tasks.train.values.x}}", context(x="{{job.id}} \\1 \\g<0>")) == "{{job.id}} \\1 \\g<0>"


def test_nested_values_keep_their_shape_and_the_original_is_untouched():
    value = {"{{job.id}}": ["{{job.id}}", 3, None, True, {"x": ("{{job.id}}",)}]}
    assert resolve_references(value, context()) == {"{{job.id}}": ["7", 3, None, True, {"x": ["7"]}]}
    assert value == {"{{job.id}}": ["{{job.id}}", 3, None, True, {"x": ("{{job.id}}",)}]}


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                           max_leaves=6)


@given(json_values)
def test_a_task_value_that_is_no_string_arrives_as_json(value):
    text = resolve_references("{{tasks.train.values.x}}", context(x=value))
    assert isinstance(text, str) and json.loads(text) == value


@given(st.text(), st.text(st.characters(exclude_characters="`"), min_size=1))
def test_any_name_can_be_quoted_and_any_string_arrives_as_it_is(value, name):
    run = context()
    run["job"]["parameters"][name] = value
    assert resolve_references(f"<{{{{job.parameters.`{name}`}}}}>", run) == f"<{value}>"


@given(st.text("{}`. jobid_", max_size=30))
def test_any_combination_of_braces_is_parsed(text):
    expected = [candidate for candidate in literals_and_references(text) if parse(candidate)]
    assert [reference.text for reference in find_references(text)] == expected


def literals_and_references(text: str) -> list[str]:
    "A second implementation: from the left, each opening brace with the nearest closing brace that fits."
    candidates, start = [], text.find("{{")
    while start >= 0:
        ends = [end + 2 for end in range(start + 2, len(text) - 1)
                if text[end:end + 2] == "}}" and is_path(text[start + 2:end])]
        if ends: candidates.append(text[start:ends[0]])
        start = text.find("{{", ends[0] if ends else start + 1)
    return candidates


def is_path(inside: str) -> bool:  # names and dots, without a regular expression
    names, quoted, name = [], False, ""
    for letter in inside:
        if letter == "`": quoted = not quoted; name += letter
        elif letter == "." and not quoted: names.append(name); name = ""
        else: name += letter
    names.append(name)
    plain = [n for n in names if n and all(c.isascii() and (c.isalnum() or c == "_") for c in n)]
    ticked = [n for n in names if len(n) > 2 and n[0] == n[-1] == "`" and n.count("`") == 2]
    return not quoted and len(plain) + len(ticked) == len(names)


@given(st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2100, 1, 1)),
       st.integers(-14 * 60, 14 * 60))
def test_time_parts_are_those_of_utc(moment, minutes):
    local = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    utc = time.gmtime(int(local.timestamp() // 1))
    expected = {"iso_date": time.strftime("%Y-%m-%d", utc), "iso_datetime": time.strftime("%Y-%m-%dT%H:%M:%SZ", utc),
                "iso_weekday": utc.tm_wday + 1, "is_weekday": utc.tm_wday not in (5, 6), "year": utc.tm_year,
                "month": utc.tm_mon, "day": utc.tm_mday, "hour": utc.tm_hour, "minute": utc.tm_min,
                "second": utc.tm_sec}
    seen = {part: time_part(local, part) for part in TIME_PARTS}
    milliseconds = seen.pop("timestamp_ms")
    assert seen == expected
    whole = datetime.fromtimestamp(milliseconds // 1000, UTC) + timedelta(milliseconds=milliseconds % 1000)
    assert timedelta() <= local - whole < timedelta(milliseconds=1)


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="no time zone"): time_part(datetime(2013, 1, 1), "hour")


def test_backfill_takes_time_parts():
    assert resolve_references("{{backfill.iso_date}}", {"backfill": START}) == "2013-03-31"


def test_inputs_from_text_list_and_reference():
    assert as_inputs("[1, 2]") == as_inputs([1, 2]) == [1, 2]
    for value in ([1, 2], "[1, 2]"):
        assert as_inputs(resolve_references("{{tasks.train.values.x}}", context(x=value))) == [1, 2]
    assert as_inputs("[]") == []


@pytest.mark.parametrize("value, message", [
    ("", "are not valid JSON"), ("a,b", "are not valid JSON"), ("[NaN]", "NaN is no value of JSON"),
    ('{"a": 1}', "must be a list"), ("3", "must be a list"),
    (None, "must be a list"), ({"a": 1}, "must be a list")])
def test_inputs_that_are_not_a_list(value, message):
    with pytest.raises(MlopsError, match=message): as_inputs(value)


def test_fields_of_an_input():
    element = {"code": "EWR", "gates": {"a": 3}, "open": True}
    assert resolve_references("{{input}}", {"input": element}) == json.dumps(element)
    assert resolve_references("{{input.code}} {{input.gates.a}} {{input.open}}", {"input": element}) == "EWR 3 true"
    assert resolve_references("{{input}}", {"input": "JFK"}) == "JFK"
    with pytest.raises(MlopsError, match="no 'cod' in input\n  did you mean 'code'"):
        resolve_references("{{input.cod}}", {"input": element})
    with pytest.raises(MlopsError, match="input is a single value"):
        resolve_references("{{input.code}}", {"input": "JFK"})


@pytest.mark.parametrize("file", sorted((ROOT / "resources").glob("*.job.yml")), ids=lambda f: f.stem)
def test_the_references_of_the_projects_own_jobs_are_valid(file):
    for text in re.findall(r"\{\{.*?\}\}", file.read_text()):
        assert parse(text), f"{text} is not a reference and would be passed to the task as it is"
