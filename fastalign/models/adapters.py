"""LoRA through PEFT: attach, look past the adapter, save, load. The frozen base is the reference model for free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastalign.models.backbone import head_of


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    task_type: str = "CAUSAL_LM",
) -> nn.Module:
    """Freezes a causal LM and puts a trainable LoRA adapter on it (arXiv:2106.09685).

    Args:
        model: as `load.load_causal_lm` gives it.
        r: the rank.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora, arXiv:2312.03732).
        dropout: of the adapter's inputs. Anything but 0 makes training see another network than the sampler does.
        target_modules: "all-linear" (every linear layer but the head), or names of modules.
        task_type: PEFT's; "SEQ_CLS" for a reward model, whose score head is then trained as it is (modules_to_save).

    Returns:
        The PEFT model; `backbone.hidden_states` and `head_of` take it as it is.

    Raises:
        ValueError: when PEFT is not installed, a target does not exist, or the adapter would sit on the head.
    """
    peft = _peft()
    if r < 1:
        raise ValueError(f"attach_lora: r must be >= 1, got {r}")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_rslora=use_rslora, task_type=task_type
    )
    wrapped = peft.get_peft_model(model, config)
    if task_type == "CAUSAL_LM":
        head_of(wrapped)  # an adapter on the head would be invisible to the fused losses
    return wrapped


def load_adapter(model: PreTrainedModel, folder: str, *, trainable: bool = False) -> nn.Module:
    """Puts an adapter saved in PEFT's format (safetensors) on its base model.

    Raises:
        ValueError: when the folder holds no adapter_config.json and adapter_model.safetensors.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"load_adapter: {folder!r} has no {name}; expected a folder that save_adapter or PEFT wrote")
    wrapped = _peft().PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    head_of(wrapped)
    return wrapped


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


@contextmanager
def reference_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the adapter is off: the model is its own frozen reference.

    Raises:
        TypeError: for a model without an adapter, whose reference must be another copy.
    """
    if not is_adapted(model):
        raise TypeError(f"reference_disabled: expected a PEFT model, got {type(model).__name__}; load a reference model instead")
    with model.disable_adapter():  # type: ignore[operator]
        yield model


def save_adapter(model: nn.Module, folder: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors."""
    if not is_adapted(model):
        raise TypeError(f"save_adapter: expected a PEFT model, got {type(model).__name__}; use save_pretrained")
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs the package peft: install fastalign with its peft extra") from error
    return peft
