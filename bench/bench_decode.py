"""Decode steps of the engine on a GPU, with and without CUDA graphs, against transformers' two generators and the device's bandwidth.

    python bench/bench_decode.py [--shape 0.5B] [--batch 256] [--context 1024] [--new 64] [--budget_s 100] [--results FILE.json]

Random weights of the shape in bf16; `batch` unshared prompts, sampling at temperature 1, no early stop. The prompts are so long that the
mean context over the measured steps is `context`. A step's time is the difference of two calls, of 1 + `new` and of 1 new tokens, divided
by `new`: prompts drop out. Sides: the engine, the same reading each step's tokens before it queues the next, and the same without graphs
(all also return two log-probs a token), `model.generate` (side "torch") and `model.generate_batch`, transformers' continuous batching; the
floor reads, in one kernel, as many bytes as a step must:
the weights once, and the keys and values of every context. A side that fails says why and leaves its row out; what was measured is
written after every side. `--shape tiny` on a CPU checks the bench itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.harness import Result, header, timed, write_results  # noqa: E402
from fastalign.generation import Engine, SamplingParams  # noqa: E402
from fastalign.generation.runner import cache_bytes_per_token  # noqa: E402
from fastalign.models.attention import NAME, use_fastalign_attention  # noqa: E402

# (hidden, intermediate, layers, heads, key-value heads, vocabulary); the first is Qwen2.5-0.5B's
SHAPES = {"0.5B": (896, 4864, 24, 14, 2, 151_936), "tiny": (64, 128, 2, 4, 2, 131)}
Side = Callable[[int], object]  # generates so many tokens a prompt


def random_model(shape: str, device: str) -> PreTrainedModel:
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    use_fastalign_attention(model)
    return model


def step_bytes(model: PreTrainedModel, batch: int, context: int) -> int:
    """What a decode step must read: every weight once (a tied head is one with the embedding), and `batch` contexts."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return weights + batch * context * cache_bytes_per_token(model)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def sides(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Side]:
    """Every generator over the same prompts; the engines keep their cache and graphs from call to call."""
    prompts = ids.tolist()
    less: dict[str, dict[str, Any]] = {", read at once": {"async_scheduling": False}, ", no graphs": {"cuda_graphs": False}}
    engines = {f"fastalign{name}": Engine(model, prefix_caching=False, **options) for name, options in ({"": {}} | less).items()}

    def ours(name: str) -> Side:
        return lambda new: engines[name].rollout(prompts, SamplingParams(max_tokens=new, seed=0, ignore_eos=True))

    def settings(new: int) -> GenerationConfig:
        return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0)  # no end of sequence: none stops

    def generate(new: int) -> None:
        with attention(model, "sdpa"), torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings(new))

    def generate_batch(new: int) -> None:
        with attention(model, "sdpa"):
            found = model.generate_batch(prompts, generation_config=settings(new))
        drawn = [len(output.generated_tokens) for output in found.values()]
        if drawn != [new] * len(prompts):
            raise RuntimeError(f"generate_batch: expected {len(prompts)} completions of {new} tokens, got {len(drawn)} of {set(drawn)}")

    return {**{name: ours(name) for name in engines}, "torch": generate, "generate_batch": generate_batch}


def floor_ms(bytes: int, device: str) -> float:
    """Reading so many bytes in one kernel: the best of five."""
    data = torch.ones(bytes // 8, dtype=torch.int64, device=device)
    data.sum()
    return min(timed(data.sum) for _ in range(5))


def step_ms(side: Side, new: int) -> float:
    """Milliseconds of one decode step after a call that loads, allocates and records what is done once.

    Raises:
        RuntimeError: when the longer call was not slower: the difference is noise then.
    """
    side(1 + new)
    few, many = timed(lambda: side(1)), timed(lambda: side(1 + new))
    if many <= few:
        raise RuntimeError(f"{1 + new} tokens took {many:.1f} ms and 1 token {few:.1f}: time more steps with --new")
    return (many - few) / new


def measure(options: argparse.Namespace) -> list[Result]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    began, model = time.monotonic(), random_model(options.shape, device)
    length = options.context - options.new // 2
    ids = torch.randint(3, model.config.vocab_size, (options.batch, length), device=device)
    moved = step_bytes(model, options.batch, options.context)
    floor = floor_ms(moved, device)
    found: dict[str, float] = {}
    results: list[Result] = []
    for name, side in sides(model, ids).items():
        left = options.budget_s - (time.monotonic() - began)
        if left < 0:
            print(f"{name}: left out, the {options.budget_s:g} s are over", flush=True)
            continue
        try:
            found[name] = step_ms(side, options.new)
        except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{name}: {found[name]:.2f} ms a step, {1e3 * options.batch / found[name]:.0f} tokens/s", flush=True)
        title = f"{options.shape}, {options.batch} x {options.context}"
        times = {key: [value] for key, value in ({**found, "floor": floor}).items()}
        results = list(Result.table("decode step", title, "bfloat16", times, {}, bytes=float(moved)).values())
        if options.results:
            write_results(options.results, results)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024, help="mean keys a query reads")
    parser.add_argument("--new", type=int, default=64, help="steps that are timed")
    parser.add_argument("--budget_s", type=float, default=100.0, help="no side begins after so many seconds")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="write every line with device, date and commit")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and options.shape != "tiny":
        parser.error("--shape: this machine has no GPU; --shape tiny checks the bench itself on the CPU")
    if options.context <= options.new // 2:
        parser.error(f"--context: expected more than half of --new {options.new}, got {options.context}")
    for line in (header(), *(result.line() for result in measure(options))):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
