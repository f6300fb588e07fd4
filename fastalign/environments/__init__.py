"""Environments: what answers the model in conversations of several turns, and the sampler that brings the two together."""

from .protocol import Environment, Kind
from .sampler import MultiTurn
from .specifications import BUILTIN, load_environment

__all__ = ["BUILTIN", "Environment", "Kind", "MultiTurn", "load_environment"]
