"""`fastalign serve`: a model behind OpenAI's HTTP interface, on this machine's own weights and nobody else's network."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Any

from .arguments import ModelArguments
from .serve_arguments import ServeArguments


def run(model: ModelArguments, serve: ServeArguments) -> None:
    """Loads the model and serves it until it is interrupted.

    Raises:
        ValueError: FastAPI or uvicorn is not installed.
        OSError: the address is taken.
    """
    check_installed()
    from ..generation import AsyncEngine  # late: torch takes seconds, and the check above does not need it
    from ..serving.server import Server
    from .setup import load

    loaded = load(model)
    loaded.model.eval()
    engine = AsyncEngine(make_engine(loaded, serve), max_waiting=serve.max_waiting or None)
    name = serve.served_model_name or model.model_name_or_path
    server = Server(engine, name, serve.host, serve.port, api_key=serve.api_key, api_docs=serve.api_docs)
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # uvicorn ends its work on SIGINT or SIGTERM, then sends itself the signal again
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit as error:  # uvicorn's, which has logged the reason
        raise OSError(f"cannot listen on {serve.host}:{serve.port}; is another server there? choose another --port") from error


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def make_engine(loaded: Any, serve: ServeArguments) -> Any:
    """The engine that the flags describe."""
    from ..generation import Engine

    return Engine(
        loaded.model,
        loaded.tokenizer,
        kv_cache_tokens=serve.kv_cache_tokens or None,
        max_num_seqs=serve.max_num_seqs,
        max_num_batched_tokens=serve.max_num_batched_tokens,
        prefix_caching=serve.prefix_caching,
    )


def check_installed() -> None:
    """Raises ValueError when what only the server needs is not there."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(f"fastalign serve needs {' and '.join(missing)}: pip install 'fastalign[serve]'")
