"""Sampling with the weights that are being trained."""

from fastalign.generation.engine import Engine
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams, Stats

__all__ = ["CompletionOutput", "Engine", "RequestOutput", "SamplingParams", "Stats"]
