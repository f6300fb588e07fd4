"""linear_logp's CUDA row kernels without a GPU, over the host twin of their block primitives (fixture `cuda_twin`)."""

from __future__ import annotations

import math

import pytest
import torch


def oracle(logits, targets, g_logp, g_entropy, temperature, softcap):
    leaf = logits.double().requires_grad_()
    z = (torch.tanh(leaf / softcap) * softcap if softcap else leaf) / temperature
    logp_all = z.log_softmax(1)
    logp = logp_all.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logp_all.exp() * logp_all.clamp(min=-1e9)).sum(1)
    (gradient,) = torch.autograd.grad((logp * g_logp.double() + entropy * g_entropy.double()).sum(), leaf)
    return logp.detach(), entropy.detach(), gradient.nan_to_num()


@pytest.mark.parametrize("vocab", [1, 7, 1001, 16384 + 5])
@pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 5.0)])
@pytest.mark.parametrize(
    "dtype, out, off",  # out: a gradient beside the logits; off 4: its packs are stored whole
    [(torch.float32, None, 3), (torch.bfloat16, None, 3), (torch.float32, torch.bfloat16, 3), (torch.float32, torch.bfloat16, 4)],
)
def test_cuda_rows_match_fp64_on_the_host_twin(cuda_twin, vocab, dtype, out, off, temperature, softcap):
    num_rows = 2
    buffer = torch.full((num_rows, vocab + 9), math.nan, dtype=dtype)  # rows that start off a 16-byte boundary, among poison
    logits = buffer[:, off : off + vocab]
    logits.copy_((torch.randn(num_rows, vocab) * 4).to(dtype))
    targets = torch.randint(0, vocab, (num_rows,))
    if vocab > 100 and not softcap:
        logits[0, 5:90], targets[0] = -math.inf, 2
    before = logits.clone()
    to = logits if out is None else torch.full((num_rows, vocab + 9), math.nan, dtype=out)[:, off : off + vocab]
    logp, lse, entropy = (torch.full((num_rows,), math.nan) for _ in range(3))
    correct = torch.zeros(num_rows, dtype=torch.bool)
    g_logp, g_entropy = torch.randn(num_rows), torch.randn(num_rows)
    cuda_twin.logp_rows_cuda(logits, targets, 1 / temperature, softcap, logp, lse, entropy, correct, 0)
    cuda_twin.grad_rows_cuda(logits, targets, lse, entropy, g_logp, g_entropy, 1 / temperature, softcap, to, 0)
    want_logp, want_entropy, want = oracle(before, targets, g_logp, g_entropy, temperature, softcap)
    torch.testing.assert_close(logp.double(), want_logp, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(to.double(), want, rtol=2**-8 if to.dtype == torch.bfloat16 else 1e-5, atol=2e-6)
    assert torch.equal(correct, before.argmax(1) == targets)
    assert out is None or torch.equal(logits, before)
    whole = to._base
    assert whole[:, :off].isnan().all()
    assert whole[:, off + vocab :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_rows_do_not_depend_on_where_they_lie(cuda_twin, dtype):
    """The same row at every offset from a 16-byte boundary: the same bits."""
    vocab = 4099
    values = (torch.randn(vocab) * 4).to(dtype)
    found = []
    for offset in range(8):
        buffer = torch.full((vocab + 8,), math.nan, dtype=dtype)
        row = buffer[offset : offset + vocab]
        row.copy_(values)
        logp, lse, entropy = (torch.full((1,), math.nan) for _ in range(3))
        target, correct = torch.tensor([7]), torch.zeros(1, dtype=torch.bool)
        cuda_twin.logp_rows_cuda(row[None], target, 1.0, 0.0, logp, lse, entropy, correct, 0)
        found.append((logp.item(), lse.item(), entropy.item()))
    assert len(set(found)) == 1
    assert not math.isnan(found[0][0])
