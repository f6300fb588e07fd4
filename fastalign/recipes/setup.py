"""What every training command does first: model, tokenizer, optimizer, and a plan that --dry_run prints."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.adapters import MERGE_4BIT, AdapterOptions, attach_adapter
from ..models.backbone import head_of
from ..models.load import load_causal_lm, load_tokenizer
from ..models.switching import trained_parameters
from ..training.allocator import keep_freed_memory
from ..training.checkpoint import latest_checkpoint
from ..training.loop import StopAt
from ..training.optimizer import build_optimizer, build_schedule
from ..training.step import LogitOptions, Updater
from ..training.trackers import check_trackers
from .arguments import Arguments, ModelArguments, OptimArguments, RunArguments

log = logging.getLogger("fastalign")


@dataclass
class Loaded:
    """A model ready to train, its tokenizer and device.

    Attributes:
        shared: reward models beside it, by name, which may be adapters on its base weights; None: they may not.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    shared: dict[str, Any] | None = None


def load(arguments: ModelArguments, attach: Callable[[Any], nn.Module] | None = None) -> Loaded:
    """Loads model and tokenizer, attaches the adapter, sets the head's dtype.

    Args:
        attach: puts the adapter on; None: a new one of the method that the arguments name.

    Raises:
        ValueError: no model named, a device that is not there, or a tied head asked to differ in dtype.
    """
    if not arguments.model_name_or_path:
        raise ValueError("--model_name_or_path is required: a local folder in Hugging Face format, or a Hub name")
    device = pick_device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(arguments.tokenizer_name_or_path or arguments.model_name_or_path, arguments.chat_template)
    method = arguments.peft_method or ("lora" if arguments.use_peft else "")
    four_bits = arguments.load_in_4bit or method == "qlora"
    if four_bits and method not in ("lora", "rslora", "dora", "qlora"):
        raise ValueError("--load_in_4bit: 4-bit weights are not trained; give --peft_method lora, rslora or dora")
    if four_bits and arguments.merge_adapter:
        raise ValueError(MERGE_4BIT)
    name = arguments.model_name_or_path
    model: nn.Module = load_causal_lm(name, dtype=arguments.dtype, device=device, load_in_4bit=four_bits)
    if arguments.head_dtype == "float32":
        widen_head(model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if arguments.merge_adapter and not method:
        raise ValueError("--merge_adapter: there is no adapter to merge; give --use_peft or --peft_method")
    if method not in ("", "bitfit") and (Path(name) / "adapter_config.json").is_file() and not arguments.merge_adapter:
        log.warning(
            "%s is an adapter: the new one names that folder as its base, which fastalign loads and peft alone does not; --merge_adapter"
            " writes a plain model instead",
            name,
        )
    if method and attach is not None:
        model = attach(model)
    elif method:
        options = AdapterOptions(arguments.lora_r, arguments.lora_alpha, arguments.lora_target_modules)
        model = attach_adapter(model, method, options)  # type: ignore[arg-type]
    model.train()
    return Loaded(model, tokenizer, device)


def widen_head(model: nn.Module) -> None:
    """Keeps the LM head in fp32 beside a low-precision backbone."""
    head = head_of(model)
    if head.weight.dtype == torch.float32:
        return
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding.data_ptr() == head.weight.data_ptr():
        raise ValueError(
            "--head_dtype float32: this model ties its head to the embedding, which cannot have two dtypes; use --dtype float32"
        )
    model.get_output_embeddings().float()  # type: ignore[operator]


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and random (adapter initialization, dropout); sampling has counters of its own."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected an integer in [0, 2**63), got {seed}")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu, or install the CUDA build of torch")
    return torch.device(name)


def check_output(run: RunArguments, eval_dataset_name: str | list[str]) -> Path | None:
    """The checkpoint to resume from, or None; refuses to write over another run.

    Raises:
        FileExistsError: output_dir holds a run and neither resuming nor overwriting was asked for.
    """
    if not run.output_dir:
        raise ValueError("--output_dir: expected a folder, got an empty text")
    output_dir = Path(run.output_dir)
    check_trackers(run.report_to)
    if StopAt.parse(run.stop_at) is not None and not eval_dataset_name:
        raise ValueError(f"--stop_at {run.stop_at} needs held-out data: give --eval_dataset_name")
    if run.resume_from_checkpoint:
        if run.resume_from_checkpoint not in ("latest", "true", "True"):
            return Path(run.resume_from_checkpoint)
        found = latest_checkpoint(output_dir)
        if found is None and (output_dir / "summary.json").exists() and not run.overwrite_output_dir:
            raise FileExistsError(
                f"--output_dir {output_dir} holds a finished run without checkpoints: there is nothing to resume; name another"
            )
        if found is None:
            log.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
        return found
    rows = output_dir / "metrics.jsonl"  # empty: a run that ended before its first step
    taken = ""
    if rows.exists() and rows.stat().st_size:
        taken = "already holds a run; add --resume_from_checkpoint latest, --overwrite_output_dir, or name another"
    elif any((output_dir / name).exists() for name in ("config.json", "adapter_config.json")):
        taken = "holds a model; name another, or add --overwrite_output_dir to put the new one in its place"
    if taken and not run.overwrite_output_dir:
        if not run.dry_run:
            raise FileExistsError(f"--output_dir {output_dir} {taken}")
        log.warning("the run itself would be refused: --output_dir %s %s", output_dir, taken)
    return None


def num_steps(optim: OptimArguments, num_records: int, batch: int) -> int:
    """Optimizer steps of the run."""
    if optim.max_steps > 0:
        return optim.max_steps
    if optim.max_steps == 0 or optim.num_train_epochs <= 0:
        raise ValueError(f"nothing to do: --max_steps {optim.max_steps} --num_train_epochs {optim.num_train_epochs}")
    return max(1, math.ceil(optim.num_train_epochs * num_records / batch))


def build_updater(loaded: Loaded, args: Arguments, max_steps: int, *, temperature: float = 1.0) -> Updater:
    """Optimizer, schedule and gradients for the loaded model."""
    optim = args.optim
    if optim.learning_rate <= 0:
        raise ValueError(f"--learning_rate must be > 0, got {optim.learning_rate}")
    for name, beta in (("adam_beta1", optim.adam_beta1), ("adam_beta2", optim.adam_beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"--{name}: expected a number in [0, 1), got {beta}")
    optimizer = build_optimizer(
        loaded.model,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )
    schedule = build_schedule(optimizer, optim.lr_scheduler_type, warmup_steps=optim.warmup_steps, max_steps=max_steps)
    options = LogitOptions(temperature, args.batch.max_chunk_bytes or None)
    return Updater(loaded.model, optimizer, schedule, max_grad_norm=optim.max_grad_norm, options=options)


def plan(loaded: Loaded, args: Arguments, *, max_steps: int, num_records: int, extra: dict[str, Any]) -> dict[str, Any]:
    """What --dry_run prints: sizes, steps, a memory estimate in MiB, and what runs on which backend."""
    from ..environment import env

    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    trainable = [p for _, p in trained_parameters(loaded.model)]
    count = sum(p.numel() for p in trainable)
    tails = sum(2 * p.numel() for p in trainable if p.dtype == torch.bfloat16)
    embedding = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    mib = 2**20
    return {
        "model": f"{args.model.model_name_or_path} ({type(loaded.model).__name__}, {embedding.dtype}, vocabulary {embedding.shape[0]})",
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,} ({count:,} trained)",
        "records": num_records,
        "optimizer steps": max_steps,
        **extra,
        "memory: weights, MiB": round(weights / mib),
        "memory: fp32 gradients, MiB": round(4 * count / mib),
        "memory: optimizer, MiB": round((8 * count + tails) / mib),
        "device": str(loaded.device),
        "backends": env().get("backends", {}),
    }
