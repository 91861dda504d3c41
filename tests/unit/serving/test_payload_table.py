"""Segments, tables and locks of the payload writer, with tables in memory; integration/test_payloads.py has Delta."""
import os
import threading
import time
from pathlib import Path

import pytest

from mlops_nb.errors import MlopsError
from mlops_nb.serving import payload_table
from mlops_nb.serving.payload_table import segment_batches, write_pass, write_payloads, writer_arguments
from mlops_nb.serving.spool import SpoolWriter, closed_segments, read_segment

ODD, EVEN = "dev.flights.odd_payload", "dev.flights.even_payload"


@pytest.fixture
def merged(monkeypatch):
    "The requests that were merged, in order, each as (table, id); ODD cannot be written."
    calls = []
    def merge(spark, env, table, rows):
        time.sleep(0.02)
        if table == ODD: raise errors[0]
        calls.extend((table, row["databricks_request_id"]) for row in rows)
        return len(rows)
    errors = [MlopsError("the type of odd differs")]
    monkeypatch.setattr(payload_table, "merge_payloads", merge)
    monkeypatch.setattr(payload_table, "PAYLOAD_BATCH_BYTES", 1)  # a batch for each segment
    merge.calls, merge.errors = calls, errors
    return merge


def fill(folder: Path, *records: tuple[str, int]) -> None:
    "Append requests, each (table, number), to one closed segment."
    writer = SpoolWriter(folder, "worker0")
    for table, number in records:
        known = {"databricks_request_id": str(number), "request_time": 1e9, "status_code": 200}
        writer.append(table, known, b'{"number": %d}' % number, b"{}")
    writer.close()


def stored(folder: Path) -> list[tuple]:
    return [(record.table, record.values["databricks_request_id"], record.request)
            for path in closed_segments(folder) for record in read_segment(path)]


@pytest.mark.parametrize("error", [MlopsError("the type of odd differs"), RuntimeError("the session is gone")])
def test_records_of_a_table_that_cannot_be_written_stay_and_the_others_are_merged_once(env, tmp_path, merged, error):
    spool, merged.errors[0] = tmp_path / "spool", error
    fill(spool, (ODD, 1), (EVEN, 2), ("lab.flights.late_payload", 3))  # the last one is quarantined
    fill(spool, (EVEN, 4))
    for _ in range(3):
        with pytest.raises(MlopsError, match=f"1 table not written: {ODD}: {error}") as raised:
            write_payloads(None, env, spool)
        assert raised.value.__cause__ is (error if isinstance(error, RuntimeError) else None)
        assert merged.calls == [(EVEN, "2"), (EVEN, "4")]
        assert stored(spool) == [(ODD, "1", b'{"number": 1}')]
    segment, = spool.glob("*.segment")
    assert segment.stat().st_mode & 0o777 == 0o600
    file, = (spool / "quarantine").iterdir()
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize(("error", "stops"), [(MlopsError("odd differs"), []), (RuntimeError("gone"), ["stop"])])
def test_a_session_that_failed_is_replaced(env, tmp_path, merged, error, stops, monkeypatch):
    merged.errors[0], seen = error, []
    monkeypatch.setattr(payload_table, "payload_session", lambda env: None)
    monkeypatch.setattr(payload_table.session, "stop", lambda: seen.append("stop"))
    fill(tmp_path / "spool", (ODD, 1))
    assert not write_pass(env, tmp_path / "spool") and seen == stops


def test_two_writers_of_one_spool_write_each_request_once(env, tmp_path, merged):
    spool, errors = tmp_path / "spool", []
    for number in range(12): fill(spool, (EVEN, number))
    def write():
        try: write_payloads(None, env, spool)
        except Exception as error: errors.append(error)
    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers: writer.start()
    for writer in writers: writer.join()
    assert not errors and closed_segments(spool) == []
    assert merged.calls == [(EVEN, str(number)) for number in range(12)]
    assert list(spool.iterdir()) == []  # the lock stands beside it: what is in the spool starts a writer


def test_a_writer_that_waits_in_vain_says_so(env, tmp_path, merged, monkeypatch):
    monkeypatch.setattr(payload_table, "WRITER_LOCK_SECONDS", 0.1)
    spool = tmp_path / "spool"
    fill(spool, (EVEN, 1))
    with payload_table.sole_writer(spool), pytest.raises(MlopsError, match="another process has written the payloads"):
        write_payloads(None, env, spool)
    assert write_payloads(None, env, spool) == 1


def test_a_segment_that_is_gone_is_no_error(tmp_path):
    fill(tmp_path, (EVEN, 1))
    path, = closed_segments(tmp_path)
    assert list(segment_batches([tmp_path / "gone-1-1.segment", path])) == [[path]]


def test_the_process_that_starts_a_writer_names_itself(tmp_path):
    assert writer_arguments([str(tmp_path)]).parent == os.getppid()
    arguments = writer_arguments([str(tmp_path), "dev", "--parent", "7"])
    assert (arguments.spool, arguments.target, arguments.parent) == (tmp_path, "dev", 7)
