"""A small HTTP server in a thread, for the tests that answer or pass on the calls of a workspace."""
import threading
from http.server import ThreadingHTTPServer


class HttpServer(ThreadingHTTPServer):
    "Started by `with`, on a free port."
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
