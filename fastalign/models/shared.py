"""Critics and reward models that are LoRA adapters on a policy's base weights, each with a linear score of its own.

In a folder they are what PEFT makes of a sequence classifier: `fastalign reward --use_peft` writes and reads the same files.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.models.attention import disable_dropout
from fastalign.models.backbone import causal_lm
from fastalign.models.reward import notes_of, settle_padding
from fastalign.models.switching import POLICY, REFERENCE, belongs, parameters_of, using_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SCORE = "base_model.model.score."  # what PEFT calls a classifier's head
_HEADS = ["classifier", "score"]  # what it saves in full beside a classifier's adapter

_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # of LoRA's ways to begin


class ScoringAdapter(nn.Module):
    """A critic or reward model that is one adapter of a policy and a score: `models.reward` runs it like any other.

    Its parameters and its saved files are the adapter's and the score's alone.

    Args:
        policy: a PEFT model of LoRA adapters.
        adapter: this one's name in it.
        score: the head.
        tokenizer: its padding token is set to the one that the model skips.
    """

    def __init__(self, policy: nn.Module, adapter: str, score: nn.Linear, tokenizer: Any) -> None:
        super().__init__()
        self._policy, self.adapter = [policy], adapter  # in a list, so that the base's parameters are not this module's
        self.weights = nn.ParameterList(parameters_of(policy, adapter))
        self.score = score.to(self.weights[0].device)
        self.config = copy.deepcopy(causal_lm(policy).config)
        settle_padding(self, tokenizer)  # type: ignore[arg-type]
        for name, value in notes_of(tokenizer).items():
            setattr(self.config, name, value)

    def get_base_model(self) -> PreTrainedModel:
        """The backbone that it shares."""
        return causal_lm(self._policy[0])

    def activated(self) -> AbstractContextManager[nn.Module]:
        """Inside, the backbone computes with this adapter."""
        return using_adapter(self._policy[0], self.adapter)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter and the score under the names that PEFT saves them by; the tensors are the parameters' own memory."""
        from peft import get_peft_model_state_dict  # deferred: peft is an extra

        own = get_peft_model_state_dict(self._policy[0], adapter_name=self.adapter, save_embedding_layers=False)
        return own | {_SCORE + name: value.detach() for name, value in self.score.named_parameters()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads on a sequence classifier of the base."""
        config = copy.copy(self._policy[0].peft_config[self.adapter])  # type: ignore[index]
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", _HEADS, True
        config.save_pretrained(str(folder))
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def begin_scores(policy: nn.Module, name: str, tokenizer: Any) -> ScoringAdapter:
    """A trainable adapter that begins as the policy's is now, and a score drawn from torch's generator."""
    own = copy.deepcopy(policy.peft_config[POLICY])  # type: ignore[index]
    own.modules_to_save, own.lora_dropout = None, 0.0
    _add(policy, name, own)
    _copy(policy, name)
    config = causal_lm(policy).config.get_text_config()
    score = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(score.weight, std=getattr(config, "initializer_range", 0.02))
    return ScoringAdapter(policy, name, score, tokenizer).requires_grad_(True)


def attach_scores(policy: nn.Module, name: str, folder: str, tokenizer: Any, *, trainable: bool = False) -> ScoringAdapter:
    """Puts a reward model that was saved as an adapter beside the policy's own, its score with it.

    Args:
        policy: a PEFT model of LoRA adapters on the same base (`why_apart` says whether).
        name: the adapter's name in it.
        folder: what `fastalign reward --use_peft` or `ScoringAdapter.save_pretrained` wrote.
        tokenizer: the one that lies in the folder.

    Raises:
        ValueError: the files do not fit the policy's base.
    """
    weights = load_file(Path(folder) / WEIGHTS)
    head = {key.removeprefix(_SCORE): weights.pop(key) for key in list(weights) if key.startswith(_SCORE)}
    if "weight" not in head:
        raise ValueError(f"{folder}: its {WEIGHTS} has no {_SCORE}weight; expected what fastalign reward --use_peft wrote")
    attach_weights(policy, name, folder, weights)
    score = nn.Linear(head["weight"].shape[1], head["weight"].shape[0], bias="bias" in head)
    score.load_state_dict(head)
    return ScoringAdapter(policy, name, score, tokenizer).requires_grad_(trainable)


def attach_weights(policy: nn.Module, name: str, folder: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Puts a saved adapter on a model under a name, frozen.

    Args:
        weights: what the folder's file holds; None: it is read.

    Raises:
        ValueError: the model has not what the file's tensors adapt, or they have other shapes.
    """
    from peft import PeftConfig, set_peft_model_state_dict  # deferred: peft is an extra

    config = PeftConfig.from_pretrained(folder)
    config.modules_to_save, config.lora_dropout, config.task_type = None, 0.0, "CAUSAL_LM"
    known = dict(load_file(Path(folder) / WEIGHTS) if weights is None else weights)
    try:
        _add(policy, name, config)
        result = set_peft_model_state_dict(policy, known, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the adapter does not fit {config.base_model_name_or_path}: {error}") from error
    strange = [*result.unexpected_keys, *(key for key in result.missing_keys if belongs(key, name))]
    if strange:
        raise ValueError(f"{folder}: the adapter does not fit {config.base_model_name_or_path}: {len(strange)} weights, {strange[0]} first")
    disable_dropout(policy)


def keep_reference(policy: nn.Module) -> None:
    """Keeps the policy's adapter as it is now as a frozen one, which is its reference from here on."""
    _add(policy, REFERENCE, copy.deepcopy(policy.peft_config[POLICY]))  # type: ignore[index]
    _copy(policy, REFERENCE)


def _copy(policy: nn.Module, name: str) -> None:
    """Gives an adapter the policy's weights."""
    known = dict(policy.named_parameters())
    with torch.no_grad():
        for own, parameter in known.items():
            if belongs(own, name):
                parameter.copy_(known[own.replace(f".{name}", f".{POLICY}")])


def _add(policy: nn.Module, name: str, config: Any) -> None:
    """A new frozen adapter; whatever required a gradient before still does."""
    config.init_lora_weights = True  # others may take from the base's weights what they begin with
    trained = [p for p in policy.parameters() if p.requires_grad]
    policy.add_adapter(name, config)  # type: ignore[operator]
    for parameter in parameters_of(policy, name):
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def why_apart(policy: nn.Module, folder: str) -> str:
    """Why a reward model cannot be one of the policy's adapters; empty: it can."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return "it is a whole model" if (Path(folder) / "config.json").is_file() else "it is no local folder of an adapter"
    config = json.loads(path.read_text(encoding="utf-8"))
    ours = policy.peft_config[POLICY]  # type: ignore[index]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        return f"its adapter is {config.get('peft_type')} with bias {config.get('bias')!r}, and only LoRA without biases shares a base"
    for whose, begun in (("its", config.get("init_lora_weights")), ("the policy's", ours.init_lora_weights)):
        if str(begun).startswith(_MOVE_THE_BASE):
            return f"{whose} adapter was begun by {begun}, which changes the base's weights"
    own, theirs = ours.base_model_name_or_path, config.get("base_model_name_or_path")
    return "" if same_model(own, theirs) else f"its base is {theirs}, and the policy's is {own}"


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two names are one folder, or one Hub name."""
    if not one or not other:
        return False
    return os.path.realpath(one) == os.path.realpath(other) if os.path.isdir(one) else one == other


def weights_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers, what several models share counted once."""
    storages: dict[int, torch.UntypedStorage] = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())
