"""One decode step of the engine against its floor, and where the time goes.

    python bench/bench_decode_floor.py [--rounds 5] [--dtype float32] [--sequences 1 16 256] [--model 40M] [--cpu_time]

step: what one more token of each of B sequences costs: calls of 8 and of 24 new tokens after prompts of 32, divided by 16; median of the
rounds (fastest-slowest).
floor: max(bytes / bandwidth, FLOP / rate). Bytes: every weight of a linear and the head once, and the keys and values of the context;
bandwidth from a copy of 256 MiB (read and written); FLOP: 2 x weights x B; rate: the best that torch's linear reaches on the model's
own shapes with 256 rows. All are measured in the same rounds as the steps.
Measured on one core of an AMD EPYC with AVX-512 that others used, CPU time, 40M: fp32 3.6, 1.9 and 1.1 times the floor at 1, 16 and 256
sequences, bf16 4.1, 3.4 and 1.5. At 1 and 16 a third is Python and the modules of transformers; the linears, the head above all, read
their weights at a third to a half of the bandwidth of a copy. On both cores of an idle one of the first generation, fp32: 1.44, 1.6, 1.17
and 1.05 times at 1, 16, 64 and 256: at 1 sequence the rest is Python, 4 of 13 ms; at 16 bytes and FLOP do not overlap.
shares: of a profiled call (cProfile, which makes Python look larger than it is): layers (linears, attention and the rest in one call, where
our own products run), linears, attention, sampler, other torch operators, Python and the modules of transformers.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.bench_generation import MODELS  # noqa: E402
from bench.harness import rounds_of  # noqa: E402
from fastalign.generation import Engine, SamplingParams  # noqa: E402
from fastalign.models.attention import use_fastalign_attention  # noqa: E402

PROMPT, SHORT, LONG = 32, 8, 24  # tokens
COPY_BYTES = 256 << 20
NAMES = {
    "linears": ("_C.gemm_packed", "_linear_pointwise", "nn.linear", "method torch.mm", "addmm", "gemm of"),
    "attention": ("paged_attention",),
}
NAMES |= {"layers": ("_C.decoder_layer",), "sampler": ("_C.sample", "_C.logp_rows", "_C.philox_uniform")}


def calls(engine: Engine, sequences: int) -> Callable[[int], None]:
    """A function that decodes so many new tokens of every sequence; every call has fresh prompts."""
    vocab, number = engine.model.config.vocab_size, 0  # type: ignore[union-attr]

    def call(new: int) -> None:
        nonlocal number
        number += 1
        samples = min(8, sequences)
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, vocab, (sequences // samples, PROMPT), generator=generator).tolist()  # type: ignore[call-overload]
        engine.generate(ids, SamplingParams(n=samples, max_tokens=new, seed=0, ignore_eos=True))

    return call


def linears(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that a step reads, the head among them."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def shapes(model: PreTrainedModel) -> list[torch.Tensor]:
    """One weight of each shape."""
    return list({weight.shape: weight for weight in linears(model)}.values())


def peaks(model: PreTrainedModel) -> dict[str, Callable[[], object]]:
    """What the floor is made of: a copy, and a product of 256 rows of each shape."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    cases: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for weight in shapes(model):
        x = torch.randn(256, weight.shape[1]).to(weight.dtype)
        cases[f"gemm {list(weight.shape)}"] = lambda x=x, weight=weight: nn.functional.linear(x, weight.detach())  # type: ignore[misc]
    return cases


def floors(model: PreTrainedModel, times: dict[str, list[float]], sequences: int) -> tuple[float, float]:
    """(milliseconds of the bytes, milliseconds of the FLOP) of one step."""
    config, size = model.config, next(model.parameters()).element_size()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = PROMPT + (SHORT + LONG) // 2
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * context * sequences
    weights = sum(weight.numel() for weight in linears(model))
    bandwidth = 2 * COPY_BYTES / min(times["copy"])
    rate = max(2 * 256 * weight.numel() / min(times[f"gemm {list(weight.shape)}"]) for weight in shapes(model))
    return size * (weights + cached) / bandwidth, 2 * weights * sequences / rate


def where(call: Callable[[int], None]) -> str:
    """The shares of one profiled call."""
    profile = cProfile.Profile()
    profile.runcall(call, LONG)
    total, shares = 0.0, dict.fromkeys((*NAMES, "other torch", "Python"), 0.0)
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        kind = next((kind for kind, names in NAMES.items() if any(part in name for part in names)), None)
        kind = kind if kind and file == "~" else "other torch" if file == "~" and "torch" in name.lower() + " " else "Python"
        shares[kind] += own
    return ", ".join(f"{kind} {100 * own / total:.0f} %" for kind, own in shares.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, default="40M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--cpu_time", action="store_true", help="count CPU time of all threads: the figure for a machine that others use")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MODELS[arguments.model]().to(getattr(torch, arguments.dtype)).eval()
    use_fastalign_attention(model)
    engine = Engine(model)
    print(f"{'model':13}{'sequences':>10}{'step ms':>10} {'':17}{'bytes ms':>10}{'FLOP ms':>10}{'x floor':>9}   shares, {arguments.dtype}")
    for sequences in arguments.sequences:
        call = calls(engine, sequences)
        call(SHORT)
        cases = {"short": lambda: call(SHORT), "long": lambda: call(LONG), **peaks(model)}  # noqa: B023
        times = rounds_of(cases, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
        steps = [(long - short) / (LONG - SHORT) for short, long in zip(times["short"], times["long"], strict=True)]
        read, computed = floors(model, times, sequences)
        step = statistics.median(steps)
        span = f"({min(steps):.1f}-{max(steps):.1f})"
        numbers = f"{step:10.2f} {span:17}{read:10.2f}{computed:10.2f}{step / max(read, computed):9.2f}"
        print(f"{arguments.model:13}{sequences:10}{numbers}   {where(call)}", flush=True)


if __name__ == "__main__":
    main()
