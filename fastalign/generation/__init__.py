"""Sampling with the weights that are being trained."""

from fastalign.generation.engine import Engine
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams, Stats
from fastalign.generation.requests import Request

__all__ = ["CompletionOutput", "Engine", "Request", "RequestOutput", "SamplingParams", "Stats"]
