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

import pytest
import small_use_cases as small

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.errors import MlopsError
from mlops_nb.serving import payload_table
from mlops_nb.serving.payload_table import payload_session, served_entities, write_payloads
from mlops_nb.serving.spool import LARGEST_BODY, SpoolWriter, closed_segments

pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
              pytest.mark.filterwarnings("ignore:.*An input example was not"),
              pytest.mark.filterwarnings("ignore:.*Add type hints to the")]

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


def test_a_table_that_cannot_be_written_keeps_its_segment_and_the_others_are_written(spool_home, tmp_path, monkeypatch):
    spark, env = spool_home
    tables.create(spark, env, "odd_payload", "databricks_request_id BIGINT")
    fill(tmp_path, [("dev.flights.odd_payload", values(1), b"{}", b"{}"),
                    ("dev.flights.even_payload", values(2), b"{}", b"{}")])
    fill(tmp_path, [("dev.flights.even_payload", values(3), b"{}", b"{}")], "worker1")
    monkeypatch.setattr(payload_table, "PAYLOAD_BATCH_BYTES", 1)  # a batch for each segment
    with pytest.raises(MlopsError, match="(?s)'databricks_request_id' of dev.flights.odd_payload is bigint.*tried "
                                          "again"):
        write_payloads(spark, env, tmp_path)
    assert request_ids(spark, env, "even_payload") == ["request2", "request3"] and len(closed_segments(tmp_path)) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from mlops_nb.serving import payload_table
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv.pop() == "merged": Path.unlink = kill
else: payload_table.merge_payloads = kill
payload_table.payload_writer_main()
"""


def started_writer(state: Path, code: str, *arguments: str) -> subprocess.Popen:
    "The writer's process with its spool and lakehouse in a folder."
    places = {"MLOPS_STATE": str(state), "MLOPS_LAKEHOUSE": str(state / "lakehouse"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(state / "spool"), "dev", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | places, stderr=subprocess.PIPE, text=True)


def test_a_writer_that_is_killed_anywhere_and_started_again_writes_each_request_once(tmp_path):
    states = {step: tmp_path / step for step in ("not_merged", "merged")}
    for state in states.values():
        fill(state / "spool", [("dev.flights.late_payload", values(number), b"{}", b"{}") for number in range(50)])
    killed = [started_writer(state, KILLED, step) for step, state in states.items()]
    for process in killed:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert all(len(closed_segments(state / "spool")) == 1 for state in states.values())
    main = "from mlops_nb.serving.payload_table import payload_writer_main as main; main()"
    again = {state: started_writer(state, main) for state in states.values()}
    for state, process in again.items():
        deadline = time.monotonic() + 60
        while closed_segments(state / "spool") and time.monotonic() < deadline: time.sleep(0.1)
        # appended after its first pass: written by the last one
        fill(state / "spool", [("dev.flights.late_payload", values(50), b"{}", b"{}")])
        process.send_signal(signal.SIGTERM)
    for state, process in again.items():
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors
        assert list((state / "spool").glob("*.segment")) == []
    for state in states.values():
        env = replace(small.load_env("dev", root=ROOT), state=state, lakehouse=str(state / "lakehouse"))
        rows = tables.read(get_spark(env), env, "late_payload").select("databricks_request_id").collect()
        assert sorted(row[0] for row in rows) == sorted(f"request{number}" for number in range(51))
        assert tables.read(get_spark(env), env, "served_entities").count() == 1
    stop()
