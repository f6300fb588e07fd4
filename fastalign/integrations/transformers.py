"""`fastalign.patch(model)`: a Hugging Face causal LM that computes its loss without logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastalign.integrations.forwards import (
    has_forward,
    plain_causal_lm,
    probe_batch,
    replace_forward,
    restore_forward,
    scored_rows,
    spread,
    tolerance,
)
from fastalign.models.attention import UnsupportedModelError
from fastalign.models.backbone import causal_lm, head_of
from fastalign.ops.linear_loss import linear_loss

MARK = "_fastalign_patch"
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """What a patched model returns when labels are given: `logits` is None, and per token, detached, [B, T-1]:

    log_probs and entropy in nats (fp32), correct (int8, 1 where the label is the arg-max), all 0 where nothing is scored.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


def patch(model: Model) -> Model:
    """Makes this model compute its loss from hidden rows: only scored tokens reach the head, logits exist one chunk at a time.

    With `labels`, `model(...)` returns a `LossOutput`: the same loss and gradients as before (normalized by
    `num_items_in_batch` where the Trainer passes it), `logits=None`, and the log-prob, entropy and correctness of each scored
    token. Without labels nothing changes: generation and logits are the model's own. A batch in which nothing is scored has
    loss 0 in training (transformers gives NaN), and NaN without gradients. Only this instance changes; patching twice is harmless.
    Pickling keeps the model and not the patch, so patch what was loaded. torch.nn.DataParallel, which a Trainer takes for several GPUs
    in one process, cannot copy the patch to its replicas: start one process a GPU (torchrun, accelerate launch).

    Args:
        model: a transformers causal LM, or a PEFT model around one. An adapter on the head is not supported.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family computes its loss in a way that is not known here; found by comparing the two.
        TypeError: no transformers model, or one inside a wrapper (torch.compile, DistributedDataParallel): patch it before.
    """
    base = plain_causal_lm(model, "patch")
    if not has_forward(base, MARK):
        _compare(base)
        replace_forward(base, MARK, _forward)
    return model


def unpatch(model: Model) -> Model:
    """Gives a patched model its own forward back; a model that is not patched is left as it is."""
    restore_forward(causal_lm(model), MARK)
    return model


def _forward(base: PreTrainedModel, previous: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    no_labels = arguments.get("labels") is None and arguments.get("shift_labels") is None
    if no_labels or "fused_lm_head" in arguments:  # TRL's own call for log-probs goes to TRL's forward below
        return previous(**arguments)
    if isinstance(arguments.get("logits_to_keep", 0), Tensor) or arguments.get("logits_to_keep", 0):
        raise ValueError("patch: a patched model computes a loss over all labels; leave logits_to_keep out, or call unpatch(model)")
    hidden, targets, mask, out = scored_rows(base, arguments)
    loss, numbers = _loss(base, hidden, targets, arguments.get("num_items_in_batch"))
    found = LossOutput(
        loss=loss,
        past_key_values=out.get("past_key_values"),
        hidden_states=out.get("hidden_states"),
        attentions=out.get("attentions"),
        log_probs=spread(numbers["logp"], mask),
        entropy=spread(numbers["entropy"], mask),
        correct=spread(numbers["correct"].to(torch.int8), mask),
    )
    use_dict = arguments.get("return_dict")
    return found if (base.config.return_dict if use_dict is None else use_dict) else found.to_tuple()


def _loss(base: PreTrainedModel, hidden: Tensor, targets: Tensor, count: Any) -> tuple[Tensor, dict[str, Any]]:
    head = head_of(base)
    divisor = max(1, len(targets)) if count is None else count
    divisor = divisor.to(hidden.device) if isinstance(divisor, Tensor) else divisor

    def mean(logp: Tensor, span: slice) -> Tensor:
        return -logp.sum() / divisor

    options: dict[str, Any] = {"temperature": head.temperature(), "logit_softcap": head.logit_softcap}
    loss, numbers = linear_loss(hidden, head.weight, targets, mean, bias=head.bias, **options)
    unknown = count is None and not len(targets) and not torch.is_grad_enabled()  # a 0 would lower the mean of an evaluation
    return (loss + torch.nan if unknown else loss), numbers


@torch.no_grad()
def _compare(base: PreTrainedModel) -> None:
    """The loss of two short sequences by the model's own forward and by ours."""
    batch, training = probe_batch(base), base.training
    base.eval()
    try:
        theirs = base(**batch).loss
        hidden, targets, _, _ = scored_rows(base, batch)
        ours = _loss(base, hidden, targets, None)[0]
    finally:
        base.train(training)
    off = abs(float(ours) - float(theirs))
    if not off <= tolerance(base) * max(1.0, abs(float(theirs))):
        raise UnsupportedModelError(
            f"patch: {base.config.model_type} computes its loss in a way that is not known here: {float(theirs):.6f} by its own forward, "
            f"{float(ours):.6f} from its hidden rows and head"
        )
