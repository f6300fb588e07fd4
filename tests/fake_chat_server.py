"""A server of chat completions on the loopback device whose replies a function gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
    """Serves until the block ends. `url` ends in /v1; `bodies` and `headers` are those of the requests, in order of arrival.

    Args:
        reply: request body → the text of the reply, or (status, body text) of an error.
    """
    seen = SimpleNamespace(bodies=[], headers=[], busy=0, most=0, url="")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.busy += 1
                seen.most = max(seen.most, seen.busy)
            try:
                said = reply(body)
            finally:
                with lock:
                    seen.busy -= 1
            status, text = said if isinstance(said, tuple) else (200, None)
            if text is None:
                text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
