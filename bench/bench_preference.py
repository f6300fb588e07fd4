"""Preference losses from per-token log-probs, forward and backward, against the eager computation on a padded batch.

    python bench/bench_preference.py [--quick] [--rounds 5]

Both sides return the losses' gradient in the log-probs and the metrics that TRL logs: rewards, margins, accuracies, log-probs. The torch
side gets the same packed log-probs and offsets; "torch, padded" gets what a padded trainer has instead, [2B, longest] log-probs that are 0
where padded. The floor
is the latency of a call: an autograd.Function that computes nothing, forward and backward. All sides include the mean over the losses.
Times are of 100 calls, so that the clock does not count; the work itself is a few microseconds of each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import run_file
from fastalign.losses.packed import preference_loss, unpaired_loss

CALLS = 100


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, losses):
        ctx.size = logp.shape
        return losses.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.new_empty(ctx.size), None


def times_100(step, logp):
    def run():
        for _ in range(CALLS):
            logp.grad = None
            step().mean().backward()

    return run


def batch(pairs, longest, device):
    """Ragged completions: log-probs and reference log-probs padded with 0, the mask, and the offsets of the packed ones."""
    lengths = torch.randint(longest // 2, longest + 1, (2 * pairs,))
    lengths[0] = longest
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    logp, ref = -torch.rand(2, 2 * pairs, longest) * mask
    cu_targets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return logp.to(device), ref.to(device), mask.to(device), cu_targets


def dpo_of_sums(chosen, rejected, ref_chosen, ref_rejected):
    """Loss and metrics as TRL's trainer has them."""
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    losses = -F.logsigmoid(0.1 * (chosen_ratio - rejected_ratio))
    rewards = 0.1 * chosen_ratio.detach(), 0.1 * rejected_ratio.detach()
    _ = rewards[0] - rewards[1], (rewards[0] > rewards[1]).float(), chosen.detach(), rejected.detach()
    return losses


def padded_dpo(logp, ref):
    """The chosen half first, masked positions 0."""
    return dpo_of_sums(*logp.sum(1).chunk(2), *ref.sum(1).chunk(2))


def packed_dpo(logp, ref, cu_targets):
    """Chosen and rejected in turn, as the offsets say."""
    lengths = cu_targets.diff()
    sequences = len(lengths)
    index = torch.repeat_interleave(lengths)
    sums, ref_sums = (x.new_zeros(sequences).index_add(0, index, x).view(-1, 2) for x in (logp, ref))
    return dpo_of_sums(*sums.unbind(1), *ref_sums.unbind(1))


@pytest.mark.parametrize("pairs, longest", [(16, 512), (2, 128), (64, 2048)])
def bench_dpo(versus, device, quick, pairs, longest):
    if quick and pairs != 16:
        pytest.skip("--quick: 16 pairs of 512")
    logp, ref, mask, cu_targets = batch(pairs, longest, device)
    padded, packed = logp.clone().requires_grad_(), logp[mask].requires_grad_()
    packed_ref, nothing = ref[mask], ref[::2, 0].contiguous()
    sides = {
        "fastalign": times_100(lambda: preference_loss(packed, cu_targets, ref_logp=packed_ref)[0], packed),
        "torch": times_100(lambda: packed_dpo(packed, packed_ref, cu_targets), packed),
        "torch, padded": times_100(lambda: padded_dpo(padded, ref), padded),
        "floor": times_100(lambda: Nothing.apply(packed, nothing), packed),
    }
    versus("preference dpo x100", f"{pairs} pairs of {longest}", torch.float32, sides, memory=False)


def bench_kto(versus, device, quick):
    pairs, longest = 16, 512
    logp, ref, mask, cu_targets = batch(pairs, longest, device)
    padded, packed = logp.clone().requires_grad_(), logp[mask].requires_grad_()
    packed_ref, labels = ref[mask], torch.arange(2 * pairs, device=device) % 2 == 0
    desirable, undesirable = labels.nonzero().squeeze(1), (~labels).nonzero().squeeze(1)

    def eager():
        sums, ref_sums = padded.sum(1), ref.sum(1)
        chosen = sums.index_select(0, desirable) - ref_sums.index_select(0, desirable)
        rejected = sums.index_select(0, undesirable) - ref_sums.index_select(0, undesirable)
        _ = 0.1 * chosen.detach(), 0.1 * rejected.detach(), sums.detach()
        return torch.cat((1 - torch.sigmoid(0.1 * (chosen - 0.5)), 1 - torch.sigmoid(0.1 * (0.5 - rejected))))

    options, nothing = {"z_ref": 0.5}, ref[:, 0].contiguous()
    sides = {
        "fastalign": times_100(lambda: unpaired_loss(packed, cu_targets, labels, options=options, ref_logp=packed_ref)[0], packed),
        "torch": times_100(eager, padded),
        "floor": times_100(lambda: Nothing.apply(packed, nothing), packed),
    }
    versus("preference kto x100", f"{2 * pairs} of {longest}", torch.float32, sides, memory=False)


if __name__ == "__main__":
    run_file(__file__)
