"""linear_cross_entropy: torch.nn.functional.linear_cross_entropy's call, without the logits and with two more terms.

A row's loss is a(−logp) + (ε/V)(W·lse − Σ_v w_v logit_v) + z·lse², with a = (1 − ε) w_target and W = Σ w. Its gradient is known in
closed form, so "mean" and "sum" take it in the forward (6TVH, 4 with a frozen head). The smoothing sum is linear in the
head: Σ_v w_v logit_v = hidden · (Σ_v w_v head_v), H numbers, no pass over the logits.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastalign.ops.linear_chunks import RowGrads, Rows
from fastalign.ops.linear_fused import Fused, tie, wanted_gradients
from fastalign.ops.linear_head import Head, blas_ready, check_inputs, check_targets, compute_dtype, even_chunks, wants_wide
from fastalign.ops.linear_logp import LinearLogp
from fastalign.ops.linear_passes import Kept

OP = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    options: object = None,
    head_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of linear(input, linear_weight, linear_bias), same call as torch.nn.functional.linear_cross_entropy.

    Args:
        input: [N, H] or [H]; linear_weight: [V, H]; target: [N] or [] class indices; linear_bias: [V].
        weight: [V] class weights; "mean" divides by the sum of the targets' weights, as torch does.
        ignore_index: rows with this target cost nothing and add nothing (None: -100).
        label_smoothing: in [0, 1]; z_loss: adds z_loss · log-sum-exp² to every row that is kept, before the reduction.
        options: torch's chunking options; accepted and ignored with a note, chunks are chosen here.
        head_dtype: torch.float32 keeps the logits of 16-bit inputs in fp32, as in `linear_logp`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [N] for reduction "none". Where every row is ignored the mean is 0
        (torch gives NaN).

    Raises:
        ValueError: shapes, dtypes or options that are wrong, a target outside the vocabulary (named by row), class
            probabilities as target, a head of more than two dimensions (use torch's own function for those).
    """
    if options is not None:
        warnings.warn(f"{OP}: options are ignored, chunks are chosen here", stacklevel=2)
    if linear_weight.dim() != 2 or target.is_floating_point():
        raise ValueError(
            f"{OP}: expected linear_weight [V, H] and class indices as target, got {list(linear_weight.shape)} and {target.dtype};"
            " torch.nn.functional.linear_cross_entropy takes class probabilities and more dimensions"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{OP}: expected reduction 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if input.dim() == 1:
        loss = linear_cross_entropy(
            input[None],
            linear_weight,
            target.reshape(1),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            head_dtype=head_dtype,
        )
        return loss.reshape(())
    check_inputs(OP, input, linear_weight, target, linear_bias, 1.0, None)
    ignore = -100 if ignore_index is None else ignore_index
    terms = _Terms(input, linear_weight, target.long(), linear_bias, weight, ignore, label_smoothing, z_loss)
    terms.wide_logits = wants_wide(OP, terms.dtype, head_dtype)
    return terms.each() if reduction == "none" else terms.total(reduction == "mean")


class _Terms:
    """The row weights of one call and the two ways to sum them."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> None:
        vocab_size = head.shape[0]
        if class_weight is not None and class_weight.shape != head.shape[:1]:
            raise ValueError(f"{OP}: expected weight [{vocab_size}], one a class, got {list(class_weight.shape)}")
        if not torch.compiler.is_compiling():
            check_targets(OP, targets, vocab_size, ignore_index)
        self.dtype = compute_dtype(OP, hidden, head)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.hidden, self.head, self.bias = hidden, head, bias
        self.ignore_index, self.targets, self.kept = ignore_index, targets, targets != ignore_index
        safe = torch.where(self.kept, targets, 0)
        ones = torch.ones((), dtype=self.wide, device=hidden.device)
        self.class_weight = None if class_weight is None else class_weight.detach().to(self.wide)
        row_weight = ones if self.class_weight is None else self.class_weight[safe]
        self.row_weight = torch.where(self.kept, row_weight, torch.zeros_like(ones))
        self.share = smoothing / vocab_size
        self.smoothing, self.z_loss, self.wide_logits = smoothing, z_loss, False
        self.mass = float(vocab_size) if self.class_weight is None else self.class_weight.sum()

    def rows(self, rows: Rows, row_weight: Tensor) -> Tensor:
        """Losses [n] without the sum over the classes, which is linear in the head."""
        loss = (self.smoothing - 1.0) * row_weight * rows.logp
        if self.smoothing:
            loss = loss + self.share * self.mass * rows.lse
        return loss + self.z_loss * rows.lse.square() if self.z_loss else loss

    def slopes(self, rows: Rows, row_weight: Tensor, scale: Tensor) -> RowGrads:
        """The derivative of scale · rows(...)."""
        lse = scale * (self.share * self.mass + 2.0 * self.z_loss * rows.lse) if self.smoothing or self.z_loss else None
        return RowGrads(scale * (self.smoothing - 1.0) * row_weight, None, lse)

    def class_sum(self, hidden: Tensor, counts: Tensor | float) -> Tensor:
        """Σ_v weight_v logit_v summed over the rows that went into hidden [n, H], counts [n] of them: [n]. 2VH, no logits."""
        class_weight = self.row_weight.new_ones(self.head.shape[0]) if self.class_weight is None else self.class_weight
        total = hidden.to(self.wide) @ (class_weight @ self.head.to(self.wide))
        return total if self.bias is None else total + counts * (class_weight @ self.bias.to(self.wide))

    def each(self) -> Tensor:
        """[N] losses; the gradient recomputes the logits (8TVH)."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        more = bool(self.smoothing or self.z_loss)
        options = (1.0, None, self.ignore_index, self.wide_logits)
        logp, _, lse = LinearLogp.apply(self.hidden.to(self.dtype), self.head.to(self.dtype), bias, self.targets, options, False, more)
        loss = self.rows(Rows(logp, logp if lse is None else lse, None, self.kept), self.row_weight)
        if self.smoothing:
            loss = loss - self.share * self.class_sum(self.hidden, 1.0)
        return torch.where(self.kept, loss, torch.zeros_like(loss))

    def total(self, mean: bool) -> Tensor:
        """The scalar, its gradient taken chunk by chunk in the forward."""
        weight = self.row_weight.sum() if mean else torch.ones((), dtype=self.wide, device=self.hidden.device)
        scale = torch.where(weight == 0, torch.zeros_like(weight), 1.0 / weight)
        if torch.compiler.is_compiling():  # which rows are kept is not known while tracing; inside the op it is
            return self.each().sum() * scale
        loss = self._fused(scale)
        if self.smoothing:
            kept_sum = torch.where(self.kept[:, None], self.hidden.to(self.wide), 0.0).sum(0, keepdim=True)
            loss = loss - scale * self.share * self.class_sum(kept_sum, self.kept.sum()).sum()
        return loss

    def _fused(self, scale: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        head = Head(blas_ready(self.head.detach().to(self.dtype)), bias, 1.0, None, self.wide_logits)
        kept = Kept.where(self.kept)
        wanted = wanted_gradients(self.hidden, self.head, self.bias)
        hidden, targets, row_weight = (kept.of(t) for t in (self.hidden.detach().to(self.dtype), self.targets, self.row_weight))
        loss = torch.zeros_like(scale)

        def judge(rows: Rows, span: slice) -> RowGrads | None:
            nonlocal loss
            loss = loss + scale * self.rows(rows, row_weight[span]).sum()
            return self.slopes(rows, row_weight[span], scale) if any(wanted) else None

        chunks = even_chunks(0, len(targets), head.chunk_rows(None)[0])
        with torch.no_grad():
            fused = Fused(head, hidden, targets, wanted, None, len(chunks), entropy=False)
            for span in chunks:
                fused.whole(span, judge)
        d_hidden, d_weight, d_bias = fused.gradients()
        d_hidden = None if d_hidden is None else kept.spread(d_hidden)
        return tie(OP, loss, (self.hidden, self.head, self.bias), (d_hidden, d_weight, d_bias))
