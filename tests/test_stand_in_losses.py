"""The drop-in losses and advantages with every argument on the stand-in of a GPU: the CPU's values and gradients."""

from __future__ import annotations

import pytest
import torch
from stand_in_cuda import stand_in_cuda
from tiny_models import llama

import fastalign as fa
from fastalign.losses.policy import POLICY
from fastalign.losses.preference import PREFERENCE
from fastalign.losses.unpaired import UNPAIRED
from fastalign.ops import backend
from fastalign.ops.linear_scores import linear_scores

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")

LENGTHS, WIDTH, VOCAB = [5, 4, 7, 3, 1, 6, 8, 2], 16, 37
TOKENS, SEQUENCES = sum(LENGTHS), len(LENGTHS)


def inputs(device):
    """Everything that a loss may be given, on the device; what has a gradient is a leaf."""
    torch.manual_seed(0)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    logp = -torch.rand(TOKENS)
    found = {
        "hidden": torch.randn(TOKENS, WIDTH),
        "weight": torch.randn(VOCAB, WIDTH),
        "bias": torch.randn(VOCAB),
        "targets": torch.randint(0, VOCAB, (TOKENS,)),
        "logp": logp,
        "other_logp": logp + 0.1 * torch.randn(TOKENS),
        "entropy": torch.rand(TOKENS),
        "advantages": torch.randn(TOKENS),
        "weights": torch.rand(TOKENS),
        "cu": cu,
        "labels": torch.rand(SEQUENCES) > 0.5,
        "rewards": torch.rand(SEQUENCES),
        "groups": torch.tensor([0, 4, 8], dtype=torch.int32),
        "padded": torch.randn(4, 6, WIDTH),
        "padded_ids": torch.randint(0, VOCAB, (4, 6)),
        "mask": torch.ones(4, 6),
        "row_advantages": torch.randn(4),
    }
    found = {name: value.to(device) for name, value in found.items()}
    for name in ("hidden", "weight", "bias", "logp", "entropy", "padded"):
        found[name].requires_grad_()
    return found


def objective(logp, span):
    return (logp * torch.arange(span.start, span.stop, device=logp.device)).sum()


def policy(name):
    def loss(x):
        options = fa.PolicyOptions(kl_coef=0.1, entropy_coef=0.1, correction="truncate")
        given = {"ref_logp": x["other_logp"], "sampler_logp": x["other_logp"], "entropy": x["entropy"], "cu_targets": x["cu"]}
        return fa.policy_loss(x["logp"], x["other_logp"], x["advantages"], x["weights"], loss=name, options=options, **given)[0]

    return loss


CASES = {
    "linear_logp": lambda x: fa.linear_logp(x["hidden"], x["weight"], x["targets"], bias=x["bias"], temperature=0.7),
    "linear_logp of some rows": lambda x: fa.linear_logp(x["hidden"], x["weight"], x["targets"].masked_fill(x["weights"] > 0.5, -100)),
    "entropy": lambda x: fa.linear_logp(x["hidden"], x["weight"], x["targets"], return_entropy=True)[1],
    "soft-cap": lambda x: fa.linear_logp(x["hidden"], x["weight"], x["targets"], logit_softcap=3.0),
    "linear_scores": lambda x: linear_scores(x["hidden"], x["weight"], x["targets"], fields=("entropy",)).logp,
    "linear_cross_entropy": lambda x: fa.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], linear_bias=x["bias"]),
    "smoothed": lambda x: fa.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], label_smoothing=0.1, z_loss=1e-3),
    "linear_kl": lambda x: fa.linear_kl(x["hidden"], x["weight"], x["hidden"].detach() * 0.5, x["weight"].detach(), divergence="jsd"),
    "linear_loss": lambda x: fa.linear_loss(x["hidden"], x["weight"], x["targets"], objective)[0],
    "linear_loss in units": lambda x: fa.linear_loss(x["hidden"], x["weight"], x["targets"], objective, units=x["cu"].cpu())[0],
    "FusedLinearCrossEntropy": lambda x: fa.FusedLinearCrossEntropy()(x["weight"], x["hidden"], x["targets"]),
    "FusedLinearDPO": lambda x: fa.FusedLinearDPO()(
        x["weight"], x["padded"], x["padded_ids"], ref_input=x["padded"].detach() * 0.9, ref_weight=x["weight"].detach()
    )[0],
    "FusedLinearGRPO": lambda x: fa.FusedLinearGRPO()(
        x["padded"], x["weight"], x["padded_ids"], x["mask"], x["row_advantages"], ref_per_token_logps=-x["mask"]
    )[0],
    **{f"policy: {name}": policy(name) for name in POLICY},
    **{
        f"pairs: {name}": lambda x, name=name: fa.preference_loss(
            x["logp"], x["cu"], loss=name, ref_logp=x["other_logp"] if PREFERENCE[name].reference else None
        )[0]
        for name in PREFERENCE
    },
    **{
        f"labels: {name}": lambda x, name=name: fa.unpaired_loss(x["logp"], x["cu"], x["labels"], loss=name, ref_logp=x["other_logp"])[0]
        for name in UNPAIRED
    },
    "gae": lambda x: torch.stack(fa.gae(x["advantages"], x["weights"], x["cu"])),
    "gae with offsets on the CPU": lambda x: torch.stack(fa.gae(x["advantages"], x["weights"], x["cu"].cpu())),
    "discounted_returns": lambda x: fa.discounted_returns(x["advantages"], x["cu"], gamma=0.9),
    **{
        f"advantages: {name}": lambda x, name=name: getattr(fa.advantages, name)(x["rewards"], x["groups"])
        for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "maxrl", "passk")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_loss_on_the_device_is_that_of_the_cpu(name, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda op: False)

    def values(device):
        x = inputs(device)
        out = CASES[name](x)
        assert out.device.type == device
        if out.requires_grad:
            (out * torch.arange(1, out.numel() + 1, device=device).view(out.shape)).sum().backward()
        return [out.detach().cpu(), *(x[leaf].grad.cpu() for leaf in x if x[leaf].grad is not None)]

    want = values("cpu")
    with stand_in_cuda():
        got = values("cuda")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_patched_model_on_the_device_has_the_loss_of_the_cpu():
    def loss_and_gradient(device):
        model = fa.patch(llama()).to(device)
        ids = torch.arange(24, device=device).view(2, 12)
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        return loss.item(), model.get_output_embeddings().weight.grad.cpu()

    want = loss_and_gradient("cpu")
    with stand_in_cuda():
        got = loss_and_gradient("cuda")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
