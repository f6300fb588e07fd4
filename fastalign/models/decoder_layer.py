"""A decoder layer of the usual shape as one run of native calls, while an engine generates on the CPU.

What transformers' Python does between them costs a layer some 0.3 ms a step, a fifth of what stories260k takes for one token (AMD EPYC). A
layer is run this way only after that gave the bits of its own forward, in the output and in the cache, on random numbers. Everywhere else
(a gradient, a tree, another device, adapters, integer weights, hooks on a part) its own forward runs.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastalign.models.fused_layers import is_fused
from fastalign.models.linear import RowLinear
from fastalign.ops.attention import PagedLayout, paged_attention
from fastalign.ops.backend import forced_backend, native_for
from fastalign.ops.gemm import Packed, PackedWeights, Product, active_packs
from fastalign.ops.rms_norm import normalized
from fastalign.ops.rope import rotated
from fastalign.ops.swiglu import gated

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")
_NONE = torch.empty(0)  # stands for no bias in a native call


class Plan(NamedTuple):
    """What a layer's own forward asks of the attention.

    kinds: the classes of the layer's parts; an adapter may put others in their places.
    """

    kinds: tuple[type, ...]
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


def use_decoder_runs(model: nn.Module) -> None:
    """Turns the decoder layers of a model that `run` computes to the bit into subclasses that call it, in place.

    After `use_fused_layers` and with the fastalign attention: those are the parts that it looks for.
    """
    for module in model.modules():
        if is_planned(module) or not _looks_like_one(module):
            continue
        plan = _plan(module)
        if plan is not None:
            module.__class__ = _subclass(type(module))
            module._plan = plan  # type: ignore[assignment]


def is_planned(layer: nn.Module) -> bool:
    """Whether `run` may be asked for this layer."""
    return type(layer) in _planned


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks, and no forward of its own, as accelerate puts into a module."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"]) and "forward" not in own


def _looks_like_one(module: nn.Module) -> bool:
    """The parts and nothing beside them; what they compute is seen when it runs."""
    parts = module._modules
    if parts.keys() != LAYER or not all(part is not None and is_fused(part) for part in parts.values()):
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    names = attention._modules.keys()  # type: ignore[union-attr]
    if names not in (set(ATTENTION), {*ATTENTION, *HEAD_NORMS}) or not isinstance(getattr(attention, "head_dim", None), int):
        return False
    if not isinstance(getattr(attention, "config", None), PreTrainedConfig):
        return False
    linears = [getattr(attention, name) for name in ATTENTION] + [getattr(mlp, name, None) for name in MLP]
    return all(type(linear) is RowLinear and linear.weight.device.type == "cpu" for linear in linears)


def _subclass(kind: type) -> type:
    """The layer that tries `run` first; made once."""
    if kind not in _classes:
        own: Any = kind.forward  # type: ignore[attr-defined]

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            layout, rotation = kwargs.get("attention_layout"), kwargs.get("position_embeddings")
            if type(layout) is PagedLayout and rotation is not None and not args:
                found = run(self, self._plan, hidden_states, layout, rotation)
                if found is not None:
                    return found
            return own(self, hidden_states, *args, **kwargs)

        # under the family's own name: device maps and FSDP policies look for it
        _classes[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})
        _planned.add(_classes[kind])
    return _classes[kind]


_classes: dict[type, type] = {}
_planned: set[type] = set()  # its values
_plans: dict[tuple[Any, ...], Plan | None] = {}  # what decides what a layer computes → how it is run


def run(layer: nn.Module, plan: Plan, x: Tensor, layout: PagedLayout, rotation: tuple[Tensor, Tensor]) -> Tensor | None:
    """The layer's forward of x [1, T, H] for a step of generation; None where it is not this function's to compute."""
    packs, parts = active_packs(), layer._modules
    if packs is None or packs.quantizes or torch.is_grad_enabled() or x.dim() != 3 or x.shape[0] != 1:
        return None
    if tuple(map(type, parts.values())) != plan.kinds:
        return None
    attention: Any = parts["self_attn"]
    mlp: Any = parts["mlp"]
    own, gate = attention._modules, mlp._modules
    linears: list[Any] = [*(own[name] for name in ATTENTION), *(gate[name] for name in MLP)]
    norms: list[Any] = [parts["input_layernorm"], parts["post_attention_layernorm"], *(own[name] for name in HEAD_NORMS if name in own)]
    for linear in linears:
        if type(linear) is not RowLinear:
            return None
    for part in (attention, mlp, *linears, *norms):
        if not is_plain(part):
            return None
    weights, biases = ([linear._parameters[name] for linear in linears] for name in ("weight", "bias"))  # linear.weight takes 2 us
    scales = [norm._parameters["weight"] for norm in norms]
    cos, sin = rotation
    module, kept = native_for("rms_norm", x, cos, sin, *scales), packs.kept(weights, x.dtype)
    if module is None or kept is None or cos.shape[-1] != plan.head_dim:
        return None
    step = _Step(module, plan, attention.layer_idx, x.contiguous(), layout, cos.contiguous(), sin.contiguous())
    eps = [norm.variance_epsilon for norm in norms]
    run_all = _in_one_call if all(one.ours for one in kept) else _one_by_one
    return run_all(step, kept, biases, scales, eps)


class _Step(NamedTuple):
    """layer: of the cache; x [1, T, H], cos and sin [1, T, D]: without gaps."""

    module: ModuleType
    plan: Plan
    layer: int
    x: Tensor
    layout: PagedLayout
    cos: Tensor
    sin: Tensor


# of both: the products of q, k, v, o, gate, up, down with their biases; the norms before the attention, before the MLP, of the heads
def _in_one_call(step: _Step, kept: list[Packed], biases: list[Tensor | None], norms: list[Tensor], eps: list[float]) -> Tensor:
    """Where all the products are our own."""
    plan, layout, out = step.plan, step.layout, torch.empty(step.x.shape, dtype=step.x.dtype)
    step.module.decoder_layer(
        step.x,
        [one.form for one in kept],
        [_NONE if bias is None else bias for bias in biases],
        [one.out for one in kept],
        norms,
        eps,
        step.cos,
        step.sin,
        layout.k_cache[step.layer],
        layout.v_cache[step.layer],
        layout.slots,
        layout.cu_seqlens,
        layout.context_lens,
        layout.block_tables,
        plan.scale,
        plan.window or 0,
        plan.softcap or 0.0,
        out,
    )
    return out


def _one_by_one(step: _Step, kept: list[Packed], biases: list[Tensor | None], norms: list[Tensor], eps: list[float]) -> Tensor:
    """Where oneDNN multiplies."""
    module, plan, x = step.module, step.plan, step.x
    shape = (1, x.shape[1], -1, plan.head_dim)
    q, k, v, o, gate, up, down = [partial(_times, one.product, bias) for one, bias in zip(kept, biases, strict=True)]
    inner = normalized(module, x, norms[0], eps[0])
    queries, keys, values = q(inner).view(shape), k(inner).view(shape), v(inner).view(shape)
    if len(norms) > 2:
        queries, keys = normalized(module, queries, norms[2], eps[2]), normalized(module, keys, norms[3], eps[3])
    queries, keys = (rotated(module, heads.transpose(1, 2), step.cos, step.sin)[0].transpose(0, 1) for heads in (queries, keys))
    seen = paged_attention(queries, keys, values[0], step.layout, step.layer, scale=plan.scale, window=plan.window, softcap=plan.softcap)
    x = x + o(seen.view(1, shape[1], -1))
    inner = normalized(module, x, norms[1], eps[1])
    return x + down(gated(module, gate(inner), up(inner)))


def _times(product: Product | None, bias: Tensor | None, x: Tensor) -> Tensor:
    assert product is not None  # `kept` leaves the others out
    return product(x, bias)


def _plan(layer: nn.Module) -> Plan | None:
    """How to run a layer, if that gives the bits of its own forward. Remembered for layers that differ in their weights alone."""
    attention: Any = layer._modules["self_attn"]
    said = attention.config.to_json_string(use_diff=False)  # a forward may read it
    key = (forced_backend(), type(layer), *(_facts(part) for part in layer.modules()), _kind_of(layer), said)
    if key not in _plans:
        _plans[key] = _tried(layer)
    return _plans[key]


def _kind_of(layer: nn.Module) -> str | None:
    """What the configuration says that only this layer is."""
    attention: Any = layer._modules["self_attn"]
    kinds = getattr(attention.config, "layer_types", None)
    return str(kinds[attention.layer_idx]) if kinds else None


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """Type, plain attributes but the layer's number, shapes and dtypes of the weights."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, type(None)))}
    plain.pop("layer_idx", None), plain.pop("training", None)
    return (type(module), *sorted(plain.items()), *((name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)))


def _tried(layer: nn.Module) -> Plan | None:
    """Runs both ways on two short sequences."""
    from fastalign.models.attention import observe_calls

    attention: Any = layer._modules["self_attn"]
    kv_heads, dtype = attention.k_proj.weight.shape[0] // attention.head_dim, attention.q_proj.weight.dtype
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (
        torch.randn(1, 5, width, generator=generator).to(dtype) for width in (attention.q_proj.weight.shape[1], *[attention.head_dim] * 2)
    )

    def layout() -> PagedLayout:
        lengths, tables = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32)
        keys, values = ([torch.zeros(2, kv_heads, 4, attention.head_dim, dtype=dtype)] * (attention.layer_idx + 1) for _ in range(2))
        return PagedLayout(lengths, lengths.diff(), tables, torch.tensor([0, 1, 4, 5, 6]), keys, values)

    was, theirs, ours = layer.training, layout(), layout()
    layer.training = attention.training = False
    try:
        with torch.no_grad(), PackedWeights().active():
            with observe_calls() as calls:
                found = layer(x, position_embeddings=(cos, sin), attention_layout=theirs)
            if len(calls) != 1 or calls[0]["layer"] != attention.layer_idx or not isinstance(found, Tensor):
                return None
            asked = (calls[0][name] for name in ("scale", "window", "softcap"))
            plan = Plan(tuple(map(type, layer._modules.values())), attention.head_dim, *asked)
            same = run(layer, plan, x, ours, (cos, sin))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # it does not even take such inputs
        return None
    finally:
        layer.training = attention.training = was
    if same is None or not torch.equal(same, found):
        return None
    pairs = zip(theirs.k_cache + theirs.v_cache, ours.k_cache + ours.v_cache, strict=True)
    return plan if all(torch.equal(a, b) for a, b in pairs) else None
