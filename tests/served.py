"""A server with an ASGI application in a thread of the test."""
import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def served(app):
    "The address of a server with this application."
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.01)
    try: yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def with_users(app, digests):
    "The application for known users only, as the local workspace guards its own."
    from mlops_nb.workspace.rest_identity import sign_in_redirect, user_of_request

    @app.middleware("http")
    async def name_user(request, call_next):
        from fastapi.responses import JSONResponse
        path = request.url.path
        request.state.user = user_of_request(request.headers, digests, request.method)
        if request.state.user is None and path not in ("/login", "/logout", "/.well-known/databricks-config"):
            return sign_in_redirect(path, request.headers) or JSONResponse({"error_code": "UNAUTHENTICATED"}, 401)
        return await call_next(request)

    return app
