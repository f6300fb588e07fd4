"""AdamW over fp32 gradients: torch's for fp32 parameters, a split-master one for bf16.

A bf16 parameter *is* the high part of its fp32 master; the low 16 bits live in the optimizer's state (`tail`). Plain bf16
AdamW at lr 1e-6 moves 2 % of the weights, a second fp32 copy of the model doubles its memory; this does neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.switching import trained_parameters
from ..ops.adamw import adamw_step_


class MainGradients:
    """Persistent fp32 gradients of a model's trainable parameters.

    fp32 parameters accumulate in place in `.grad`; low-precision ones in `.main_grad` through a hook that folds each
    backward's gradient in and frees it. `linear_loss` adds the head's gradient to `.main_grad` directly.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.buffers: list[Tensor] = []
        self._hooks = []
        for p in self.parameters:
            buffer = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype == torch.float32:
                p.grad = buffer
            else:
                self._hooks.append(p.register_post_accumulate_grad_hook(_fold))
            p.main_grad = buffer  # type: ignore[attr-defined]
            self.buffers.append(buffer)

    def zero(self) -> None:
        torch._foreach_zero_(self.buffers)

    def norm(self) -> float:
        """The global L2 norm, fp32."""
        return float(torch.stack(torch._foreach_norm(self.buffers)).norm()) if self.buffers else 0.0

    def clip(self, norm: float, max_norm: float) -> None:
        """Scales gradients of the given global norm down to `max_norm`; 0: never."""
        if 0 < max_norm < norm:
            torch._foreach_mul_(self.buffers, max_norm / (norm + 1e-6))

    def detach(self) -> None:
        """Removes the hooks and buffers from the parameters."""
        for hook in self._hooks:
            hook.remove()
        for p in self.parameters:
            p.grad = None
            del p.main_grad


def _fold(p: Tensor) -> None:
    if p.grad is not None:  # None: linear_loss has added the head's gradient itself
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None


class SplitMasterAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) in one pass a parameter, fp32 moments, reading `main_grad`.

    bf16 parameters keep an int16 `tail`, so that parameter and tail together are the fp32 master, exactly.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        if closure is not None:
            raise ValueError("SplitMasterAdamW: closures are not supported; compute the gradients before step()")
        for options in self.param_groups:
            for p in options["params"]:
                self._update(p, options)

    def _update(self, p: nn.Parameter, options: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype == torch.bfloat16:
                state["tail"] = torch.zeros_like(p, dtype=torch.int16)
        state["step"] += 1
        adamw_step_(
            p.data,
            p.main_grad,  # type: ignore[attr-defined]
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            lr=float(options["lr"]),
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            tail=state.get("tail"),
        )

    def load_state_dict(self, state_dict: dict) -> None:
        # torch's version casts floating state to the parameter's dtype; moments must stay fp32 and tails int16
        tensors = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        flat = [p for options in self.param_groups for p in options["params"]]
        for index, saved in tensors.items():
            p = flat[int(index)]
            self.state[p] = {k: v.to(p.device).clone() if isinstance(v, Tensor) else v for k, v in saved.items()}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (norms, biases, IA3's scales) do not. Order is that of `named_parameters`, so states can be reloaded."""
    named = trained_parameters(model)
    if not named:
        raise ValueError("no parameter of the model requires a gradient; nothing would be trained")
    decays = [p.dim() >= 2 and "ia3_" not in name for name, p in named]  # PEFT keeps IA3's vectors, whose rest is 1, as [n, 1]
    groups = [
        {"params": [p for (_, p), decay in zip(named, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for (_, p), decay in zip(named, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """torch's fused AdamW when every trainable parameter is fp32, else `SplitMasterAdamW`."""
    groups = parameter_groups(model, weight_decay)
    if all(p.dtype == torch.float32 for g in groups for p in g["params"]):
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return SplitMasterAdamW(groups, lr=lr, betas=betas, eps=eps)


WANTING = ("reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
"""Schedules that want more than steps: a metric at every one, or settings of their own."""


def build_schedule(optimizer: torch.optim.Optimizer, name: str, *, warmup_steps: float, max_steps: int):
    """A transformers schedule by name; warmup_steps below 1 is a fraction of max_steps."""
    from transformers import SchedulerType, get_scheduler

    known = [member.value for member in SchedulerType if member.value not in WANTING]
    if name not in known:
        raise ValueError(f"--lr_scheduler_type: expected one of {', '.join(known)}; got {name!r}")
    warmup = math.ceil(warmup_steps * max_steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps)
