"""Adapters: attach, look past them, save, load, fold in. The frozen base is the reference model for free.

LoRA and its kin and IA3 are PEFT's; BitFit is the model itself with only its biases trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastalign.catalogue import nearest
from fastalign.models.backbone import head_of
from fastalign.models.switching import REFERENCE, using_adapter


@dataclass(frozen=True)
class AdapterOptions:
    """What the methods read.

    Attributes:
        r, alpha: LoRA's rank and the numerator of its scale.
        target_modules: names of the modules that are adapted; empty: the method's own choice.
    """

    r: int = 16
    alpha: int = 32
    target_modules: Sequence[str] = ()

    def __post_init__(self) -> None:
        for flag, value in (("--lora_r", self.r), ("--lora_alpha", self.alpha)):
            if value < 1:
                raise ValueError(f"{flag}: expected at least 1, got {value}")


def attach_adapter(model: PreTrainedModel, method: str, options: AdapterOptions = AdapterOptions()) -> nn.Module:
    """Freezes a causal LM and gives it what the method trains.

    Args:
        model: as `load.load_causal_lm` gives it.
        method: a row of `ADAPTERS`.

    Returns:
        A PEFT model, or (bitfit) the model itself; `backbone.hidden_states` and `head_of` take either.

    Raises:
        ValueError: an unknown method, one that token trees cannot have, or a model that has not what it adapts.
    """
    if method in REFUSED:
        raise ValueError(f"--peft_method {method}: {REFUSED[method]}; give one of {', '.join(ADAPTERS)}")
    if method not in ADAPTERS:
        raise ValueError(f"--peft_method: {nearest(method, ADAPTERS)}")
    return ADAPTERS[method](model, options)


def _lora(**changes: Any) -> Callable[[PreTrainedModel, AdapterOptions], nn.Module]:
    def attach(model: PreTrainedModel, options: AdapterOptions) -> nn.Module:
        return attach_lora(model, r=options.r, alpha=options.alpha, target_modules=options.target_modules or "all-linear", **changes)

    return attach


def attach_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    task_type: str = "CAUSAL_LM",
    use_dora: bool = False,
) -> nn.Module:
    """Freezes a causal LM and puts a trainable LoRA adapter on it (arXiv:2106.09685).

    Args:
        model: as `load.load_causal_lm` gives it.
        r: the rank.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with use_rslora, arXiv:2312.03732).
        dropout: of the adapter's inputs. Anything but 0 makes training see another network than the sampler does.
        target_modules: "all-linear" (every linear layer but the head), or names of modules.
        task_type: PEFT's; "SEQ_CLS" for a reward model, whose score head is then trained as it is (modules_to_save).
        use_dora: trains the norm of each adapted weight's rows apart from their direction (arXiv:2402.09353, Eq. 5).

    Returns:
        The PEFT model; `backbone.hidden_states` and `head_of` take it as it is.

    Raises:
        ValueError: when PEFT is not installed, a target does not exist, or the adapter would sit on the head.
    """
    peft = _peft()
    if r < 1:
        raise ValueError(f"attach_lora: r must be >= 1, got {r}")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    options = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": use_rslora, "use_dora": use_dora}
    return _wrap(model, peft.LoraConfig(**options, target_modules=targets, task_type=task_type))


def attach_qlora(model: PreTrainedModel, options: AdapterOptions = AdapterOptions()) -> nn.Module:
    """LoRA on a model loaded with `load_in_4bit` (arXiv:2305.14314): the base, and with it the reference, is the quantized one.

    Raises:
        ValueError: the model's weights are whole.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("attach_qlora: expected a model of load_causal_lm(..., load_in_4bit=True), got one with whole weights")
    return _lora()(model, options)


def attach_ia3(model: PreTrainedModel, options: AdapterOptions = AdapterOptions()) -> nn.Module:
    """Freezes a causal LM and scales keys, values and the inputs of the MLP's last layer by trained vectors (IA3, arXiv:2205.05638).

    Raises:
        ValueError: no module has one of the usual names and none is given, or an adapter would sit on the head.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    usual = [name for name in (*_IA3_ATTENTION, *_IA3_MLP) if name in names]
    targets = list(options.target_modules) or usual
    if not targets:
        raise ValueError(
            f"--peft_method ia3: no module of {type(model).__name__} is called {', '.join((*_IA3_ATTENTION, *_IA3_MLP))}; "
            f"name them with --lora_target_modules, of {', '.join(sorted(names))}"
        )
    inputs = [name for name in targets if name.rpartition(".")[2] in _IA3_MLP]
    return _wrap(model, _peft().IA3Config(target_modules=targets, feedforward_modules=inputs, task_type="CAUSAL_LM"))


def _wrap(model: PreTrainedModel, config: Any) -> nn.Module:
    wrapped = _peft().get_peft_model(model, config)
    if config.task_type == "CAUSAL_LM":
        head_of(wrapped)  # an adapter on the head would be invisible to the fused losses
    return wrapped


def train_biases(model: PreTrainedModel, options: AdapterOptions = AdapterOptions()) -> nn.Module:
    """Freezes a causal LM except for its biases (BitFit, arXiv:2106.10199), which are remembered: they are the reference.

    Raises:
        ValueError: the model has no biases.
    """
    biases = [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError(f"--peft_method bitfit: {model.config.model_type} has no biases to train; give lora or ia3")
    model.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_(True)
    model.first_biases = [(bias, bias.detach().clone()) for bias in biases]
    return model


MERGE_4BIT = (
    "--merge_adapter: 4-bit weights would round the sum; save the adapter, which as a --model_name_or_path is merged into the base's own"
)
ADAPTERS: dict[str, Callable[[PreTrainedModel, AdapterOptions], nn.Module]] = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "qlora": attach_qlora,
    "ia3": attach_ia3,
    "bitfit": train_biases,
}
REFUSED = dict.fromkeys(  # method → why
    ("prefix", "prefix_tuning", "prompt", "prompt_tuning", "p_tuning"),
    "its virtual tokens would come before every sequence, and a token tree shares its prompts without them",
)
_IA3_ATTENTION = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
_IA3_MLP = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")


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
    """Whether the model can be its own reference: PEFT wraps it, or only its biases are trained."""
    return _is_peft(model) or hasattr(model, "first_biases")


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


@contextmanager
def reference_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the adapter is off, or the one that is called "reference" is on: the model is its own frozen reference.

    Raises:
        TypeError: for a model without an adapter, whose reference must be another copy.
    """
    if _is_peft(model):
        with using_adapter(model, REFERENCE if REFERENCE in model.peft_config else None):  # type: ignore[operator]
            yield model
        return
    if not is_adapted(model):
        raise TypeError(f"reference_disabled: expected a PEFT model, got {type(model).__name__}; load a reference model instead")
    trained = [(bias, bias.data) for bias, _ in model.first_biases]  # type: ignore[union-attr]
    try:
        for bias, first in model.first_biases:  # type: ignore[union-attr]
            bias.data = first.to(bias.device)
        yield model
    finally:
        for bias, value in trained:
            bias.data = value


def merged(model: nn.Module) -> nn.Module:
    """A plain transformers model with the adapter folded into its weights, for export; a copy where there is something to fold.

    Raises:
        ValueError: the base has 4-bit weights, which would round the sum.
    """
    if not _is_peft(model):
        return model
    if getattr(model, "is_loaded_in_4bit", False):
        raise ValueError(MERGE_4BIT)
    return copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]


def save_adapter(model: nn.Module, folder: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors."""
    if not _is_peft(model):
        raise TypeError(f"save_adapter: expected a PEFT model, got {type(model).__name__}; use save_pretrained")
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters need the package peft: install fastalign with its peft extra") from error
    return peft
