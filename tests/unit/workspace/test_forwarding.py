"""The answers of control that a worker passes on."""
import asyncio
import tempfile
from types import SimpleNamespace

import httpx

from mlops_nb.workspace.forwarding import Forwarder


def test_the_end_of_an_answer_in_parts_reaches_a_client_that_reads_slowly():
    sent = []

    async def control(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def send(message):
        for _ in range(5): await asyncio.sleep(0)  # uvicorn waits here until its buffer has been read
        sent.append(message)

    async def receive(): await asyncio.Event().wait()

    async def forward(path):
        async with await asyncio.start_unix_server(control, path):
            scope = {"method": "GET", "raw_path": b"/a", "query_string": b"", "headers": [(b"host", b"x")]}
            await Forwarder(path)(scope, receive, send)

    with tempfile.TemporaryDirectory(prefix="w") as folder: asyncio.run(forward(f"{folder}/control"))
    assert [(message.get("body"), message.get("more_body")) for message in sent[1:]] == [(b"first", True), (b"", None)]


def test_a_client_that_leaves_at_the_end_of_an_answer_is_no_error():
    async def forward():
        gone, sent = asyncio.Event(), []

        async def parts(): yield b"all"

        async def close():  # of the connection to control, while the client closes its own
            gone.set()
            for _ in range(5): await asyncio.sleep(0)

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message): sent.append(message)

        answer = SimpleNamespace(headers=httpx.Headers(), status_code=200, stream=parts(), aclose=close)
        await Forwarder("unused").pass_back(answer, receive, send)
        return sent

    assert [message.get("body") for message in asyncio.run(forward())] == [None, b"all"]
