"""The arguments of `fastalign serve`, torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ServeArguments:
    """The server.

    Args:
        host: the address to listen on; 127.0.0.1 is reached from this machine alone, 0.0.0.0 from everywhere.
        port: the port to listen on; 0: a free one.
        served_model_name: what clients call the model; empty: model_name_or_path.
        api_key: the bearer token that clients must send; empty: none.
        max_waiting: requests that may wait for their first token; further ones get the status 503; 0: any number.
        max_num_seqs: sequences decoded at once.
        max_num_batched_tokens: tokens forwarded in one step; longer prompts are cut into chunks.
        kv_cache_tokens: tokens that the KV cache holds; 0: chosen from the work and free memory.
        prefix_caching: keep what was computed for prompts that begin alike.
        api_docs: serve /docs and /redoc, whose pages load their scripts from a public CDN.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str = ""
    api_key: str = ""
    max_waiting: int = 1024
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_tokens: int = 0
    prefix_caching: bool = True
    api_docs: bool = False
