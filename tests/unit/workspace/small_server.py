"""A small server in the place of MLflow's: it answers what it was asked."""
import subprocess
import sys

SERVER = """
import asyncio, os, sys, threading
from mlops_nb.workspace.mlflow_pages import end_with_input
threading.Thread(target=end_with_input, daemon=True).start()
async def app(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    names = b",".join(name for name, _ in scope["headers"])
    headers = [(b"x-path", scope["raw_path"] + b"?" + scope["query_string"]), (b"x-names", names),
               (b"x-pid", str(os.getpid()).encode()), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    await send({"type": "http.response.start", "status": 418, "headers": headers})
    await send({"type": "http.response.body", "body": body[::-1], "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})
import uvicorn
uvicorn.run(app, uds=sys.argv[1], log_level="error", lifespan="off")
"""


def start_small(env, folder):
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-c", SERVER, str(folder / "socket")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
