"""One optimizer step of an adapter against full fine-tuning: python -m bench.bench_adapters."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.models.adapters import ADAPTERS, AdapterOptions, attach_adapter
from fastalign.models.attention import use_fastalign_attention
from fastalign.packing import conversation
from fastalign.recipes.sft_task import micro_batches
from fastalign.training.optimizer import build_optimizer, build_schedule
from fastalign.training.step import LogitOptions, Updater


def build(bias: bool) -> LlamaForCausalLM:
    """A Llama of the 40M-parameter shape of the other benches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=True, attention_bias=bias, **sizes))
    use_fastalign_attention(model)
    return model


def updater_of(method: str) -> Updater:
    model: torch.nn.Module = build(bias=method == "bitfit")
    if method != "full":
        model = attach_adapter(model, method, AdapterOptions(r=16, alpha=32))  # type: ignore[arg-type]
    model.train()
    optimizer = build_optimizer(model, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, max_steps=100)
    return Updater(model, optimizer, schedule, max_grad_norm=1.0, options=LogitOptions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, half of them scored")
    parser.add_argument("--rounds", type=int, default=5, help="steps a method, in turns; the median counts")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time in place of the wall's, for a shared machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (options.tokens // 128, 128), generator=generator).tolist()
    batch = micro_batches([conversation(row, [False] * 64 + [True] * 64) for row in ids], options.tokens)
    updaters = {method: updater_of(method) for method in ("full", *ADAPTERS) if method != "qlora"}  # whose weights are of another kind
    times: dict[str, list[float]] = {method: [] for method in updaters}
    for round_number in range(options.rounds + 1):
        for method, updater in updaters.items():
            began = clock()
            updater.update(batch)
            if round_number:  # the first one warms up
                times[method].append(clock() - began)
    full = statistics.median(times["full"])
    print(f"{'method':8} {'trained':>12} {'AdamW states, MiB':>18} {'step, ms':>10} {'full / this':>12}")
    for method, values in times.items():
        trained = sum(p.numel() for p in updaters[method].gradients.parameters)
        states = sum(t.nbytes for state in updaters[method].optimizer.state.values() for t in state.values() if torch.is_tensor(t)) / 2**20
        middle = statistics.median(values)
        print(f"{method:8} {trained:12,} {states:18.1f} {1e3 * middle:10.1f} {full / middle:12.2f}")


if __name__ == "__main__":
    main()
