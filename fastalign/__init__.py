"""fastalign: post-training of language models that computes everything once. Public names load when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module it lives in; a module's own name stands for the module itself
_HOME = {
    "linear_logp": "ops.linear_logp",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "linear_loss": "ops.linear_loss",
    "vocab_parallel_linear_logp": "ops.linear_parallel",
    "FusedLinearCrossEntropy": "modules",
    "FusedLinearDPO": "modules",
    "FusedLinearGRPO": "modules",
    "linear_kl": "ops.linear_kl",
    "policy_loss": "ops.policy",
    "PolicyOptions": "ops.policy",
    "gae": "ops.scan",
    "discounted_returns": "ops.scan",
    "preference_loss": "losses.packed",
    "unpaired_loss": "losses.packed",
    "use_backend": "ops.backend",
    "Packed": "packing",
    "Segment": "packing",
    "pack": "packing",
    "group": "packing",
    "pair": "packing",
    "conversation": "packing",
    "losses": "losses",
    "advantages": "advantages",
    "Engine": "generation.engine",
    "AsyncEngine": "generation.asynchronous",
    "SamplingParams": "generation.params",
    "RequestOutput": "generation.params",
    "patch": "integrations.transformers",
    "unpatch": "integrations.transformers",
    "env": "environment",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # the redundant aliases mark re-exports for type checkers
    from . import advantages as advantages
    from . import losses as losses
    from .environment import env as env
    from .generation.asynchronous import AsyncEngine as AsyncEngine
    from .generation.engine import Engine as Engine
    from .generation.params import RequestOutput as RequestOutput
    from .generation.params import SamplingParams as SamplingParams
    from .integrations.transformers import patch as patch
    from .integrations.transformers import unpatch as unpatch
    from .losses.packed import preference_loss as preference_loss
    from .losses.packed import unpaired_loss as unpaired_loss
    from .modules import FusedLinearCrossEntropy as FusedLinearCrossEntropy
    from .modules import FusedLinearDPO as FusedLinearDPO
    from .modules import FusedLinearGRPO as FusedLinearGRPO
    from .ops.backend import use_backend as use_backend
    from .ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .ops.linear_kl import linear_kl as linear_kl
    from .ops.linear_logp import linear_logp as linear_logp
    from .ops.linear_loss import linear_loss as linear_loss
    from .ops.linear_parallel import vocab_parallel_linear_logp as vocab_parallel_linear_logp
    from .ops.policy import PolicyOptions as PolicyOptions
    from .ops.policy import policy_loss as policy_loss
    from .ops.scan import discounted_returns as discounted_returns
    from .ops.scan import gae as gae
    from .packing import Packed as Packed
    from .packing import Segment as Segment
    from .packing import conversation as conversation
    from .packing import group as group
    from .packing import pack as pack
    from .packing import pair as pair


def __getattr__(name: str) -> Any:
    """Loads a public name (PEP 562): `import fastalign` alone imports neither torch nor transformers."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}; public names: {', '.join(_HOME)}")
    module = import_module(f".{home}", __name__)
    value = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
