"""linear_logp with the head's vocabulary split over a torch.distributed group: each rank multiplies its own rows only.

Every rank computes the numbers of its rows (their log-sum-exp, entropy, and the target's logit where it owns it), one
all-reduce joins them to those of the whole vocabulary, and the backward needs one more for dL/dhidden. Traffic a call:
4 doubles a row forward, [N, H] backward; never a logit. 2TVH/R forward and 6TVH/R backward on each of R ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.linear_chunks import Gradients
from fastalign.ops.linear_head import Head, blas_ready, borrowed, check_inputs, chunk_rows, compute_dtype, even_chunks, head_logits
from fastalign.ops.linear_passes import Kept
from fastalign.ops.logits import grad_rows_, logp_rows
from fastalign.ops.once import once

OP = "vocab_parallel_linear_logp"


def vocab_parallel_linear_logp(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias_shard: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Any:
    """`linear_logp` of a head whose rows are spread over the ranks of a group, in rank order; shards may differ in size or be empty.

    Args:
        hidden: [N, H], the same on every rank; weight_shard: [V_r, H], this rank's rows; bias_shard: [V_r].
        targets: [N] int64 in the whole vocabulary, the same on every rank.
        group: the process group (None: the default one).

    Returns:
        logp [N] in nats, fp32 (fp64 for fp64 inputs), 0 where ignored, the same on every rank; with `return_entropy`,
        (logp, entropy). dL/dhidden is summed over the group; dL/dweight_shard is this rank's.

    Raises:
        ValueError: shapes or dtypes that do not fit, a target outside the whole vocabulary (names the row).
        RuntimeError: no process group, a second differentiation, or torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{OP}: torch.compile is not supported; wrap the call with torch.compiler.disable")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"{OP}: no process group; call torch.distributed.init_process_group first, or use linear_logp")
    check_inputs(OP, hidden, weight_shard, targets, bias_shard, temperature, logit_softcap)
    dtype = compute_dtype(OP, hidden, weight_shard)
    shard = _Shard.of(weight_shard.shape[0], group, hidden.device)
    _check_targets(targets, shard.vocab_size, ignore_index)
    bias = None if bias_shard is None else bias_shard.to(dtype)
    options = (shard, float(temperature), logit_softcap, int(ignore_index))
    logp, entropy = _VocabParallel.apply(hidden.to(dtype), weight_shard.to(dtype), bias, targets.long(), options)
    return (logp, entropy) if return_entropy else logp


class _Shard(NamedTuple):
    """Which columns of the whole vocabulary this rank owns."""

    group: dist.ProcessGroup | None
    start: int
    stop: int
    vocab_size: int

    @classmethod
    def of(cls, rows: int, group: dist.ProcessGroup | None, device: torch.device) -> _Shard:
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        sizes[dist.get_rank(group)] = rows
        dist.all_reduce(sizes, group=group)
        ends = sizes.cumsum(0).tolist()
        rank = dist.get_rank(group)
        return cls(group, ends[rank] - rows, ends[rank], ends[-1])

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[_Shard, float, float | None, int],
    ) -> tuple[Tensor, Tensor]:
        shard, temperature, softcap, ignore_index = options
        head = Head(blas_ready(weight), bias, temperature, softcap)
        kept = Kept.where(targets != ignore_index)
        x, y = kept.of(hidden), kept.of(targets)
        local = _local_rows(head, x, y, shard)
        logp, lse, entropy = _join(local, shard, torch.promote_types(x.dtype, torch.float32))
        ctx.options, ctx.kept = options, kept
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.set_materialize_grads(False)
        return kept.spread(logp), kept.spread(entropy)

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None) -> Any:
        if g_logp is None and g_entropy is None:
            return (None,) * 5
        shard, temperature, softcap, _ = ctx.options
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        kept: Kept = ctx.kept
        with torch.no_grad():
            head = Head(blas_ready(weight), bias, temperature, softcap)
            x, y = kept.of(hidden), kept.of(targets)
            upstream = torch.zeros_like(lse) if g_logp is None else kept.of(g_logp), None if g_entropy is None else kept.of(g_entropy)
            into = _gradients(head, x, y, lse, entropy, upstream, needs, shard)
            d_hidden = None if into.hidden is None else shard.sum(kept.spread(into.hidden).to(lse.dtype)).to(hidden.dtype)
            d_weight, d_bias = into.head_gradient(), into.bias
        inputs = [t for t in (hidden, weight, bias) if t is not None]
        grads = (d_hidden, d_weight, d_bias)
        return (*(None if g is None else once(OP, g.to(hidden.dtype), *inputs) for g in grads), None, None)


class _Local(NamedTuple):
    """What a rank knows of each row, fp64 [n]: its largest logit, log-sum-exp and expected logit relative to that, target's logit or 0."""

    top: Tensor
    log_sum: Tensor
    entropy: Tensor
    target: Tensor


def _local_rows(head: Head, hidden: Tensor, targets: Tensor, shard: _Shard) -> _Local:
    parts = []
    if not len(head.weight):  # a vocabulary smaller than the group's shards: nothing here, as if all logits were −inf
        none = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
        return _Local(none - torch.inf, none, none, none)
    rows, _ = chunk_rows(head.weight.shape[0], head.weight.element_size(), None)
    with borrowed(min(rows, len(targets)), head.weight.shape[0], head.weight) as buffer:
        for s in even_chunks(0, len(targets), rows):
            logits = head_logits(hidden[s], head.weight, head.bias, out=buffer)
            best = logits.argmax(1)  # the log-prob of the largest logit is small, so its fp32 keeps the log-sum-exp of logits of 1e4 exact
            logp, _, entropy, _ = logp_rows(logits, best, temperature=head.temperature, logit_softcap=head.logit_softcap, entropy=True)
            assert entropy is not None
            owned = (targets[s] >= shard.start) & (targets[s] < shard.stop)
            column = torch.where(owned, targets[s] - shard.start, 0)
            top, at_target = (_soften(logits.gather(1, c[:, None])[:, 0], head) for c in (best, column))
            parts.append(_Local(top, -logp.double(), entropy.double(), torch.where(owned, at_target, 0.0)))
            del logits  # else it lives until the next chunk's are there
    empty = torch.empty(0, dtype=torch.float64, device=hidden.device)
    return _Local(*(torch.cat(columns) for columns in zip(*parts, strict=True))) if parts else _Local(empty, empty, empty, empty)


def _join(local: _Local, shard: _Shard, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy) over the whole vocabulary, the same bits on every rank."""
    top = shard.max(local.top.clone())
    dead = local.top == -torch.inf  # a shard of nothing but −inf has no log-sum-exp, and adds nothing
    down = torch.where(dead, -torch.inf, local.top + local.log_sum - top)  # its log-sum-exp relative to the largest logit of all
    mass = down.exp()
    # H = Σ_r w_r (H_r + lse − lse_r) with w_r = exp(lse_r − lse)
    spread = torch.where(mass == 0, 0.0, mass * (local.entropy - down))
    summed = shard.sum(torch.stack((mass, spread, local.target)))
    log_sum = summed[0].log()
    entropy = summed[1] / summed[0] + log_sum
    return ((summed[2] - top) - log_sum).to(dtype), (top + log_sum).to(dtype), entropy.to(dtype)


def _gradients(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    upstream: tuple[Tensor, Tensor | None],
    needs: tuple[bool, bool, bool],
    shard: _Shard,
) -> Gradients:
    rows, _ = chunk_rows(max(len(head.weight), 1), head.weight.element_size(), None)
    chunks = even_chunks(0, len(targets) if len(head.weight) else 0, rows)
    into = Gradients.of(head, len(targets), needs, only_chunk=len(chunks) == 1)
    with borrowed(min(rows, len(targets)), head.weight.shape[0], head.weight) as buffer:
        for s in chunks:
            logits = head_logits(hidden[s], head.weight, head.bias, out=buffer)
            g, g_entropy = upstream[0][s], None if upstream[1] is None else upstream[1][s]
            owned = (targets[s] >= shard.start) & (targets[s] < shard.stop)
            column = torch.where(owned, targets[s] - shard.start, 0)
            first = _other_gradient(logits[:, 0], head, lse[s], entropy[s], g, g_entropy)
            known = (lse[s], entropy[s], g, g_entropy)
            grad_rows_(logits, column, *known, temperature=head.temperature, logit_softcap=head.logit_softcap)
            # the kernel takes its target column for the target; where another rank owns the target, column 0 is like any other
            logits[:, 0] = torch.where(owned, logits[:, 0], first.to(logits.dtype))
            into.add(head, logits, hidden[s], s)
            del logits
    return into


def _soften(logit: Tensor, head: Head) -> Tensor:
    z = logit.double()
    return (z if head.logit_softcap is None else head.logit_softcap * torch.tanh(z / head.logit_softcap)) / head.temperature


def _other_gradient(logit: Tensor, head: Head, lse: Tensor, entropy: Tensor, g: Tensor, g_entropy: Tensor | None) -> Tensor:
    """The gradient of one column that is not the target: −p (g + g_H (log p + H)) / temperature · dsoftcap."""
    logp = _soften(logit, head) - lse
    slope = -logp.exp() * (g if g_entropy is None else g + g_entropy * (logp.clamp(min=-100.0) + entropy))
    cap = head.logit_softcap
    return slope / head.temperature * (1.0 if cap is None else 1 - torch.tanh(logit.double() / cap) ** 2)


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{OP}: targets must be in [0, vocab size {vocab_size} of all ranks), got {int(targets[row])} at row {row}")
