"""The spool: what was appended is read again, also after SIGKILL, a full disk and a stuck disk; append never raises."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlops_nb.serving import spool
from mlops_nb.serving.spool import SPOOL_FULL, SpoolWriter, closed_segments, read_segment

TABLE = "dev.flights.late_payload"

APPENDING = """
import sys, time
from pathlib import Path
from mlops_nb.serving.spool import SpoolWriter
writer, number = SpoolWriter(Path(sys.argv[1]), "worker0"), 0
while True:
    writer.append("dev.flights.late_payload", {"number": number}, b"x" * 500, b"y" * 100)
    print(number, time.monotonic(), flush=True)
    number += 1
    time.sleep(0.0005)
"""
FULL_DISK = """
import resource, sys
from pathlib import Path
from mlops_nb.serving.spool import SpoolWriter
writer = SpoolWriter(Path(sys.argv[1]), "worker0")
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))  # less than a record without its bodies
writer.append("dev.flights.late_payload", {"number": 0}, b"x" * 1000, b"y")
for _ in range(5): writer.flush()
print(sum(map(len, writer._held)), len(writer._held))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for number in range(1, 120): writer.append("dev.flights.late_payload", {"number": number}, b"x" * 1000, b"y")
writer.flush()
for number in range(120, 150): writer.append("dev.flights.late_payload", {"number": number}, b"x" * 1000, b"y")
writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.append("dev.flights.late_payload", {"number": 150}, b"x" * 1000, b"y")
writer.close()
print(writer.lost)
"""


def records(folder: Path) -> list:
    "The records of all closed segments."
    return [record for path in closed_segments(folder) for record in read_segment(path)]


def appending(folder: Path) -> subprocess.Popen:
    "A process that appends 2,000 records a second and prints the number and the time of each."
    return subprocess.Popen([sys.executable, "-c", APPENDING, str(folder)], stdout=subprocess.PIPE, text=True)


def numbers(folder: Path) -> list[int]: return [record.values["number"] for record in records(folder)]


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_appended_a_second_before(tmp_path):
    with appending(tmp_path) as process:
        first = process.stdout.readline()
        threading.Timer(1.8, process.kill).start()
        lines = [first, *process.stdout]
    killed = time.monotonic()
    assert process.returncode == -signal.SIGKILL
    old = [int(line.split()[0]) for line in lines if line.endswith("\n") and float(line.split()[1]) < killed - 1]
    assert len(old) > 200
    read = numbers(tmp_path)
    assert set(old) <= set(read) and len(read) == len(set(read))
    assert all(record.request == b"x" * 500 and record.response == b"y" * 100 for record in records(tmp_path))


def test_a_segment_is_read_only_when_its_process_has_closed_it_or_is_dead(tmp_path):
    own = SpoolWriter(tmp_path, "worker1")
    own.append(TABLE, {"number": -1}, None, None)
    own.flush()
    with appending(tmp_path) as process:
        deadline = time.monotonic() + 10
        while len(list(tmp_path.glob("*.segment"))) < 2 and time.monotonic() < deadline: time.sleep(0.05)
        assert len(list(tmp_path.glob("*.segment"))) == 2 and closed_segments(tmp_path) == []  # both are alive
        process.kill()
        process.communicate()
    assert [path.name.split("-")[0] for path in closed_segments(tmp_path)] == ["worker0"]
    own.rotate_if_old(seconds=0)
    assert -1 in numbers(tmp_path)
    own.append(TABLE, {"number": -2}, None, None)  # a new segment
    own.close()
    assert len(closed_segments(tmp_path)) == 3 and own.lost == 0


def test_a_torn_end_is_skipped_and_what_precedes_it_is_read(tmp_path):
    writer = SpoolWriter(tmp_path, "worker0")
    for number in range(3): writer.append(TABLE, {"number": number}, b"request", b"response")
    writer.close()
    path, = closed_segments(tmp_path)
    whole = path.read_bytes()
    assert len(whole) % 3 == 0
    frame = len(whole) // 3
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert numbers(tmp_path) == list(range(length // frame))
    for position in range(frame, 2 * frame, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1:])
        assert numbers(tmp_path) == [0]


def test_a_full_disk_costs_bodies_and_no_records(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size, held, lost = map(int, result.stdout.split())
    assert 0 < size < 100 and (held, lost) == (1, 0) and "the spool is not written: [Errno 27]" in result.stderr
    read = records(tmp_path)
    assert [record.values["number"] for record in read] == list(range(151))
    dropped = [record for record in read if record.request is None]
    assert 0 < len(dropped) < 151 and read[-1].request == b"x" * 1000
    assert all(record.values["logging_error_codes"] == [SPOOL_FULL] for record in dropped)


def test_a_stuck_disk_delays_no_request_and_bounds_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "BUFFER_BYTES", 20_000)
    monkeypatch.setattr(spool, "CLOSE_SECONDS", 0.2)
    released = threading.Event()
    write = spool.OpenSegment.write
    monkeypatch.setattr(spool.OpenSegment, "write", lambda self, data: (released.wait(10), write(self, data))[1])
    writer = SpoolWriter(tmp_path, "worker0")
    began = time.monotonic()
    for number in range(1000): writer.append(TABLE, {"number": number}, b"x" * 1000, b"y")
    assert time.monotonic() - began < 0.2
    assert 0 < writer.lost < 1000 and writer._appended < 41_500
    kept = 1000 - writer.lost
    released.set()
    deadline = time.monotonic() + 10
    while writer._appended > writer._done and time.monotonic() < deadline: time.sleep(0.02)
    writer.close()
    read = records(tmp_path)
    assert [record.values["number"] for record in read] == list(range(kept))
    assert read[0].request and read[-1].request is None
    assert read[-1].values["logging_error_codes"] == [SPOOL_FULL]


def test_records_in_the_memory_of_a_stuck_writer_are_counted_as_lost_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(spool.OpenSegment, "write", lambda self, data: time.sleep(2))
    writer = SpoolWriter(tmp_path, "worker0")
    writer.append(TABLE, {"number": 0}, None, None)
    while writer._frames: time.sleep(0.01)  # the thread is stuck with the first record
    for number in range(5): writer.append(TABLE, {"number": number}, None, None)
    writer.close()
    assert writer.lost >= 5


def test_a_spool_that_nobody_reads_has_a_limit(tmp_path):
    (tmp_path / "worker1-1-1.segment").write_bytes(b"\0" * 95_000)  # of another worker
    writer = SpoolWriter(tmp_path, "worker0", max_bytes=100_000)
    writer.flush()  # measures the folder
    for number in range(100): writer.append(TABLE, {"number": number}, b"x" * 1000, b"y")
    writer.close()
    (tmp_path / "worker1-1-1.segment").unlink()
    read = records(tmp_path)
    assert writer.lost == 100 - len(read) > 0 and len(read) > 30
    assert {record.request for record in read} == {None}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5500


def test_a_folder_that_cannot_be_made_raises_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    writer = SpoolWriter(tmp_path / "file" / "spool", "worker0")
    writer.append(TABLE, {"number": 0}, b"x", b"y")
    writer.flush()
    writer.close()
    assert writer.lost == 1


def test_segments_are_private_and_empty_leftovers_are_removed(tmp_path):
    folder = tmp_path / "spool"
    writer = SpoolWriter(folder, "worker0")
    writer.append(TABLE, {"number": 0}, b"x", b"y")
    writer.close()
    segment, = closed_segments(folder)
    assert folder.stat().st_mode & 0o777 == 0o700 and segment.stat().st_mode & 0o777 == 0o600
    old, young = folder / "a-1-1.new", folder / "b-1-1.new"
    for path in (old, young): path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    spool.remove_unfinished(folder)
    assert not old.exists() and young.exists() and segment.exists()


def test_append_takes_microseconds(tmp_path):
    writer, values = SpoolWriter(tmp_path, "worker0"), {"databricks_request_id": "a" * 32, "request_time": 1e9}
    request = b"x" * 1000
    best = min(timed_append(writer, values, request) for _ in range(20))
    writer.close()
    assert best < 50e-6, f"{best * 1e6:.1f} microseconds"  # 3 on an idle machine


def timed_append(writer: SpoolWriter, values: dict, request: bytes) -> float:
    "The mean seconds of 200 appended records."
    began = time.perf_counter()
    for _ in range(200): writer.append(TABLE, values, request, b"y" * 100)
    return (time.perf_counter() - began) / 200
