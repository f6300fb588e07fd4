"""uvicorn around the application: one process, one socket, and an end that leaves no request hanging."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

from fastalign.generation.asynchronous import AsyncEngine
from fastalign.serving.app import create_app

KEEP_ALIVE_S = 75  # longer than clients keep idle connections: they, not we, close them
SHUTDOWN_S = 5


class Server(uvicorn.Server):
    """Serves an engine until SIGINT, SIGTERM or `should_exit`; then streams end with what they have.

    Args:
        engine: closed when the server stops.
        name: what clients call the model.
        host, port: where to listen; port 0 takes a free one.
        options: of `create_app`.
    """

    def __init__(self, engine: AsyncEngine, name: str, host: str, port: int, **options: Any) -> None:
        self.engine, self.name = engine, name
        config = uvicorn.Config(
            create_app(engine, name=name, **options),
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        super().__init__(config)

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, once it has started."""
        return self.servers[0].sockets[0].getsockname()[:2]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.address
            print(f"serving {self.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C stops)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the requests in flight before the connections: their clients get a last chunk with the finish_reason "abort"."""
        for server in self.servers:
            server.close()
        await self.engine.aclose()
        await super().shutdown(sockets)
