"""Sampling with the weights that are being trained."""

from fastalign.generation.asynchronous import AsyncEngine, EngineClosedError, EngineFailedError, EngineFullError, StreamDelta
from fastalign.generation.engine import Engine
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams, Stats
from fastalign.generation.requests import Request
from fastalign.generation.scoring import SequenceScores

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineClosedError",
    "EngineFailedError",
    "EngineFullError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "SequenceScores",
    "Stats",
    "StreamDelta",
]
