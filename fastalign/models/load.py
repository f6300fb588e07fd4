"""Models and tokenizers from a folder or the Hub, ready to run as a token tree."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastalign.models.adapters import load_adapter
from fastalign.models.attention import disable_dropout, use_fastalign_attention
from fastalign.models.probe import probe

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(
    name_or_path: str, *, dtype: str = "auto", device: torch.device | str = "cpu", load_in_4bit: bool = False
) -> PreTrainedModel:
    """Loads a causal language model, gives it the fastalign attention, sets dropout to 0 and probes it.

    Args:
        name_or_path: a folder with config.json and weights, a folder with a PEFT adapter (merged into its base), or a Hub name.
            Remote code is never run.
        dtype: "auto" (as saved), "float32" or "bfloat16".
        device: where the model goes.
        load_in_4bit: the linear layers but the head as NF4 with double quantization (QLoRA, arXiv:2305.14314), by bitsandbytes; they
            compute in `dtype` and cannot be trained. Sampled rows have trained rows' bits only up to that library's products.

    Raises:
        ValueError: when the folder is no model, the name is not found, dtype is none of the three, or bitsandbytes is missing.
        UnsupportedModelError: when the family cannot run as a token tree; it names the reason.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load_causal_lm: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (Path(name_or_path) / "adapter_config.json").is_file() and not (Path(name_or_path) / "config.json").is_file():
        if load_in_4bit:
            raise ValueError(f"load_causal_lm: {name_or_path!r} is an adapter; merge it into its base before that is quantized")
        return _load_merged(name_or_path, dtype, device)
    where = _source("load_causal_lm", name_or_path, "config.json")
    if load_in_4bit:
        where |= {"quantization_config": _four_bits(name_or_path, dtype, where), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=DTYPES[dtype], trust_remote_code=False, **where)
    except OSError as error:
        raise ValueError(f"load_causal_lm: no causal language model at {name_or_path!r}: {error}") from error
    if load_in_4bit:
        _keep_layout(model)
    else:
        model = model.to(device)
    use_fastalign_attention(model)
    disable_dropout(model)
    probe(model)
    return model


def _four_bits(name_or_path: str, dtype: str, where: dict[str, Any]) -> BitsAndBytesConfig:
    """NF4 with double quantization that computes in the model's dtype."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need the package bitsandbytes: install fastalign with its qlora extra")
    compute = DTYPES[dtype]
    if compute == "auto":
        saved = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **where).dtype
        compute = torch.float32 if saved is None else saved
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


def _keep_layout(model: PreTrainedModel) -> None:
    """Has 4-bit layers that compute in fp32 keep the layout of their weights.

    On a CPU with AVX-512 bf16 bitsandbytes (0.50.2) packs them anew at the first forward, for products in bf16 whatever was asked for:
    hidden rows of a two-layer model were 0.7 % off.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and getattr(module, "compute_dtype", None) == torch.float32:
            module.support_avx512bf16_for_cpu = False


def _load_merged(folder: str, dtype: str, device: torch.device | str) -> PreTrainedModel:
    """An adapter saved in PEFT's format, merged into the base model that its configuration names."""
    base = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"load_causal_lm: {folder}/adapter_config.json names no base model; merge the adapter into its base with peft first"
        )
    if Path(base).is_dir() and Path(base).resolve() == Path(folder).resolve():
        raise ValueError(f"load_causal_lm: {folder}/adapter_config.json names its own folder as the base model")
    model = load_adapter(load_causal_lm(base, dtype=dtype, device=device), folder).merge_and_unload()  # type: ignore[operator]
    model.name_or_path = folder  # what an adapter on top of it names as its base: with that of this one the adapter would be lost
    return model.requires_grad_(True)


def load_tokenizer(name_or_path: str, chat_template: str = "") -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name_or_path: a folder with tokenizer files, or a Hub name.
        chat_template: a Jinja file, or the template itself, that replaces the tokenizer's own; empty keeps it.

    Raises:
        ValueError: when there is no tokenizer, or the template's file is missing.
    """
    where = _source("load_tokenizer", name_or_path, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"load_tokenizer: no tokenizer at {name_or_path!r}: {error}") from error
    if chat_template:
        tokenizer.chat_template = _template(chat_template)
    return tokenizer


def _source(op: str, name_or_path: str, *wanted: str) -> dict[str, Any]:
    """`local_files_only` for a folder that holds one of `wanted`; a path that is no such folder is an error."""
    path = Path(name_or_path)
    if path.is_dir():
        if not any((path / name).is_file() for name in wanted):
            raise ValueError(f"{op}: the folder {name_or_path!r} has no {' or '.join(wanted)}; is it a Hugging Face folder?")
        return {"local_files_only": True}
    if path.exists():
        raise ValueError(f"{op}: expected a folder or a Hub name, got the file {name_or_path!r}")
    if name_or_path.count("/") > 1 or name_or_path.startswith(("/", ".", "~")) or not name_or_path:
        raise ValueError(f"{op}: there is no folder {name_or_path!r}")
    return {}


def _template(chat_template: str) -> str:
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise ValueError(f"load_tokenizer: chat_template must be a Jinja file or a template, and there is no file {chat_template!r}")
    return path.read_text(encoding="utf-8")
