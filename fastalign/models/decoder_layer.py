"""A decoder layer of the usual shape as one run of native calls, while an engine generates on the CPU.

What transformers' Python does between them costs a layer some 0.3 ms a step, a fifth of what stories260k takes for one token (AMD EPYC). A
layer is run this way only after that gave the bits of its own forward, in the output and in the cache, on random numbers. Everywhere else
(a gradient, a tree, another device, adapters, integer weights, hooks on a part) its own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastalign.models.decoder_run import Plan, Ready, run
from fastalign.models.fused_layers import is_fused
from fastalign.models.linear import RowLinear
from fastalign.ops.attention import PagedLayout
from fastalign.ops.backend import forced_backend
from fastalign.ops.gemm import PackedWeights, active_packs

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")


def use_decoder_runs(model: nn.Module) -> None:
    """Turns the decoder layers of a model that are computed to the bit into subclasses that try `ready`, in place.

    After `use_fused_layers` and with the fastalign attention: those are the parts that it looks for.
    """
    for module in model.modules():
        if not is_planned(module) and plan_of(module) is not None:
            module.__class__ = _subclass(type(module))


def is_planned(layer: nn.Module) -> bool:
    """Whether `ready` may be asked for this layer."""
    return type(layer) in _own


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward: no hooks, not compiled, no forward of its own (as accelerate's)."""
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own.get("_compiled_call_impl") is not None
    return not hooked and "forward" not in own


def _looks_like_one(module: nn.Module) -> bool:
    """The parts and nothing beside them; what they compute is seen when it runs."""
    parts = module._modules
    if parts.keys() != LAYER or not all(part is not None and is_fused(part) for part in parts.values()):
        return False
    attention: Any = parts["self_attn"]
    mlp: Any = parts["mlp"]
    names = attention._modules.keys()
    if names not in (set(ATTENTION), {*ATTENTION, *HEAD_NORMS}) or not isinstance(getattr(attention, "head_dim", None), int):
        return False
    if not isinstance(getattr(attention, "config", None), PreTrainedConfig):
        return False
    if module._parameters or module._buffers or attention._parameters or attention._buffers or mlp._parameters or mlp._buffers:
        return False
    norms: list[Any] = [parts["input_layernorm"], parts["post_attention_layernorm"], *(attention._modules.get(name) for name in HEAD_NORMS)]
    if any(norm is not None and {*norm._parameters, *norm._buffers} != {"weight"} for norm in norms):
        return False
    linears = [getattr(attention, name) for name in ATTENTION] + [getattr(mlp, name, None) for name in MLP]
    return all(type(linear) is RowLinear and linear.weight.device.type == "cpu" for linear in linears)


def _subclass(kind: type) -> type:
    """The layer that tries `ready` first; made once."""
    if kind not in _classes:

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            layout, rotation = kwargs.get("attention_layout"), kwargs.get("position_embeddings")
            if type(layout) is PagedLayout and rotation is not None and not args:
                parts = ready(self, hidden_states.dtype)
                found = None if parts is None else run(parts, hidden_states, layout, rotation)
                if found is not None:
                    return found
            return kind.forward(self, hidden_states, *args, **kwargs)  # type: ignore[attr-defined]

        # under the family's own name: device maps and FSDP policies look for it
        _classes[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})
        _own[_classes[kind]] = kind
    return _classes[kind]


_classes: dict[type, type] = {}
_own: dict[type, type] = {}  # the other way round
_plans: dict[tuple[Any, ...], Plan | None] = {}  # what decides what a layer computes → how it is run
_global_hooks: Callable[[], bool] = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)


def ready(layer: nn.Module, dtype: torch.dtype) -> Ready | None:
    """What `run` needs of a layer for rows of this dtype; None where its own forward is to compute them.

    What a layer computes is looked at again for every engine, and after its weights were announced to have changed.
    """
    packs = active_packs()
    if packs is None or packs.quantizes or torch.is_grad_enabled() or _global_hooks():
        return None
    if layer not in packs.notes:
        packs.notes[layer] = plan_of(layer)
    plan = packs.notes[layer]
    return None if plan is None else _ready(layer, plan, packs, dtype)


def _ready(layer: nn.Module, plan: Plan, packs: PackedWeights, dtype: torch.dtype) -> Ready | None:
    if dtype != plan.dtype or _kinds(layer) != plan.kinds:
        return None
    parts = layer._modules
    attention: Any = parts["self_attn"]
    mlp: Any = parts["mlp"]
    own, gate = attention._modules, mlp._modules
    linears: list[Any] = [*(own[name] for name in ATTENTION), *(gate[name] for name in MLP)]
    norms: list[Any] = [parts["input_layernorm"], parts["post_attention_layernorm"], *(own[name] for name in HEAD_NORMS if name in own)]
    for part in (attention, mlp, *linears, *norms):
        if not is_plain(part):
            return None
    weights, biases = ([linear._parameters[name] for linear in linears] for name in ("weight", "bias"))  # linear.weight takes 2 us
    kept, scales = packs.kept(weights, dtype), [norm._parameters["weight"] for norm in norms]
    if kept is None or not all(scale.is_contiguous() for scale in scales):
        return None
    return Ready(plan, attention.layer_idx, linears, kept, biases, scales, [norm.variance_epsilon for norm in norms])


def _kinds(layer: nn.Module) -> tuple[type, ...]:
    parts = layer._modules
    inner = [parts[name]._modules.values() for name in ("self_attn", "mlp") if parts.get(name) is not None]  # type: ignore[union-attr]
    return tuple(type(part) for modules in (parts.values(), *inner) for part in modules)


def plan_of(layer: nn.Module) -> Plan | None:
    """How to run a layer, if that gives the bits of its own forward. Remembered for layers that differ in their weights alone."""
    if not _looks_like_one(layer):
        return None
    config: Any = layer._modules["self_attn"].config  # type: ignore[union-attr]
    try:
        said = config.to_json_string(use_diff=False)  # a forward may read it
    except (TypeError, ValueError):  # it holds what JSON does not
        return None
    key = (forced_backend(), *(_facts(part) for part in layer.modules()), _kind_of(layer), said)
    if key not in _plans:
        _plans[key] = _tried(layer)
    return _plans[key]


def _kind_of(layer: nn.Module) -> str | None:
    """What the configuration says that only this layer is."""
    attention: Any = layer._modules["self_attn"]
    kinds = getattr(attention.config, "layer_types", None) or ()
    return str(kinds[attention.layer_idx]) if attention.layer_idx < len(kinds) else None  # a mixture of two models counts on


def own_class(module: nn.Module) -> type:
    """The family's class of a layer."""
    return _own.get(type(module), type(module))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Its own numbers, words and switches."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, type(None)))}


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """Class, forward, plain attributes but the layer's number, shapes and dtypes of the weights."""
    kind: Any = own_class(module)
    plain = plain_attributes(module)
    plain.pop("layer_idx", None), plain.pop("training", None)
    return (kind, kind.forward, *sorted(plain.items()), *((name, p.shape, p.dtype) for name, p in module.named_parameters(recurse=False)))


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

    was, theirs, ours, packs = layer.training, layout(), layout(), PackedWeights()
    layer.training = attention.training = False
    try:
        with torch.no_grad(), packs.active():
            with observe_calls() as calls:
                found = own_class(layer).forward(layer, x, position_embeddings=(cos, sin), attention_layout=theirs)  # type: ignore[attr-defined]
            if len(calls) != 1 or calls[0]["layer"] != attention.layer_idx or not isinstance(found, Tensor):
                return None
            asked = (calls[0][name] for name in ("scale", "window", "softcap"))
            plan = Plan(_kinds(layer), dtype, attention.head_dim, *asked)
            parts = _ready(layer, plan, packs, dtype)
            same = None if parts is None else run(parts, x, ours, (cos, sin))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):  # it does not even take such inputs
        return None
    finally:
        layer.training = attention.training = was
    if same is None or not torch.equal(same, found):
        return None
    pairs = zip(theirs.k_cache + theirs.v_cache, ours.k_cache + ours.v_cache, strict=True)
    return plan if all(torch.equal(a, b) for a, b in pairs) else None
