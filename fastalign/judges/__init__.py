"""Judges: rewards and checks that need a model."""

from .asking import Question, Remembering
from .chooser import Chooser
from .judge import Comparison, Judge
from .local import LocalModel
from .reward_model import RewardModel
from .server import Patience, ServerModel
from .templates import TEMPLATES, Template, load_template
from .verifier import Verifier, verifier_records

__all__ = [
    "Chooser",
    "Comparison",
    "Judge",
    "LocalModel",
    "Patience",
    "Question",
    "Remembering",
    "RewardModel",
    "ServerModel",
    "TEMPLATES",
    "Template",
    "Verifier",
    "load_template",
    "verifier_records",
]
