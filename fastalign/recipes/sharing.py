"""--share_backbone: policy, reference, critic and reward models as adapters of one set of base weights."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..judges import RewardModel
from ..models.adapters import load_adapter
from ..models.attention import disable_dropout
from ..models.backbone import causal_lm
from ..models.load import load_tokenizer
from ..models.shared import CONFIG, ScoringAdapter, attach_scores, begin_scores, keep_reference, why_apart
from ..models.switching import recompute_contexts
from .arguments import Arguments, ModelArguments
from .setup import Loaded, load

log = logging.getLogger("fastalign")
KINDS = ("lora", "rslora", "dora", "qlora")  # adapters of which a layer can hold several


def load_policy(args: Arguments) -> Loaded:
    """The policy; under --share_backbone such that others can be put beside its adapter.

    Where its name is an adapter's, that adapter is trained on and its beginning is the reference; otherwise a new adapter is, and the
    reference is the base.

    Raises:
        ValueError: --share_backbone without a LoRA adapter; else as `setup.load`.
    """
    given = args.model
    if not args.online.share_backbone:
        return load(given)
    method = given.peft_method or ("lora" if given.use_peft else "")
    if method not in KINDS:
        found = f"--peft_method {method} is none of them" if method else "the policy has none"
        raise ValueError(f"--share_backbone: models that share weights are LoRA adapters, and {found}; give --use_peft")
    folder = Path(given.model_name_or_path)
    continued = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    loaded = load_continued(given) if continued else load(given)
    if given.gradient_checkpointing:
        options = {"use_reentrant": False, "context_fn": partial(recompute_contexts, loaded.model)}
        causal_lm(loaded.model).gradient_checkpointing_enable(options)
    return replace(loaded, shared={})


def load_continued(given: ModelArguments) -> Loaded:
    """The base of a saved adapter with that adapter on it, to be trained, and a frozen copy of it as the reference."""
    folder = given.model_name_or_path
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if not base or kind != "LORA":
        found = f"is an adapter of {kind}" if base else "names no base model"
        raise ValueError(f"--share_backbone: {folder} {found}, expected LoRA on a base; merge it into its base with peft first")

    def attach(model: Any) -> nn.Module:
        wrapped = load_adapter(model, folder, trainable=True)
        disable_dropout(wrapped)
        keep_reference(wrapped)
        return wrapped

    return load(replace(given, model_name_or_path=base, tokenizer_name_or_path=given.tokenizer_name_or_path or folder), attach)


def scores_on(policy: Loaded, folder: str, adapter: str, flag: str, *, trainable: bool = False) -> tuple[ScoringAdapter, Any] | None:
    """A saved reward model as an adapter on the policy's base, and its tokenizer; None, and a word why, where it cannot be one.

    Args:
        adapter: what it is called there.
        flag: which names the folder.
    """
    reason = why_apart(policy.model, folder)
    if reason:
        log.warning("%s %s is loaded as a model of its own: %s; --share_backbone is for adapters of one base", flag, folder, reason)
        return None
    tokenizer = load_tokenizer(folder)
    return attach_scores(policy.model, adapter, folder, tokenizer, trainable=trainable), tokenizer


def reward_model(policy: Loaded, name: str, adapter: str, flag: str = "--reward") -> RewardModel:
    """A reward model that a flag names: on the policy's base where it is an adapter of that and sharing was asked for."""
    found = scores_on(policy, name, adapter, flag) if policy.shared is not None else None
    return RewardModel(*found, policy.tokenizer) if found else RewardModel.load(name, policy.tokenizer, device=policy.device)


def shared_critic(args: Arguments, policy: Loaded, adapter: str) -> tuple[ScoringAdapter, Any] | None:
    """The critic as an adapter on the policy's base, and its tokenizer; None where it must be a model of its own."""
    name = args.ppo.critic_model_name_or_path
    if name:
        return scores_on(policy, name, adapter, "--critic_model_name_or_path", trainable=True)
    tokenizer = load_tokenizer(args.model.tokenizer_name_or_path or args.model.model_name_or_path)
    return begin_scores(policy.model, adapter, tokenizer), tokenizer
