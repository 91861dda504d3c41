"""Payload tables and the inference log: merged once, also by a writer that is killed; quarantine; labels."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_use_cases as small
from deltalake import DeltaTable
from test_small_use_cases import TAGS, monitoring_conf

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.serving import payload_table
from mlops_nb.serving.payload_table import payload_session, served_entities, write_payloads
from mlops_nb.serving.spool import LARGEST_BODY, SpoolWriter, closed_segments
from mlops_nb.workflow import inference_logging, monitoring, payloads

ROOT = Path(__file__).parents[2]
NOON = datetime(2021, 4, 1, 12, tzinfo=UTC).timestamp()


def values(number: int, version: int = 1, seconds: float = 0, **others) -> dict:
    "The columns of a request beside its bodies, as a worker appends them."
    return {"databricks_request_id": f"request{number}", "client_request_id": None, "request_time": NOON + seconds,
            "status_code": 200, "sampling_fraction": 1.0, "execution_duration_ms": 1.6, "requester": "ada",
            "served_entity_id": f"entity{version}", "endpoint_name": "cancelled", "entity_version": str(version),
            "served_entity_name": f"cancelled-{version}", "entity_name": "dev.flights.cancelled", **others}


def fill(folder: Path, records: list[tuple], name: str = "worker0") -> None:
    "Append records, each (table, values, request, response), to one closed segment."
    writer = SpoolWriter(folder, name)
    for record in records: writer.append(*record)
    writer.close()


def request_ids(spark, env, table: str) -> list[str]:
    return sorted(row[0] for row in tables.read(spark, env, table).select("databricks_request_id").collect())


@pytest.fixture(scope="module")
def spool_home(env):
    "The session of the writer, and the target."
    return payload_session(env), env


def test_requests_are_rows_with_the_columns_of_an_inference_table(spool_home, tmp_path):
    spark, env = spool_home
    large = b" " * (LARGEST_BODY + 1)
    bodies = [(b'{"inputs": {}}', b'{"predictions": [1]}'), (large, b"{}"), (b"\xff", None)]
    fill(tmp_path, [("dev.flights.late_payload", values(number, number % 2), *pair)
                    for number, pair in enumerate(bodies)])
    assert write_payloads(spark, env, tmp_path) == 3 and closed_segments(tmp_path) == []
    frame = tables.read(spark, env, "late_payload").orderBy("databricks_request_id")
    assert dict(frame.dtypes) == {
        "databricks_request_id": "string", "request_date": "date", "client_request_id": "string",
        "request_time": "timestamp", "status_code": "int", "sampling_fraction": "double",
        "execution_duration_ms": "bigint", "request": "string", "response": "string",
        "logging_error_codes": "array<string>", "served_entity_id": "string", "requester": "string"}
    first, second, third = frame.collect()
    assert (first.request, first.response, first.logging_error_codes) == ('{"inputs": {}}', '{"predictions": [1]}', [])
    assert (first.request_date, first.execution_duration_ms, first.requester) == (date(2021, 4, 1), 2, "ada")
    assert (second.request, second.response) == (None, "{}")
    assert second.logging_error_codes == ["MAX_REQUEST_SIZE_EXCEEDED"]
    assert (third.request, third.response) == ("\ufffd", None)
    versions = {row.served_entity_id: (row.entity_name, row.entity_version, row.endpoint_name)
                for row in served_entities(spark, env, "late_payload").collect()}
    assert versions == {f"entity{version}": ("dev.flights.cancelled", str(version), "cancelled") for version in (0, 1)}


def test_a_request_that_is_delivered_twice_is_one_row(spool_home, tmp_path):
    spark, env = spool_home
    records = [("dev.flights.twice_payload", values(number, seconds=43200 * number), b"{}", b"{}")  # over three days
               for number in range(4)]
    fill(tmp_path, records[:3])
    fill(tmp_path, records[1:2] * 2, "worker1")
    assert write_payloads(spark, env, tmp_path) == 3
    fill(tmp_path, records)
    assert write_payloads(spark, env, tmp_path) == 1
    assert request_ids(spark, env, "twice_payload") == [f"request{number}" for number in range(4)]


@pytest.mark.slow
def test_a_record_that_no_target_can_write_is_quarantined_and_blocks_nothing(spool_home, tmp_path, caplog):
    spark, env = spool_home
    fill(tmp_path, [("lab.flights.late_payload", values(1), b"{}", b"{}"),
                    ("prod.flights.other_payload", values(2), b"{}", b"{}"),  # another target's
                    ("dev.flights.other_payload", {"status_code": 200}, b"{}", b"{}"),
                    ("dev.flights.'; DROP", values(3), b"{}", b"{}"),
                    ("dev.flights.other_payload", values(4), b"{}", b"{}")])
    assert write_payloads(spark, env, tmp_path) == 2 and closed_segments(tmp_path) == []
    assert request_ids(spark, env, "dev.flights.other_payload") == ["request4"]
    assert request_ids(spark, env, "prod.flights.other_payload") == ["request2"]
    file, = (tmp_path / "quarantine").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["table"] for line in lines] == ["lab.flights.late_payload", "dev.flights.other_payload",
                                                 "dev.flights.'; DROP"]
    assert "no target of databricks.yml writes the catalog of lab.flights.late_payload" in lines[0]["reason"]
    assert lines[0]["values"]["databricks_request_id"] == "request1" and "KeyError" in lines[1]["reason"]
    assert "3 records not written, but put into" in caplog.text


@pytest.mark.slow
def test_a_table_that_cannot_be_written_keeps_its_segment_and_the_others_are_written(spool_home, tmp_path, monkeypatch):
    spark, env = spool_home
    tables.create(spark, env, "odd_payload", "databricks_request_id BIGINT")
    fill(tmp_path, [("dev.flights.odd_payload", values(1), b"{}", b"{}"),
                    ("dev.flights.even_payload", values(2), b"{}", b"{}")])
    fill(tmp_path, [("dev.flights.even_payload", values(3), b"{}", b"{}")], "worker1")
    monkeypatch.setattr(payload_table, "PAYLOAD_BATCH_BYTES", 1)  # a batch for each segment
    with pytest.raises(MlopsError, match="(?s)of dev.flights.odd_payload is bigint, got string.*tried again"):
        write_payloads(spark, env, tmp_path)
    assert request_ids(spark, env, "even_payload") == ["request2", "request3"] and len(closed_segments(tmp_path)) == 1


@pytest.mark.slow
def test_on_databricks_the_version_of_a_request_is_in_the_system_table(spool_home, monkeypatch):
    "It has a row for each change of an entity, and more columns."
    spark, env = spool_home
    columns = ["served_entity_id", "served_entity_name", "entity_version", "change_time", "endpoint_name",
               "entity_name", "workspace_id"]
    changes = [("e1", "late-1", "1", 1), ("e1", "first", "1", 2), ("e2", "late-2", "2", 1)]
    rows = spark.createDataFrame([(*names, datetime(2021, 4, day), "late", "dev.flights.late", "5")
                                  for *names, day in changes], columns)
    tables.overwrite(spark, env, "system_entities", rows)
    monkeypatch.setattr(payload_table, "SYSTEM_ENTITIES", env.table("system_entities"))
    entities = served_entities(spark, replace(env, engine="databricks"), "late_payload").collect()
    assert sorted((row.served_entity_id, row.served_entity_name, row.entity_version) for row in entities) == [
        ("e1", "first", "1"), ("e2", "late-2", "2")]


KILLED = """
import os, signal
from pathlib import Path
from mlops_nb.serving.payload_table import payload_writer_main
Path.unlink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # after the merge, before the segment is removed
payload_writer_main()
"""


REPLACED = """
from mlops_nb.serving import payload_table
payload_table.MEMORY_BYTES = 1  # the process replaces itself after its first pass
payload_table.payload_writer_main()
"""


ENDED_IN_A_PASS = """
import os, signal
from mlops_nb.serving import payload_table
payload_table.MEMORY_BYTES = 1  # the process would replace itself after the pass
payload_table.write_pass = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or True
payload_table.payload_writer_main()
"""


def started_writer(state: Path, code: str) -> subprocess.Popen:
    "The writer's process with its spool and lakehouse in a folder."
    places = {"MLOPS_STATE": str(state), "MLOPS_LAKEHOUSE": str(state / "lakehouse"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(state / "spool"), "dev"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | places, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_writer_that_is_killed_and_started_again_writes_each_request_once(tmp_path):
    spool = tmp_path / "spool"
    fill(spool, [("dev.flights.late_payload", values(number), b"{}", b"{}") for number in range(50)])
    killed = started_writer(tmp_path, KILLED)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and len(closed_segments(spool)) == 1
    assert stored_ids(tmp_path) == sorted(f"request{number}" for number in range(50))
    process = started_writer(tmp_path, REPLACED)
    deadline = time.monotonic() + 60
    while closed_segments(spool) and time.monotonic() < deadline: time.sleep(0.1)
    fill(spool, [("dev.flights.late_payload", values(50), b"{}", b"{}")])  # written by the last pass
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and list(spool.glob("*.segment")) == [], errors
    assert "the process starts anew" in errors
    assert stored_ids(tmp_path) == sorted(f"request{number}" for number in range(51))


@pytest.mark.slow
def test_a_writer_that_is_to_end_does_not_replace_itself(tmp_path):
    "The new process would not know of the signal, and never end."
    process = started_writer(tmp_path, ENDED_IN_A_PASS)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "starts anew" not in errors, errors


def stored_ids(state: Path) -> list[str]:
    "The requests in the payload table of a writer's process."
    table = DeltaTable(state / "lakehouse/dev/flights/late_payload").to_pyarrow_table(columns=["databricks_request_id"])
    return sorted(table.column(0).to_pylist())


# The inference log. A delivery is asked for on its day at noon; its features but the area's mean are in the request.

SENT = ["delivery_id", "asked_at", "area", "distance"]


def sent_rows(numbers: list[int], names: list[str] = SENT) -> tuple[pd.DataFrame, bytes]:
    "Rows as a client sends them, and the response of the formula."
    frame = small.deliveries().iloc[numbers].reset_index(drop=True)
    expected = eval(small.FORMULAS["minutes"], {"np": np, "model_input": frame})
    rows = frame.assign(asked_at=frame.asked_at.map(pd.Timestamp.isoformat))[names]
    return rows, json.dumps({"predictions": list(expected)}).encode()


def body(form: str, rows: pd.DataFrame, **others) -> bytes:
    "A request in one of the forms."
    if form == "dataframe_split": content = {"columns": list(rows), "data": rows.to_numpy(object).tolist()}
    else: content = rows.to_dict("list" if form == "inputs" else "records")
    return json.dumps({form: content, **others}, default=lambda number: number.item()).encode()


def requests(env) -> list[tuple]:
    "Payloads as (table, values, request, response): three that are logged as of 3 April, one later, five that are not."
    def payload(number: int, version: int, request: bytes | None, response: bytes | None, **others) -> tuple:
        entity = {"served_entity_id": f"minutes{version}", "entity_name": env.model("minutes")}
        return env.table("minutes_payload"), values(number, version, 60 * number, **entity | others), request, response
    split, split_answer = sent_rows(list(range(300, 312)))
    columns, columns_answer = sent_rows([312, 313])
    keyless, keyless_answer = sent_rows([314], ["area", "distance"])
    later, later_answer = sent_rows([320, 340])
    return [payload(1, 1, body("dataframe_split", split), split_answer),
            payload(2, 2, body("inputs", columns), columns_answer),
            payload(3, 1, body("instances", keyless), keyless_answer, client_request_id="314"),
            payload(4, 1, body("dataframe_records", later), later_answer),
            payload(0, 1, body("inputs", columns), b'{"error_code": "BAD_REQUEST"}', status_code=400),
            payload(-1, 1, b" " * (LARGEST_BODY + 1), columns_answer),
            payload(7, 1, b'{"inputs": {}}', b"no JSON"),
            payload(8, 3, body("inputs", columns), columns_answer, entity_name=env.model("another")),
            payload(9, 4, body("inputs", columns), columns_answer, entity_name=None)]


@pytest.fixture(scope="module")
def log_home(tmp_path_factory):
    "Deliveries with two versions of their formula, payloads, and the log as of 3 April."
    use_case, folder = small.DELIVERIES, tmp_path_factory.mktemp("log")
    env = replace(small.home_of(folder), variables={})  # no prefix: the payload table has the name of the model
    spark = get_spark(env)
    small.write_tables(use_case, spark, env)
    small.conf_files(folder, monitoring=monitoring_conf(use_case), train=small.TRAIN[use_case.model],
                     features={table.name: {"columns": {}} for table in use_case.feature_tables})
    client = registry.client(env)
    client.create_registered_model(env.model(use_case.model))
    for _ in range(2): client.create_model_version(env.model(use_case.model), str(folder), tags=TAGS[use_case.model])
    fill(folder / "spool", requests(env))
    assert write_payloads(spark, env, folder / "spool") == 9
    with pytest.MonkeyPatch.context() as patch:
        for module in (payloads, monitoring): patch.setattr(module, "load_env", lambda target: env)
        step = payloads.load_log_step(use_case, "dev", "2021-04-03")
        step.summary = inference_logging.write_inference_log(step).data
        yield step
    stop()


def log_of(step) -> pd.DataFrame:
    rows = tables.read(step.spark, step.env, "inference_log").toPandas()
    return rows.sort_values(["databricks_request_id", "row_number"], ignore_index=True)


@pytest.mark.slow
def test_each_row_of_a_request_is_a_typed_row_of_the_log_with_its_version(log_home):
    step, rows = log_home, log_of(log_home)
    source = small.deliveries().iloc[300:315].reset_index(drop=True)
    assert step.logged == len(rows) == 15
    assert list(rows) == [
        "delivery_id", "delivery_day", "area", "distance", "area_minutes", "reach", "asked_at", "prediction",
        "heuristic", "prediction_low", "prediction_high", "model_name", "model_version", "as_of", "read_versions",
        "row_id", "request_time", "databricks_request_id", "row_number", "client_request_id", "status_code", "source",
        "record_id", "row_hash", "minutes", "label_known_at"]
    expected = eval(small.FORMULAS["minutes"], {"np": np, "model_input": source})
    np.testing.assert_array_equal(rows.prediction, expected)
    np.testing.assert_array_equal(rows.distance, source.distance)
    assert list(rows.area) == list(source.area) and set(rows.reach) == {"near", "far"}
    assert list(rows.model_version) == [1] * 12 + [2] * 2 + [1] and set(rows.model_name) == {"dev.flights.minutes"}
    np.testing.assert_allclose(rows.prediction_high - rows.prediction_low, 19.75)
    assert list(rows.row_id) == [str(number) for number in range(300, 315)]
    assert list(rows.delivery_id[:14]) == list(range(300, 314)) and pd.isna(rows.delivery_id[14])
    assert list(rows.as_of[:14]) == list(source.delivery_day[:14])
    # without a time in the request, that of the request
    assert (rows.asked_at[14], rows.as_of[14]) == (pd.Timestamp("2021-04-01 12:03"), date(2021, 4, 1))
    assert list(rows.asked_at[:14].dt.tz_localize("UTC")) == list(source.asked_at[:14])
    assert rows.heuristic.isna().all() and (rows.status_code == 200).all()


@pytest.mark.slow
def test_what_is_not_logged_is_counted_with_its_reason(log_home):
    for note in ("15 predictions of dev.flights.minutes_payload added to dev.flights.inference_log",
                 "1 request with status 400", "1 request without its bodies", "1 request whose bodies cannot be read",
                 "2 predictions of days after 2021-04-03, which a later as_of logs",
                 "2 predictions of another model, dev.flights.another",
                 "2 predictions whose served entity is not known yet"):
        assert note in log_home.summary
    table = payloads.status_table(log_home)
    assert dict(zip(table.status_code, table.requests, strict=True)) == {200: 8, 400: 1}
    assert table["without request"].sum() == 1


@pytest.mark.slow
def test_a_step_logs_only_what_is_new(log_home):
    step = log_home
    version, before = tables.version(step.spark, step.env, "inference_log"), log_of(step)
    again = payloads.load_log_step(step.use_case, "dev", "2021-04-03")
    inference_logging.write_inference_log(again)
    assert "request with status 400" not in inference_logging.log_text(again)  # counted before
    assert again.logged == 0 and tables.version(step.spark, step.env, "inference_log") == version
    later = payloads.load_log_step(step.use_case, "dev", "2021-04-05")  # the day of the second row of a request
    inference_logging.write_inference_log(later)
    assert later.logged == 2
    rows = log_of(step)
    assert list(rows.delivery_id[rows.databricks_request_id == "request4"]) == [320, 340]
    pd.testing.assert_frame_equal(rows[rows.databricks_request_id != "request4"].reset_index(drop=True), before)


def write_baselines(step) -> None:
    "The held-out rows of both versions, as scored by the formula."
    frame = small.deliveries().iloc[200:300]
    expected = eval(small.FORMULAS["minutes"], {"np": np, "model_input": frame})
    frame = frame.assign(reach=np.where(frame.distance < 10, "near", "far"), prediction=expected, heuristic=50.0,
                         area_minutes=50.0).drop(columns="delivered_at")
    versions = [step.spark.createDataFrame(frame.assign(model_version=number)) for number in (1, 2)]
    tables.merge(step.spark, step.env, monitoring.BASELINE_TABLE, versions[0].unionByName(versions[1]),
                 ["delivery_id", "model_version"])


@pytest.mark.slow
def test_a_monitor_reads_the_log_with_the_labels_that_were_known(log_home):
    step, source = log_home, small.deliveries()
    for day, count, unknown in ((2, 11, {309, 314}), (3, 15, set())):
        rows = monitoring.watched(step.use_case, step.spark, step.env, date(2021, 4, day)).toPandas()
        rows = rows.sort_values("row_id", ignore_index=True)
        numbers = rows.row_id.astype(int)
        assert len(rows) == count and set(numbers[rows.minutes.isna()]) == unknown
        known = rows.minutes.notna()  # also that of the row without a key
        np.testing.assert_array_equal(rows.minutes[known], source.minutes[numbers[known]])
    write_baselines(step)
    run = monitoring.load_monitoring(step.use_case, "dev", "2021-04-03", "1 day")
    monitoring.measure_windows(run)
    windows = run.measured.part("INPUT")
    assert list(windows["count"]) == [11, 4]
    squares = (rows.minutes - rows.prediction) ** 2
    for (start, window), day in zip(windows.iterrows(), (1, 2), strict=True):
        assert start.day == day
        expected = np.sqrt(squares[[as_of.day == day for as_of in rows.as_of]].mean())
        assert window.root_mean_squared_error == pytest.approx(expected)
    assert tables.exists(step.spark, step.env, step.env.table("inference_log_profile_metrics"))
    with pytest.raises(MlopsError, match="no granularity 'daily'"):
        monitoring.load_monitoring(step.use_case, "dev", "2021-04-03", "daily")


@pytest.mark.slow
def test_labels_can_name_the_request_instead_of_the_row(log_home):
    step = log_home
    feedback = step.spark.createDataFrame([("314", 99.5)], "client_request_id STRING, minutes DOUBLE")
    use_case = replace(step.use_case, labels=lambda spark, env, as_of: feedback)
    log = tables.read(step.spark, step.env, "inference_log").drop("minutes", "label_known_at")
    rows = monitoring.with_request_labels(use_case, step.spark, step.env, log, date(2021, 4, 3)).toPandas()
    assert len(rows) == log.count()
    assert rows[rows.minutes.notna()][["row_id", "minutes"]].to_numpy().tolist() == [["314", 99.5]]


@pytest.mark.slow
def test_the_picture_shows_each_version_by_hour(log_home):
    hours = payloads.hourly_predictions(log_home)
    assert set(hours.version) == {1, 2} and hours.rows.sum() == len(log_of(log_home))
    figure = payloads.plot_requests(log_home)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["v1", "v2"]


@pytest.mark.slow
def test_without_an_endpoint_the_step_ends_with_a_sentence(log_home, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_TASK", str(tmp_path))
    (tmp_path / "task.json").write_text(json.dumps({"parameters": {}}))
    step = payloads.load_log_step(log_home.use_case, "dev", "2021-04-03", "nobody_payload")
    inference_logging.write_inference_log(step)
    assert payloads.status_table(step).empty
    inference_logging.finish_log(step)
    assert "no predictions yet: there is no table dev.flights.predictions" in (tmp_path / "exit.txt").read_text()


@pytest.mark.slow
def test_a_request_with_which_no_label_can_be_joined_is_logged_with_a_note(log_home, tmp_path):
    keyless, answer = sent_rows([314], ["area", "distance"])
    entity = {"served_entity_id": "minutes1", "entity_name": log_home.env.model("minutes")}
    fill(tmp_path, [(log_home.env.table("keyless_payload"), values(20, **entity), body("instances", keyless), answer)])
    assert write_payloads(log_home.spark, log_home.env, tmp_path) == 1
    step = payloads.load_log_step(log_home.use_case, "dev", "2021-04-03", "keyless_payload")
    inference_logging.write_inference_log(step)
    assert step.logged == 1 and step.notes == [
        "1 prediction that no label can be joined with: a request needs delivery_id, or a client_request_id"]
