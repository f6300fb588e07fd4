"""A decoder layer of the usual shape as one run of native calls, while an engine generates on the CPU.

What transformers' Python does between them costs a layer some 0.3 ms a step, a fifth of what stories260k takes for one token (AMD EPYC). A
layer is run this way only after that gave the bits of its own forward, in the output and in the cache, on random numbers. Everywhere else
(a gradient, a tree, another device, adapters, integer weights, hooks on a part) its own forward runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.models.fused_layers import is_fused
from fastalign.models.linear import RowLinear
from fastalign.ops.attention import PagedLayout, paged_attention
from fastalign.ops.backend import forced_backend, native_for
from fastalign.ops.gemm import PackedWeights, Product, active_packs
from fastalign.ops.rms_norm import normalized
from fastalign.ops.rope import rotated
from fastalign.ops.swiglu import gated

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")


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
        if type(module) in _classes.values() or not _looks_like_one(module):
            continue
        plan = _plan(module)
        if plan is not None:
            module.__class__ = _subclass(type(module))
            module._plan = plan  # type: ignore[assignment]


def _looks_like_one(module: nn.Module) -> bool:
    """The parts and nothing beside them; what they compute is seen when it runs."""
    parts = module._modules
    if parts.keys() != LAYER or not all(part is not None and is_fused(part) for part in parts.values()):
        return False
    attention, mlp = parts["self_attn"], parts["mlp"]
    names = attention._modules.keys()  # type: ignore[union-attr]
    if names not in (set(ATTENTION), {*ATTENTION, *HEAD_NORMS}) or not isinstance(getattr(attention, "head_dim", None), int):
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
    return _classes[kind]


_classes: dict[type, type] = {}
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
        if part._forward_hooks or part._forward_pre_hooks:
            return None
    weights, biases = ([linear._parameters[name] for linear in linears] for name in ("weight", "bias"))  # linear.weight takes 2 us
    scales = [norm._parameters["weight"] for norm in norms]
    cos, sin = rotation
    module, products = native_for("rms_norm", x, cos, sin, *scales), packs.products(weights, x.dtype)
    if module is None or products is None or cos.shape[-1] != plan.head_dim:
        return None
    passes = [(scale, norm.variance_epsilon) for scale, norm in zip(scales, norms, strict=True)]
    turned = (cos.contiguous(), sin.contiguous())
    return _run(module, plan, attention.layer_idx, x.contiguous(), layout, turned, list(zip(products, biases, strict=True)), passes)


def _run(
    module: ModuleType,
    plan: Plan,
    layer: int,
    x: Tensor,
    layout: PagedLayout,
    rotation: tuple[Tensor, Tensor],
    products: list[tuple[Product, Tensor | None]],
    norms: list[tuple[Tensor, float]],
) -> Tensor:
    """layer: of the cache; products: of q, k, v, o, gate, up, down with their biases; norms: before the attention, before the MLP, of the
    heads of q and of k.
    """
    shape = (1, x.shape[1], -1, plan.head_dim)
    (to_q, bias_q), (to_k, bias_k), (to_v, bias_v), (to_o, bias_o), (to_gate, bias_gate), (to_up, bias_up), (to_down, bias_down) = products
    inner = normalized(module, x, *norms[0])
    q, k, v = to_q(inner, bias_q).view(shape), to_k(inner, bias_k).view(shape), to_v(inner, bias_v).view(shape)
    if len(norms) > 2:
        q, k = normalized(module, q, *norms[2]), normalized(module, k, *norms[3])
    q, k = rotated(module, q.transpose(1, 2), *rotation), rotated(module, k.transpose(1, 2), *rotation)
    seen = paged_attention(
        q[0].transpose(0, 1), k[0].transpose(0, 1), v[0], layout, layer, scale=plan.scale, window=plan.window, softcap=plan.softcap
    )
    x = x + to_o(seen.view(1, shape[1], -1), bias_o)
    inner = normalized(module, x, *norms[1])
    return x + to_down(gated(module, to_gate(inner, bias_gate), to_up(inner, bias_up)), bias_down)


def _plan(layer: nn.Module) -> Plan | None:
    """How to run a layer, if that gives the bits of its own forward. Remembered for layers that differ in their weights alone."""
    key = (forced_backend(), type(layer), *(_facts(part) for part in layer.modules()), _kind_of(layer))
    if key not in _plans:
        _plans[key] = _tried(layer)
    return _plans[key]


def _kind_of(layer: nn.Module) -> str | None:
    """What the configuration says that only this layer is."""
    attention: Any = layer._modules["self_attn"]
    kinds = getattr(getattr(attention, "config", None), "layer_types", None)
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
