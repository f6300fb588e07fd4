"""The nn.Module losses against plain torch with the logits in memory, on padded batches."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastalign as fa
from fastalign.losses.policy import POLICY, k3
from fastalign.losses.preference import PREFERENCE, Side

SHAPE = (4, 9, 13, 31)  # batch, length, hidden, vocabulary


def padded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, length, width, vocab = SHAPE
    hidden = torch.randn(batch, length, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 0.3
    bias = torch.randn(vocab, generator=generator) * 0.1
    targets = torch.randint(vocab, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([9, 4, 0, 6])[:, None]
    return hidden, weight, bias, targets, mask


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def assert_same_gradients(ours, theirs, tolerance=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_modules_cross_entropy_equals_torch(reduction, softcap):
    hidden, weight, bias, targets, mask = padded()
    target = targets.masked_fill(~mask, -100)
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    loss = fa.FusedLinearCrossEntropy(reduction=reduction, softcap=softcap)(ours[1], ours[0], target, ours[2])
    logits = F.linear(theirs[0], theirs[1], theirs[2])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(loss.shape)
    loss.backward(upstream)
    want.backward(upstream)
    assert_same_gradients(ours, theirs)


def test_modules_cross_entropy_options():
    hidden, weight, _, targets, _ = padded()
    module = fa.FusedLinearCrossEntropy(label_smoothing=0.1, lse_square_scale=1e-3, ce_weight=torch.rand(SHAPE[3]))
    logits = F.linear(hidden, weight).flatten(0, 1)
    flat = targets.flatten()
    per_row = F.cross_entropy(logits, flat, module.ce_weight, label_smoothing=0.1, reduction="none") + 1e-3 * logits.logsumexp(1) ** 2
    torch.testing.assert_close(module(weight, hidden, targets), per_row.sum() / module.ce_weight[flat].sum(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="softcap excludes"):
        fa.FusedLinearCrossEntropy(softcap=2.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="got 'average'"):
        fa.FusedLinearCrossEntropy(reduction="average")


def plain_grpo(logits, targets, mask, advantages, ref, old, aggregate, budget, beta, temperature):
    logp = (logits / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ratio = (logp - (logp.detach() if old is None else old)).exp()
    signed = advantages[:, None]
    loss = torch.maximum(-signed * ratio, -signed * ratio.clamp(0.8, 1.28))
    loss = (loss + beta * k3(logp, ref)) * mask
    if aggregate == "token":
        return loss.sum() / mask.sum()
    if aggregate == "sequence":
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return loss.sum() / (len(loss) * budget)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "budget"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_modules_grpo_equals_torch(aggregate, on_policy):
    hidden, weight, bias, targets, mask = padded()
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5])
    with torch.no_grad():
        logp = (F.linear(hidden, weight, bias) / 0.8).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ref, old = logp + 0.3 * torch.randn_like(logp), None if on_policy else logp + 0.3 * torch.randn_like(logp)
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    module = fa.FusedLinearGRPO(beta=0.1, epsilon_high=0.28, aggregate=aggregate, temperature=0.8, max_completion_length=16)
    loss, metrics = module(ours[0], ours[1], targets, mask, advantages, ours[2], ref, old)
    logits = F.linear(theirs[0], theirs[1], theirs[2])
    want = plain_grpo(logits, targets, mask, advantages, ref, old, aggregate, 16, 0.1, 0.8)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    assert_same_gradients(ours, theirs)
    log_p = (logits.detach() / 0.8).log_softmax(-1)
    torch.testing.assert_close(metrics["entropy"], -(log_p.exp() * log_p).sum(-1)[mask].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["kl"], k3(logp, ref)[mask].mean(), rtol=1e-4, atol=1e-6)


def test_modules_grpo_sequence_ratio_keeps_sequences_whole():
    hidden, weight, _, targets, mask = padded()
    advantages, old = torch.tensor([1.0, -0.5, 2.0, -1.5]), torch.zeros(SHAPE[:2]) - 3.4
    module = fa.FusedLinearGRPO(beta=0.0, loss_type="gspo", aggregate="sequence", epsilon_low=0.1, epsilon_high=0.1)
    leaf, theirs = leaves(hidden)[0], leaves(hidden)[0]
    loss, _ = module(leaf, weight, targets, mask, advantages, old_per_token_logps=old)
    logp = F.linear(theirs, weight).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    lengths = mask.sum(1)
    ratio = (((logp - old) * mask).sum(1) / lengths.clamp(min=1)).exp()
    per_sequence = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1))
    want = (per_sequence * (lengths > 0)).sum() / 4
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_modules_grpo_errors_and_nothing_scored():
    with pytest.raises(ValueError, match="loss_type: expected one of"):
        fa.FusedLinearGRPO(loss_type="grpo2")
    with pytest.raises(ValueError, match="needs max_completion_length"):
        fa.FusedLinearGRPO(aggregate="budget")
    hidden, weight, _, targets, mask = padded()
    with pytest.raises(ValueError, match="needs ref_per_token_logps"):
        fa.FusedLinearGRPO()(hidden, weight, targets, mask, torch.ones(4))
    leaf = hidden.clone().requires_grad_()
    loss, _ = fa.FusedLinearGRPO(beta=0.0)(leaf, weight, targets, torch.zeros_like(mask), torch.ones(4))
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


def plain_dpo(logits, ref_logits, targets, mask, beta, temperature):
    sums = []
    for z in (logits, ref_logits):
        logp = (z / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        sums.append((logp * mask).sum(1))
    logratio = sums[0] - sums[1]
    win, lose = logratio.chunk(2)
    return -F.logsigmoid(beta * (win - lose)).mean(), win, lose


@pytest.mark.parametrize("loss_type", ["dpo", "sigmoid"])
def test_modules_dpo_equals_torch(loss_type):
    hidden, weight, bias, targets, mask = padded()
    ref_hidden, ref_weight = torch.randn(*SHAPE[:2], 7), torch.randn(SHAPE[3], 7)
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    module = fa.FusedLinearDPO(beta=0.3, loss_type=loss_type, temperature=0.9)
    target = targets.masked_fill(~mask, -100)
    loss, metrics = module(ours[1], ours[0], target, ours[2], ref_hidden, ref_weight)
    want, win, lose = plain_dpo(F.linear(*theirs), F.linear(ref_hidden, ref_weight), targets, mask, 0.3, 0.9)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    assert_same_gradients(ours, theirs)
    torch.testing.assert_close(metrics["rewards/margins"], 0.3 * (win - lose).detach().mean(), rtol=1e-5, atol=1e-5)


def test_modules_dpo_errors():
    hidden, weight, _, targets, _ = padded()
    with pytest.raises(ValueError, match="use_ref_model needs"):
        fa.FusedLinearDPO()(weight, hidden, targets)
    with pytest.raises(ValueError, match="an even number of sequences, got 3"):
        fa.FusedLinearDPO()(weight, hidden[:3], targets[:3])


@pytest.mark.parametrize("loss_type", POLICY)
def test_modules_grpo_runs_every_row(loss_type):
    """On the policy that sampled, each row's loss is its own function of ratio 1, averaged."""
    hidden, weight, _, targets, mask = padded()
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5])
    loss, metrics = fa.FusedLinearGRPO(beta=0.0, loss_type=loss_type)(hidden, weight, targets, mask, advantages)
    logp = F.linear(hidden, weight).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)[mask]
    lengths = mask.sum(1)
    options = (
        {} if "epsilon_high" not in inspect.signature(POLICY[loss_type].function).parameters else {"epsilon": 0.2, "epsilon_high": 0.2}
    )
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    want = POLICY[loss_type].function(logp, logp, advantages.repeat_interleave(lengths), offsets, **options).mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert metrics["entropy"] > 0


@pytest.mark.parametrize("loss_type", PREFERENCE)
def test_modules_dpo_runs_every_row(loss_type):
    hidden, weight, _, targets, mask = padded()
    reads = PREFERENCE[loss_type].reference
    reference = {"ref_input": hidden.flip(0), "ref_weight": weight} if reads else {}
    module = fa.FusedLinearDPO(loss_type=loss_type, use_ref_model=reads)
    loss, _ = module(weight, hidden, targets.masked_fill(~mask, -100), **reference)
    sides = []
    for i in (slice(0, 2), slice(2, 4)):
        sums = []
        for x in (hidden, hidden.flip(0)):
            logp = F.linear(x, weight).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
            sums.append((logp * mask).sum(1)[i])
        sides.append(Side(sums[0], sums[1] if reads else None, mask.sum(1)[i]))
    options = {"beta": 0.1} if "beta" in PREFERENCE[loss_type].options else {}
    torch.testing.assert_close(loss, PREFERENCE[loss_type](*sides, **options).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_modules_dpo_sorts_the_whole_batch(loss_type, monkeypatch):
    """The ranks are the batch's, however few rows of logits a chunk holds."""
    from fastalign.ops import linear_head

    hidden, weight, _, targets, _ = padded()
    hidden, targets = torch.cat((hidden, hidden.flip(1))), torch.cat((targets, targets.flip(0)))
    call = {"ref_input": torch.randn_like(hidden), "ref_weight": weight}
    leaf, again = leaves(hidden, hidden)
    module = fa.FusedLinearDPO(loss_type=loss_type)
    expected, _ = module(weight, leaf, targets, **call)
    expected.backward()
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 9)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 1)
    loss, _ = module(weight, again, targets, **call)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(again.grad, leaf.grad)


def test_modules_refuse_rows_that_are_not_aligned():
    """Rows are picked by one mask: an off-by-one in the length would be a wrong loss, not a crash."""
    hidden, weight, _, targets, mask = padded()
    longer, ones = torch.randn(4, 10, 13), torch.ones(4)
    with pytest.raises(ValueError, match=r"target: expected \[4, 10\], aligned with input, got \[4, 9\]"):
        fa.FusedLinearDPO()(weight, longer, targets, None, longer, weight)
    with pytest.raises(ValueError, match=r"ref_input: expected \[4, 9, 13\], .* got \[4, 10, 13\]"):
        fa.FusedLinearDPO()(weight, hidden, targets, None, longer, weight)
    with pytest.raises(ValueError, match=r"target: expected \[4, 9\], .* got \[4, 8\]"):
        fa.FusedLinearCrossEntropy(softcap=3.0)(weight, hidden, targets[:, :8])
    grpo = fa.FusedLinearGRPO(beta=0.0)
    with pytest.raises(ValueError, match=r"selected_token_ids: expected \[4, 10\]"):
        grpo(longer, weight, targets, mask, ones)
    with pytest.raises(ValueError, match=r"old_per_token_logps: expected \[4, 9\], .* got \[4, 10\]"):
        grpo(hidden, weight, targets, mask, ones, old_per_token_logps=torch.zeros(4, 10))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[4, 9\]"):
        grpo(hidden, weight, targets, mask[:, :8], ones)
    with pytest.raises(ValueError, match=r"advantages: expected \[4\], .* got \[36\]"):
        grpo(hidden, weight, targets, mask, torch.ones(4, 9))


def test_modules_name_wrong_rows_and_options_when_built():
    with pytest.raises(ValueError, match="did you mean simpo"):
        fa.FusedLinearDPO(loss_type="simppo")
    with pytest.raises(ValueError, match="simpo reads no reference; pass use_ref_model=False"):
        fa.FusedLinearDPO(loss_type="simpo")
    with pytest.raises(ValueError, match="options of dpo: unknown gamma"):
        fa.FusedLinearDPO(options={"gamma": 1.0})
    with pytest.raises(ValueError, match="options of clip: unknown tau_positive"):
        fa.FusedLinearGRPO(options={"tau_positive": 1.0})
