"""TRL's trainers on fastalign's head: `accelerate_trainer(trainer)`.

TRL's SFT, DPO, KTO, GRPO and RLOO trainers get every per-token number from one call, `model(..., fused_lm_head=True)`. That call is
what is replaced, on the policy and on the reference: loss equations, metrics, generation and logging stay TRL's own.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastalign.integrations.forwards import (
    own_forward,
    plain_causal_lm,
    probe_batch,
    replace_forward,
    restore_forward,
    scored_rows,
    scored_tree_rows,
    spread,
    tolerance,
)
from fastalign.models.attention import NAME, UnsupportedModelError, register
from fastalign.models.backbone import causal_lm, head_of
from fastalign.models.probe import probe
from fastalign.ops.linear_scores import Scores, linear_scores

MARK = "_fastalign_trl"
TESTED = "1.16"
# TRL's name of a field -> ours
FIELDS = {"entropy": "entropy", "is_top1": "correct", "mean_logits": "mean_logit", "log_sum_sq_probs": "log_square_sum"}
Trainer = TypeVar("Trainer")
_attention_before: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # of models whose batches are packed


@dataclass(frozen=True)
class Seam:
    """What a trainer asks of a model's head.

    Attributes:
        fields: the per-token numbers it reads besides the log-probs, by TRL's names.
        temperature: divides the logits.
        fp32_head: the head is computed in fp32, outside autocast.
        entropy_gradient: whether the loss contains the entropy.
        one_slope: whether the loss is a mean of log-probs.
        pack: whether the backbone runs batches as token trees.
        autocast: of a model whose forward accelerate has wrapped already (with bf16=True, TRL's references): ours comes on top of
            that wrapper and does what it does.
    """

    fields: tuple[str, ...] = ()
    temperature: float = 1.0
    fp32_head: bool = False
    entropy_gradient: bool = False
    one_slope: bool = False
    pack: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] | None = None


def accelerate_trainer(trainer: Trainer, *, pack: bool = False) -> Trainer:
    """Makes a TRL trainer compute its log-probs with fastalign: the same losses and metrics, in less time and memory.

    Call it once, after the trainer is built and before `train()`. Works for SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer and
    RLOOTrainer and all their loss types, with and without PEFT. Only this trainer's models change; calling it twice is harmless.

    Before it returns, it has compared every number of a short random batch with TRL's own.

    Args:
        pack: also run the backbone without padding, and the prompt that a preference pair or a GRPO group shares once. It
            switches the models to fastalign's attention, which has a kernel on the CPU; generation stays TRL's. Dropout must be 0.

    Returns:
        The trainer.

    Raises:
        ImportError: TRL is missing, or its version is not the tested one.
        TypeError: another trainer.
        ValueError: an option that cannot work with it (Liger, DeepSpeed, FSDP, sharding, a router loss), a model whose head is not
            known, or numbers that differ from TRL's.
    """
    _check_version()
    seams = [(causal_lm(model), replace(seam, pack=pack)) for model, seam in _seams(trainer)]
    seams = [(base, _inside_autocast(base, seam, trainer)) for base, seam in seams]
    _check_options(trainer, pack)
    for base, seam in seams:
        plain_causal_lm(base, "accelerate_trainer")
        _restore(base)
        _prepare(base, seam)
    for base, seam in seams:
        replace_forward(base, MARK, _forward_of(seam))
    return trainer


def restore_trainer(trainer: Trainer) -> Trainer:
    """Undoes `accelerate_trainer`."""
    for model in (getattr(trainer, "model", None), getattr(trainer, "ref_model", None)):
        if model is not None:
            _restore(causal_lm(model))
    return trainer


def _restore(base: PreTrainedModel) -> None:
    restore_forward(base, MARK)
    attention = _attention_before.pop(base, None)
    if attention is not None:
        base.set_attn_implementation(attention)


def _prepare(base: PreTrainedModel, seam: Seam) -> None:
    """Switches the attention where it is asked for, then compares; a model that is refused is left as it was."""
    try:
        if seam.pack:
            register()
            _attention_before[base] = base.config._attn_implementation
            base.set_attn_implementation(NAME)
            with own_forward(base):
                probe(base)
        _compare(base, seam)
    except Exception:
        _restore(base)
        raise


def _check_version() -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"accelerate_trainer: TRL is not installed; pip install 'trl=={TESTED}.*'") from None
    if version.split(".")[:2] != TESTED.split("."):
        raise ImportError(f"accelerate_trainer: tested with TRL {TESTED}, found {version}; pip install 'trl=={TESTED}.*'")


def _seams(trainer: Any) -> list[tuple[Any, Seam]]:
    """(model, what is asked of it) for the policy and, where it is a model of its own, the reference."""
    import trl

    temperature, reference = float(getattr(trainer, "temperature", 1.0)), Seam()
    if isinstance(trainer, trl.SFTTrainer):
        policy = Seam(("entropy", "is_top1"), one_slope=trainer.args.loss_type == "nll")
    elif isinstance(trainer, trl.DPOTrainer):
        weighting = ("log_sum_sq_probs",) if trainer.use_weighting else ()
        policy = Seam(("entropy", "mean_logits", "is_top1", *weighting))
    elif isinstance(trainer, trl.KTOTrainer):
        policy = Seam(("entropy", "mean_logits"))
    elif isinstance(trainer, trl.GRPOTrainer):
        fp32 = bool(trainer.args.cast_lm_head_to_fp32)
        policy = Seam(("entropy",), temperature, fp32, entropy_gradient=trainer._entropy_bonus_enabled)
        reference = Seam((), temperature, fp32)
    elif isinstance(trainer, trl.RLOOTrainer):
        policy, reference = Seam(("entropy",), temperature), Seam((), temperature)
    else:
        raise TypeError(
            "accelerate_trainer: expected TRL's SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer or RLOOTrainer, got "
            f"{type(trainer).__name__}; for a transformers Trainer call fastalign.patch(model)"
        )
    models = [(trainer.model, policy)]
    return models if getattr(trainer, "ref_model", None) is None else [*models, (trainer.ref_model, reference)]


def _check_options(trainer: Any, pack: bool) -> None:
    name = type(trainer).__name__
    conflicts = {
        "use_liger_kernel=True": trainer.args.use_liger_kernel,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "tensor, context or sequence parallelism": _shards_model_or_sequence(trainer),
        "torch_compile=True": trainer.args.torch_compile,
        "packing or padding_free, beside pack=True": pack and _packs_itself(trainer),
        "a router loss (set router_aux_loss_coef=0.0)": getattr(trainer, "aux_loss_enabled", False),
    }
    found = [option for option, on in conflicts.items() if on]
    if found:
        raise ValueError(
            f"accelerate_trainer: not tested with {' and '.join(found)}; turn it off, or use {name} without accelerate_trainer"
        )


def _shards_model_or_sequence(trainer: Any) -> bool:
    config = trainer.accelerator.parallelism_config
    return config is not None and any((config.tp_enabled, config.cp_enabled, config.sp_enabled, config.dp_shard_enabled))


def _packs_itself(trainer: Any) -> bool:
    return any(getattr(where, name, False) for where, name in ((trainer.args, "packing"), (trainer, "padding_free")))


def _inside_autocast(base: PreTrainedModel, seam: Seam, trainer: Any) -> Seam:
    wrapped = "_original_forward" in base.__dict__  # accelerate's own mark
    return replace(seam, autocast=trainer.accelerator.autocast) if wrapped else seam


def _forward_of(seam: Seam) -> Callable[..., Any]:
    return functools.partial(_forward, seam)  # no closure: models are pickled


def _forward(seam: Seam, base: PreTrainedModel, previous: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if not arguments.get("fused_lm_head"):
        return previous(**arguments)
    return _scored(base, seam, {name: value for name, value in arguments.items() if name != "fused_lm_head"})


def _scored(base: PreTrainedModel, seam: Seam, arguments: dict[str, Any]) -> Any:
    """TRL's FusedCausalLMOutput from fastalign's numbers."""
    from trl.trainer.utils import FusedCausalLMOutput

    with seam.autocast() if seam.autocast else nullcontext():
        hidden, targets, mask = scored_tree_rows(base, arguments) if seam.pack else scored_rows(base, arguments)[:3]
        scores = _scores(base, seam, hidden, targets)
    log_probs = spread(scores.logp, mask)
    assert log_probs is not None
    count = arguments.get("num_items_in_batch")
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
    more = {name: spread(getattr(scores, FIELDS[name]), mask) for name in seam.fields}
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=mask, **more)


def _scores(base: PreTrainedModel, seam: Seam, hidden: Tensor, targets: Tensor) -> Scores:
    head = head_of(base)
    with torch.autocast(hidden.device.type, enabled=False) if seam.fp32_head else nullcontext():
        return linear_scores(
            hidden.float() if seam.fp32_head else hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=head.temperature(seam.temperature),
            logit_softcap=head.logit_softcap,
            fields=[FIELDS[name] for name in seam.fields],
            entropy_gradient=seam.entropy_gradient,
            one_slope=seam.one_slope,
        )


@torch.no_grad()
def _compare(base: PreTrainedModel, seam: Seam) -> None:
    """Every number of a short random batch, TRL's and ours."""
    batch, training = probe_batch(base), base.training
    base.eval()
    try:
        theirs = base(**batch, fused_lm_head=True)
        ours = _scored(base, seam, batch)
    finally:
        base.train(training)
    if not isinstance(theirs, type(ours)):
        raise ValueError(
            f"accelerate_trainer: the forward of {type(base).__name__} is no longer the one that TRL gave it (it returns "
            f"{type(theirs).__name__}); call accelerate_trainer right after building the trainer"
        )
    for name in ("loss", "log_probs", *seam.fields):
        expected, got = theirs[name], ours[name]
        if expected is None:
            raise ValueError(f"accelerate_trainer: TRL's head gives no {name} here; is this TRL {TESTED}?")
        off = _difference(expected, got, ours.label_mask)
        if not off <= tolerance(base, rounded=seam.autocast is not None):
            raise UnsupportedModelError(f"accelerate_trainer: {name} of {base.config.model_type} is off by {off:.2g} from TRL's own")


def _difference(expected: Tensor, got: Tensor, mask: Tensor) -> float:
    if expected.dtype == torch.bool:  # rounding may settle a tie the other way
        return float((expected != got)[mask].float().mean() > 0.5)
    return float(((expected.float() - got.float()).abs() / expected.float().abs().clamp(min=1)).max())
