"""What the control process does beside requests: it watches tokens and payloads."""
import asyncio
from types import SimpleNamespace

import pytest

from mlops_nb.serving.places import WorkspacePlaces
from mlops_nb.serving.spool import SpoolWriter
from mlops_nb.workspace import supervisor
from mlops_nb.workspace.tokens import make_token
from mlops_nb.workspace.worker_updates import ChildGone


class SmallSupervisor(supervisor.Supervisor):
    "Without processes."

    def __init__(self, places, workers):
        self.places, self.workers, self.tokens, self.users, self.passed_on = places, workers, {}, {}, None
        self.log, self.sockets, self.tokens_time = supervisor.logging.getLogger("test"), places.folder, 0
        self.read_tokens()

    writes = 0
    async def start_writer(self):
        self.writes += 1
        raise OSError("no space left on device")


class Workers:
    "Take tokens, the first time with an error."

    def __init__(self): self.answers, self.users = [ChildGone("worker 0 has ended")], None

    async def tell_all(self, command, seconds, digests):
        if self.answers: return [self.answers.pop()]
        self.users = set(digests.values())
        return [None]


@pytest.fixture
def small(tmp_path): return SmallSupervisor(WorkspacePlaces(tmp_path), Workers())


def test_tokens_are_sent_until_all_workers_have_them_and_an_error_does_not_end_the_watch(small, monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr(supervisor.asyncio, "sleep", lambda seconds: sleep(0.01))

    async def watch():
        watching = asyncio.create_task(small.watch())
        await sleep(0.05)
        make_token(small.places, "ann")
        await sleep(0.2)
        watching.cancel()
    asyncio.run(watch())
    assert small.workers.users == {"ann"} and small.writes > 3
    assert small.passed_on is small.users


def test_a_worker_that_starts_while_tokens_change_gets_the_new_ones(small):
    given = []

    class Worker:
        async def ask(self, command, digests): given.append(digests)
    async def once(worker):
        if len(given) == 1: small.users = {"digest": "ann"}
    small.manager = SimpleNamespace(bring_up=once)
    asyncio.run(small.bring_up(Worker()))
    assert given == [{}, {"digest": "ann"}]


def test_the_payload_writer_starts_for_segments_only(small):
    started, spool = [], small.places.spool
    async def keep(name, command): started.append(name)
    small.children, small.tasks = SimpleNamespace(processes={}, keep=keep), []

    async def start():
        await supervisor.Supervisor.start_writer(small)
        await asyncio.gather(*small.tasks)
    (spool / "quarantine").mkdir(parents=True)
    (spool / "quarantine/worker0-1-1.jsonl").write_text("{}\n")
    asyncio.run(start())
    assert not started, "nothing is to be written"
    writer = SpoolWriter(spool, "worker0")
    writer.append("dev.flights.late_payload", {"number": 1}, b"{}", None)
    writer.flush()  # the segment is open
    asyncio.run(start())
    small.tasks.clear()
    asyncio.run(start())
    writer.close()
    assert started == ["payload writer"]
