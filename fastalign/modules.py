"""Fused losses as nn.Modules for a training loop of one's own: hidden states and a head's weight in, a scalar out, no logits.

The calls are Liger's (`LigerFusedLinear…Loss`), so that an import line changes and the loop does not; what differs is said
in each docstring. Each computes 6TVH over the scored rows only, with the gradient inside the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import TRL_NAMES, nearest
from .losses.packed import preference_loss
from .losses.policy import AGGREGATES, KL, POLICY, token_weights
from .losses.preference import PREFERENCE
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_logp import linear_logp
from .ops.linear_loss import linear_loss, units_of


class FusedLinearCrossEntropy(nn.Module):
    """Cross entropy of a linear head without its logits.

    Args:
        ce_weight: [V] class weights; ignore_index, label_smoothing, reduction: as torch.nn.CrossEntropyLoss.
        lse_square_scale: adds it times log-sum-exp² to every row (z-loss).
        softcap: soft-cap of the logits; not together with class weights, smoothing or z-loss.

    Raises:
        ValueError: an option out of range, or softcap with one that it excludes.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"FusedLinearCrossEntropy: expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
        if softcap is not None and (ce_weight is not None or label_smoothing or lse_square_scale):
            raise ValueError("FusedLinearCrossEntropy: softcap excludes ce_weight, label_smoothing and lse_square_scale")
        self.register_buffer("ce_weight", ce_weight, persistent=False)
        self.ignore_index, self.lse_square_scale, self.label_smoothing = ignore_index, lse_square_scale, label_smoothing
        self.reduction, self.softcap = reduction, softcap

    def forward(self, lin_weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """lin_weight [V, H], input [N, H] (or [B, T, H]), target [N] (or [B, T]), bias [V] → fp32 scalar, or [N] for "none"."""
        if target.shape != input.shape[:-1]:
            raise ValueError(f"FusedLinearCrossEntropy: target: expected {list(input.shape[:-1])}, got {list(target.shape)}")
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
        if self.softcap is not None:
            return self._softcapped(lin_weight, input, target, bias)
        return linear_cross_entropy(
            input,
            lin_weight,
            target,
            linear_bias=bias,
            weight=self.ce_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
        )

    def _softcapped(self, lin_weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        if self.reduction == "none":
            return -linear_logp(input, lin_weight, target, bias=bias, logit_softcap=self.softcap, ignore_index=self.ignore_index)
        rows = (target != self.ignore_index).nonzero().squeeze(1)
        divisor = max(len(rows), 1) if self.reduction == "mean" else 1

        def objective(logp: Tensor, span: slice) -> Tensor:
            return -logp.sum() / divisor

        return linear_loss(input[rows], lin_weight, target[rows], objective, bias=bias, logit_softcap=self.softcap)[0]


class FusedLinearDPO(nn.Module):
    """A preference loss of a padded batch of pairs; only scored rows reach the head, policy and reference alike.

    Args:
        loss_type: a row of `losses.preference.PREFERENCE` or what TRL calls one ("sigmoid" is "dpo"), with its own `options`.
        beta: the row's β, where it has one; ignore_index: target of rows that are not scored.
        use_ref_model: False for rows without a reference (simpo, orpo, cpo): no reference is read.

    Liger returns a tuple of statistics beside the loss; here it is a dict under TRL's names, without the mean logits.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        *,
        loss_type: str = "dpo",
        temperature: float = 1.0,
        use_ref_model: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.temperature, self.use_ref_model = ignore_index, temperature, use_ref_model
        self.loss_type = TRL_NAMES.get(loss_type, loss_type)
        if self.loss_type not in PREFERENCE:
            raise ValueError(f"FusedLinearDPO: loss_type: {nearest(self.loss_type, PREFERENCE)}")
        if use_ref_model and not PREFERENCE[self.loss_type].reference:
            raise ValueError(f"FusedLinearDPO: {self.loss_type} reads no reference; pass use_ref_model=False")
        known = PREFERENCE[self.loss_type].options
        self.options = {name: value for name, value in {"beta": beta}.items() if name in known} | dict(options or {})
        self.couples_pairs = any(default is None for default in known.values())  # it takes from the batch what is not given

    @torch.compiler.disable  # how many rows are scored, and in which pairs, is read from the targets
    def forward(
        self,
        lin_weight: Tensor,
        input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over P pairs, and the pairs' mean rewards, margins, accuracies and log-probs.

        Args:
            lin_weight: [V, H]; input: [2P, T, H], chosen first; target: [2P, T] aligned with input; bias: [V].
            ref_input: [2P, T, H'] of the reference model; ref_weight: [V, H']; ref_bias: [V].
        """
        if len(input) % 2:
            raise ValueError(f"FusedLinearDPO: expected chosen and rejected, an even number of sequences, got {len(input)}")
        given = {"target": target, "ref_input": ref_input if self.use_ref_model else None}
        _expect_rows("FusedLinearDPO", "input [2P, T, H]", input.shape[:2], given)
        pairs = len(input) // 2
        order = torch.arange(2 * pairs, device=input.device).view(2, pairs).t().reshape(-1)  # chosen and rejected side by side
        rows, cu_targets = _scored(target[order], self.ignore_index)
        hidden, targets = _flat(input[order], rows), target[order].reshape(-1)[rows]
        ref_logp = None
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("FusedLinearDPO: use_ref_model needs ref_input and ref_weight; pass use_ref_model=False for none")
            with torch.no_grad():
                ref_hidden = _flat(ref_input[order], rows)
                ref_logp = linear_logp(ref_hidden, ref_weight, targets, bias=ref_bias, temperature=self.temperature)

        def objective(logp: Tensor, span: slice) -> tuple[Tensor, dict[str, Any]]:
            here = units_of(span, units)
            inside = cu_targets[2 * here.start : 2 * here.stop + 1] - cu_targets[2 * here.start]
            ref = None if ref_logp is None else ref_logp[span]
            losses, found = preference_loss(logp, inside, loss=self.loss_type, options=self.options, ref_logp=ref)
            return losses.sum() / pairs, {name: value.sum() / pairs for name, value in found.items()}

        units = cu_targets[::2].contiguous()
        whole = units[[0, -1]] if self.couples_pairs else units
        loss, metrics = linear_loss(hidden, lin_weight, targets, objective, units=whole, bias=bias, temperature=self.temperature)
        return loss, {name: value for name, value in metrics.items() if "/" in name}


class FusedLinearGRPO(nn.Module):
    """A policy-gradient loss of a padded batch of completions with one advantage each.

    Args:
        beta: weight of the KL to the reference, 0 for none; kl: its estimator (k1, k2, k3).
        loss_type: a row of `losses.policy.POLICY` ("clip", "cispo", "gspo", …), with its own `options`.
        aggregate: "sequence" (GRPO), "token" (DAPO) or "budget" (Dr.GRPO, ÷ max_completion_length per sequence).
        epsilon_low, epsilon_high: the clip range, for rows that have one.

    Liger names loss and aggregation together: its "grpo" is aggregate="sequence", "dapo" and "bnpo" "token", "dr_grpo" "budget".
    """

    def __init__(
        self,
        beta: float = 0.04,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        *,
        loss_type: str = "clip",
        aggregate: str = "token",
        kl: str = "k3",
        temperature: float = 1.0,
        max_completion_length: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for what, name, table in (("loss_type", loss_type, POLICY), ("aggregate", aggregate, AGGREGATES), ("kl", kl, KL)):
            if name not in table:
                raise ValueError(f"FusedLinearGRPO: {what}: expected one of {', '.join(table)}; got {name!r}")
        if aggregate == "budget" and max_completion_length is None:
            raise ValueError("FusedLinearGRPO: aggregate='budget' needs max_completion_length")
        self.row, self.aggregate, self.kl, self.beta = POLICY[loss_type], aggregate, KL[kl], beta
        self.temperature, self.max_completion_length = temperature, max_completion_length
        known = self.row.function.__kwdefaults__ or {}
        for name in options or {}:
            if name not in known:
                raise ValueError(f"FusedLinearGRPO: {loss_type} has no option {name!r}; options: {', '.join(known) or 'none'}")
        clip = {"epsilon": epsilon_low, "epsilon_high": epsilon_high}
        self.options = {name: value for name, value in clip.items() if name in known} | dict(options or {})

    def forward(
        self,
        input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and {"kl", "entropy", "clip_ratio"}: means over the scored tokens.

        Args:
            input: [B, T, H], row t predicts selected_token_ids[:, t]; lin_weight: [V, H]; bias: [V].
            attention_mask: [B, T], 0 where a token is not scored; advantages: [B].
            ref_per_token_logps: [B, T], needed when beta > 0; old_per_token_logps: [B, T] (None: this policy sampled them).
        """
        if self.beta > 0 and ref_per_token_logps is None:
            raise ValueError(f"FusedLinearGRPO: beta={self.beta} needs ref_per_token_logps; pass beta=0 for no KL")
        given = {"attention_mask": attention_mask, "ref_per_token_logps": ref_per_token_logps, "old_per_token_logps": old_per_token_logps}
        _expect_rows("FusedLinearGRPO", "input [B, T, H]", input.shape[:2], {"selected_token_ids": selected_token_ids} | given)
        marked = torch.where(attention_mask.bool(), selected_token_ids, -100)
        rows, cu_targets = _scored(marked, -100)
        count, lengths = max(len(rows), 1), cu_targets.diff()
        weights = token_weights(
            self.aggregate,
            lengths,
            num_tokens=count,
            num_sequences=max(len(lengths), 1),
            budget=self.max_completion_length or 1,
        ).to(input.device)
        per_token = _each_token(advantages, lengths)
        old, ref = (None if t is None else t.reshape(-1)[rows].float() for t in (old_per_token_logps, ref_per_token_logps))

        def objective(logp: Tensor, span: slice) -> tuple[Tensor, dict[str, Any]]:
            before = logp.detach() if old is None else old[span]
            inside = cu_targets[(cu_targets > span.start) & (cu_targets < span.stop)] - span.start
            local = torch.cat((inside.new_zeros(1), inside, inside.new_tensor([span.stop - span.start])))
            loss = self.row.function(logp, before, per_token[span], local, **self.options)
            sums: dict[str, Any] = {}
            if self.beta > 0 and ref is not None:
                kl = self.kl(logp, ref[span])
                loss, sums["kl"] = loss + self.beta * kl, kl.detach().sum() / count
            return (weights[span] * loss).sum(), sums | self._clipped(logp.detach() - before, per_token[span], count)

        loss, metrics = linear_loss(
            _flat(input, rows),
            lin_weight,
            selected_token_ids.reshape(-1)[rows],
            objective,
            units=cu_targets if self.row.unit == "sequence" else None,
            bias=bias,
            temperature=self.temperature,
        )
        found = {name: metrics[name] for name in ("kl", "clip_ratio") if name in metrics}
        return loss, found | {"entropy": metrics["entropy"].sum() / count}

    def _clipped(self, log_ratio: Tensor, advantages: Tensor, count: int) -> dict[str, Tensor]:
        if "epsilon" not in self.options or self.row.unit == "sequence":
            return {}
        epsilon, above = self.options["epsilon"], self.options["epsilon_high"]
        low, high = 1 - epsilon, 1 + (epsilon if above is None else above)
        ratio = log_ratio.exp()
        return {"clip_ratio": (((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))).sum() / count}


def _each_token(advantages: Tensor, lengths: Tensor) -> Tensor:
    if advantages.numel() != len(lengths):
        raise ValueError(f"FusedLinearGRPO: advantages: expected [{len(lengths)}], one a sequence, got {list(advantages.shape)}")
    return torch.repeat_interleave(advantages.float(), lengths.to(advantages.device))


def _expect_rows(op: str, of: str, shape: torch.Size, given: dict[str, Tensor | None]) -> None:
    """Rows are cut out of the flattened tensors: a shape that does not fit would shift them."""
    for name, value in given.items():
        if value is not None and value.shape[:2] != shape:
            raise ValueError(f"{op}: {name}: expected {list(shape)}, the rows of {of}, got {list(value.shape)}")


def _scored(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened [B, T] that are scored, and how many of them each sequence has, as CPU int32 offsets [B+1]."""
    scored = targets != ignore_index
    cu_targets = torch.zeros(len(targets) + 1, dtype=torch.int32)
    cu_targets[1:] = scored.sum(1).cumsum(0)
    return scored.reshape(-1).nonzero().squeeze(1), cu_targets


def _flat(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])[rows]
