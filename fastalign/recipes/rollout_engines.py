"""Which engine samples: over the policy itself, over its quantized weights, or over a copy that is one step behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..algorithms import Algorithm, Exploring, MixturePlay, OnlinePreference
from ..generation import Engine
from ..losses.policy import POLICY
from ..models.copies import ModelCopy
from .ahead import Ahead
from .arguments import Arguments
from .judging import JudgeOptions, names_judge
from .online_arguments import OnlineArguments
from .setup import Loaded


def quantization_of(online: OnlineArguments) -> str | None:
    """What the engine that samples is given; evaluation always runs the weights themselves."""
    return None if online.rollout_quantization == "none" else online.rollout_quantization


def is_off_policy(online: OnlineArguments) -> bool:
    """Whether the rollouts are not the policy's own."""
    return online.rollout_quantization != "none" or online.max_staleness > 0


def engine_of(args: Arguments, model: nn.Module, tokenizer: Any, quantization: str | None = None, **options: Any) -> Engine:
    """An engine as the flags of sampling describe it."""
    sampling = args.sampling
    sizes: dict[str, Any] = {"kv_cache_tokens": sampling.kv_cache_tokens or None, "max_num_seqs": sampling.max_num_seqs}
    return Engine(model, tokenizer, quantization=quantization, **sizes, **options)


def sampling_engine(args: Arguments, loaded: Loaded, live: Engine) -> Engine:
    """What samples the policy as it is: the engine over it, or one more that quantizes it."""
    quantization = quantization_of(args.online)
    return live if quantization is None else engine_of(args, loaded.model, loaded.tokenizer, quantization)


def uncorrected(online: OnlineArguments, algorithm: Algorithm) -> bool:
    """Whether what another policy sampled is to count as the policy's own."""
    corrected = algorithm.correction_options.get("correction") != "none" or online.off_policy_objective == "plain"
    return is_off_policy(online) and not corrected


def check_staleness(args: Arguments, algorithm: Algorithm) -> None:
    """Raises ValueError for flags of rollouts that do not go together, or with the row."""
    online = args.online
    if online.max_staleness > 1:
        raise ValueError(
            f"--max_staleness {online.max_staleness}: one rollout is sampled ahead, from one copy of the weights; more would be staler and"
            " no sooner there; give 1"
        )
    if online.rollout_device and not online.max_staleness:
        raise ValueError(
            f"--rollout_device {online.rollout_device}: rollouts of the policy itself are on its device; add --max_staleness 1"
        )
    if online.off_policy_objective == "plain":
        _check_plain(online, algorithm)
    if not online.max_staleness:
        return
    if isinstance(algorithm, Exploring | MixturePlay):
        raise ValueError(
            f"--max_staleness 1: {online.algorithm} also samples its opponent, which is made of the policy as it is; give --max_staleness 0"
        )
    if online.share_backbone:
        raise ValueError(
            "--max_staleness 1: with --share_backbone a reward model would switch adapters under the running update; leave one of them out"
        )
    for specification in online.reward:
        if names_judge(specification) and JudgeOptions.parse(specification).is_self:
            raise ValueError(
                f"--max_staleness 1: {specification} would judge with weights that are being updated; name the model's folder instead of"
                " self, or give --max_staleness 0"
            )


def _check_plain(online: OnlineArguments, algorithm: Algorithm) -> None:
    if not is_off_policy(online):
        raise ValueError("--off_policy_objective plain: the rollouts are the policy's own; it goes with --max_staleness 1")
    if isinstance(algorithm, OnlinePreference) or not POLICY[algorithm.loss].function.__kwdefaults__:
        loss = "preference loss" if isinstance(algorithm, OnlinePreference) else f"loss {algorithm.loss!r}"
        raise ValueError(f"--off_policy_objective plain: the {loss} takes no ratio; leave it out")
    if online.importance_correction not in ("auto", "none"):
        raise ValueError(
            f"--importance_correction {online.importance_correction}: with --off_policy_objective plain the ratio is the sampler's already;"
            " leave one of them out"
        )


def rollouts_ahead(args: Arguments, loaded: Loaded, live: Engine, num_steps: int) -> Ahead | None:
    """What samples one step ahead; None where rollouts are the policy's own.

    Args:
        live: the engine over the policy.
        num_steps: of the run.

    Raises:
        ValueError: a device that is not there, or that the model cannot be copied to.
    """
    if not args.online.max_staleness:
        return None
    device = _device(args, loaded)
    copy = ModelCopy(loaded.model, device)
    # a graph is recorded while no other thread allocates on a GPU, which nobody can promise beside an update
    engine = engine_of(args, copy.model, loaded.tokenizer, quantization_of(args.online), cuda_graphs=False)
    return Ahead(copy, engine, live, num_steps)


def planned_copy(args: Arguments, loaded: Loaded) -> dict[str, Any]:
    """What the plan of --dry_run says of the copy; empty without one."""
    if not args.online.max_staleness:
        return {}
    elsewhere = _device(args, loaded) not in (None, next(loaded.model.parameters()).device)
    copied = [p for p in loaded.model.parameters() if elsewhere or p.requires_grad]
    return {"memory: copy that samples, MiB": round(sum(p.numel() * p.element_size() for p in copied) / 2**20)}


def _device(args: Arguments, loaded: Loaded) -> torch.device | None:
    name = args.online.rollout_device
    if not name:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--rollout_device: expected cpu or a CUDA device as in cuda:1, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--rollout_device: expected cpu or a CUDA device as in cuda:1, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--rollout_device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; name one of them, or none")
    if getattr(loaded.model, "is_loaded_in_4bit", False):
        raise ValueError(f"--rollout_device {name}: 4-bit weights stay where they were quantized; leave it out")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
