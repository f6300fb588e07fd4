"""The nn.Module losses against plain torch with the logits in memory, on padded batches."""

from __future__ import annotations

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
def test_modules_grpo_takes_every_row(loss_type):
    hidden, weight, _, targets, mask = padded()
    advantages, old = torch.tensor([1.0, -0.5, 2.0, -1.5]), torch.randn(SHAPE[:2]) - 3.4
    known = POLICY[loss_type].function.__kwdefaults__ or {}
    clip = {name: value for name, value in {"epsilon": 0.1, "epsilon_high": 0.3}.items() if name in known}
    module = fa.FusedLinearGRPO(beta=0.0, epsilon_low=0.1, epsilon_high=0.3, loss_type=loss_type)
    leaf, theirs = leaves(hidden)[0], leaves(hidden)[0]
    loss, _ = module(leaf, weight, targets, mask, advantages, old_per_token_logps=old)
    logp = F.linear(theirs, weight).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)[mask]
    cu_targets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    want = POLICY[loss_type].function(logp, old[mask], advantages[:, None].expand_as(mask)[mask], cu_targets, **clip).mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_modules_grpo_options_of_a_row():
    with pytest.raises(ValueError, match="sapo has no option 'epsilon'; options: tau_positive, tau_negative"):
        fa.FusedLinearGRPO(loss_type="sapo", options={"epsilon": 0.1})
    hidden, weight, _, targets, mask = padded()
    module = fa.FusedLinearGRPO(beta=0.0, options={"epsilon_high": None})  # the same on both sides
    loss, metrics = module(hidden, weight, targets, mask, torch.ones(4), old_per_token_logps=torch.randn(SHAPE[:2]) - 3.4)
    want = fa.FusedLinearGRPO(beta=0.0)(hidden, weight, targets, mask, torch.ones(4), old_per_token_logps=None)
    assert loss.isfinite()
    assert metrics.keys() == want[1].keys()


@pytest.mark.parametrize("loss_type", PREFERENCE)
@pytest.mark.parametrize("num_rows", [4, None])
def test_modules_dpo_takes_every_row_in_chunks_of_any_size(loss_type, num_rows, monkeypatch):
    if num_rows is not None:
        monkeypatch.setattr("fastalign.ops.linear_head.CHUNK_ROWS", num_rows)
        monkeypatch.setattr("fastalign.ops.linear_head.CHUNK_BYTES", 1)
    row, pairs, width, vocab = PREFERENCE[loss_type], 8, 6, 11
    hidden, weight = torch.randn(2 * pairs, 3, width), torch.randn(vocab, width)
    targets, ref = torch.randint(vocab, (2 * pairs, 3)), torch.randn(2 * pairs, 3, width)
    module = fa.FusedLinearDPO(beta=0.3, loss_type=loss_type, use_ref_model=row.reference)
    ours, theirs = leaves(hidden)[0], leaves(hidden)[0]
    loss, _ = module(weight, ours, targets, None, *((ref, weight) if row.reference else ()))

    def sums(x):
        return F.linear(x, weight).log_softmax(-1).gather(-1, targets[..., None]).sum((1, 2)).double().chunk(2)

    lengths, none = torch.full((pairs,), 3), (None, None)
    win, lose = (Side(s, r, lengths) for s, r in zip(sums(theirs), sums(ref) if row.reference else none, strict=True))
    want = row(win, lose, **({"beta": 0.3} if "beta" in row.options else {})).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_modules_dpo_unknown_row():
    with pytest.raises(ValueError, match="loss_type: unknown dpoo; did you mean dpo"):
        fa.FusedLinearDPO(loss_type="dpoo")


def test_modules_dpo_inside_torch_compile():
    hidden, weight, _, targets, mask = padded()
    module, target, ref = fa.FusedLinearDPO(), targets.masked_fill(~mask, -100), torch.randn_like(hidden)
    found = []
    for run in (module, torch.compile(module, backend="aot_eager")):
        leaf = leaves(hidden)[0]
        loss, _ = run(weight, leaf, target, None, ref, weight)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("change", ["input", "attention_mask", "ref_per_token_logps", "old_per_token_logps"])
def test_modules_grpo_rejects_rows_that_do_not_line_up(change):
    hidden, weight, _, targets, mask = padded()
    per_token = torch.randn(SHAPE[:2])
    given = {"input": hidden, "attention_mask": mask, "ref_per_token_logps": per_token, "old_per_token_logps": per_token}
    given[change] = torch.cat((given[change], given[change][:, :1]), 1)
    with pytest.raises(ValueError, match=r"expected \[4, (9|10)\], the rows of input"):
        fa.FusedLinearGRPO()(lin_weight=weight, selected_token_ids=targets, advantages=torch.ones(4), **given)


@pytest.mark.parametrize("change", ["input", "target", "ref_input"])
def test_modules_dpo_rejects_rows_that_do_not_line_up(change):
    hidden, weight, _, targets, _ = padded()
    given = {"input": hidden, "target": targets, "ref_input": hidden}
    given[change] = torch.cat((given[change], given[change][:, :1]), 1)
    with pytest.raises(ValueError, match=r"expected \[4, (9|10)\], the rows of input"):
        fa.FusedLinearDPO()(weight, ref_weight=weight, **given)


def test_modules_name_what_does_not_fit():
    hidden, weight, _, targets, mask = padded()
    for softcap in (None, 3.0):
        for wrong in (targets[:, :8], targets.t()):  # the softcap's path took the rows that were there
            with pytest.raises(ValueError, match=r"target: expected \[4, 9\], got"):
                fa.FusedLinearCrossEntropy(softcap=softcap)(weight, hidden, wrong)
    with pytest.raises(ValueError, match=r"advantages: expected \[4\], one a sequence, got \[4, 9\]"):
        fa.FusedLinearGRPO(beta=0.0)(hidden, weight, targets, mask, torch.ones(4, 9))
    with pytest.raises(ValueError, match="simpo reads no reference; pass use_ref_model=False"):
        fa.FusedLinearDPO(loss_type="simpo")
