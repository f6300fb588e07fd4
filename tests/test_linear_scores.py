"""linear_scores against plain torch in fp64 arithmetic: every field, every way to the gradient."""

import pytest
import torch

from fastalign.ops import linear_head
from fastalign.ops import linear_scores as module
from fastalign.ops.linear_scores import FIELDS, linear_scores
from fastalign.ops.reference import scaled_logits


def problem(rows=37, width=24, vocab=83, bias=True, dtype=torch.float32):
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)
    return hidden, weight, torch.randn(vocab, dtype=dtype) if bias else None, torch.randint(0, vocab, (rows,))


def truth(hidden, weight, targets, bias, temperature, softcap):
    """The fields by their definitions, fp64."""
    logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    z = scaled_logits(logits, temperature, softcap)
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    squares = torch.logsumexp(2 * log_p, -1)
    return logp, -(log_p.exp() * log_p).sum(-1), z.argmax(-1) == targets, z.mean(-1), squares


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_scores_fields(backend, softcap, bias, monkeypatch):
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 1)
    hidden, weight, b, targets = problem(bias=bias)
    targets[:5] = (hidden[:5] @ weight.t() + (0 if b is None else b)).argmax(-1)  # some hits
    found = linear_scores(hidden, weight, targets, bias=b, temperature=0.7, logit_softcap=softcap, fields=FIELDS)
    for got, expected in zip(found, truth(hidden, weight, targets, b, 0.7, softcap), strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=2e-5)


def test_linear_scores_computes_only_what_is_asked():
    hidden, weight, bias, targets = problem()
    found = linear_scores(hidden, weight, targets, bias=bias, fields=("correct",))
    assert found.correct is not None
    assert (found.entropy, found.mean_logit, found.log_square_sum) == (None, None, None)


def test_linear_scores_holds_no_more_logits_than_it_is_told(monkeypatch):
    hidden, weight, bias, targets = problem()
    whole, seen, chunk = linear_scores(hidden, weight, targets, bias=bias, fields=FIELDS), [], module.forward_chunk
    monkeypatch.setattr(module, "forward_chunk", lambda head, x, *a, **k: seen.append(len(x)) or chunk(head, x, *a, **k))
    parts = linear_scores(hidden, weight, targets, bias=bias, fields=FIELDS, max_chunk_bytes=5 * 83 * 4)
    assert sum(seen) == 37
    assert max(seen) == 5
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("way", ["frozen", "trainable", "entropy", "frozen entropy", "one slope", "one slope, refuted"])
def test_linear_scores_gradient(backend, way, softcap, monkeypatch):
    monkeypatch.setattr(linear_head, "CHUNK_ROWS", 16)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 1)
    inputs = problem()
    entropy, one_slope = "entropy" in way, "one slope" in way
    upstream = torch.full((37,), -0.3) if way == "one slope" else torch.randn(37)
    upstream[::5] = upstream[::5] if way == "one slope" else 0.0

    def gradients(call, double):
        hidden, weight, bias = ((t.double() if double else t.clone()).requires_grad_() for t in inputs[:3])
        if "frozen" in way:
            weight, bias = weight.detach(), bias.detach()
        logp, ent = call(hidden, weight, bias)
        loss = (logp * upstream).sum() + ((ent * upstream.flip(0)).sum() if entropy else 0.0)
        leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
        return torch.autograd.grad(loss, leaves)

    def ours(hidden, weight, bias):
        options = {"temperature": 0.7, "logit_softcap": softcap, "fields": FIELDS}
        found = linear_scores(hidden, weight, inputs[3], bias=bias, entropy_gradient=entropy, one_slope=one_slope, **options)
        assert found.entropy.requires_grad == entropy
        return found.logp, found.entropy

    expected = gradients(lambda h, w, b: truth(h, w, inputs[3], b, 0.7, softcap)[:2], True)
    for got, want in zip(gradients(ours, False), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=3e-5)


def test_linear_scores_one_slope_saves_the_second_forward(monkeypatch):
    """The stored gradient is handed out once; later backwards, and other slopes, compute the logits again."""
    calls = []
    monkeypatch.setattr(module, "logp_backward", lambda *a: calls.append(1) or original(*a))
    from fastalign.ops.linear_passes import logp_backward as original

    hidden, weight, _, targets = problem()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_scores(hidden, weight, targets, one_slope=True).logp.mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert not calls
    second = torch.autograd.grad(loss, (hidden, weight))
    assert calls
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("one_slope", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_scores_of_no_rows(one_slope, frozen):
    """No rows is a differentiable nothing: gradients are zero, not missing."""
    weight = torch.randn(11, 4, requires_grad=not frozen)
    hidden = torch.randn(0, 4, requires_grad=True)
    found = linear_scores(hidden, weight, torch.zeros(0, dtype=torch.int64), fields=FIELDS, one_slope=one_slope)
    assert all(len(t) == 0 for t in found)
    found.logp.sum().backward()
    assert hidden.grad.shape == (0, 4)
    if not frozen:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_linear_scores_bf16_is_no_worse_than_torch():
    hidden, weight, _, targets = problem(rows=64, width=64, vocab=500, bias=False)
    exact = truth(hidden.bfloat16(), weight.bfloat16(), targets, None, 1.0, None)
    found = linear_scores(hidden.bfloat16(), weight.bfloat16(), targets, fields=FIELDS)
    z = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    plain = z.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert (found.logp - exact[0]).abs().max() <= (plain - exact[0]).abs().max() + 1e-3
    assert (found.mean_logit - exact[3]).abs().max() <= (z.mean(-1) - exact[3]).abs().max() + 1e-3


def test_linear_scores_refuses_a_second_derivative():
    hidden, weight, _, targets = problem()
    hidden = hidden.requires_grad_()
    (g,) = torch.autograd.grad(linear_scores(hidden, weight, targets).logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        g.sum().backward()


def test_linear_scores_names_what_is_wrong():
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match="unknown fields"):
        linear_scores(hidden, weight, targets, fields=("entropie",))
    targets[3] = 83
    with pytest.raises(ValueError, match="got 83 at row 3"):
        linear_scores(hidden, weight, targets)
