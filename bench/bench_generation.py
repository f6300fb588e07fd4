"""The engine against transformers' model.generate and generate_batch, interleaved in one run: same weights, prompts and token counts.

    python bench/bench_generation.py [--quick] [--rounds 2] [--models stories260k 40M] [--dtype float32] [--groups 32] [--json FILE]

stories260k is the pretrained folder where it is beside the project, else a random model of its shape; 40M is a random Qwen2 of
512 hidden, 8 layers, 8/4 heads and 32,000 tokens. Each load is `groups` prompts of 8 samples and 128 new tokens; prompts are drawn
anew every round, so that no cache of an earlier round helps. All sides sample at temperature 1 and never stop early; the engine also
returns two log-probs a token, which the others do not. The peers run a copy of the model as transformers makes it; ours has the
project's attention and layers. generate_batch (continuous batching) has pages of 16 tokens and the
blocks that the load needs: its defaults take most of the free memory and were slower. Where a side raises, its reason is printed.

tokens/s: of the median round, (slowest-fastest); every second round takes the sides in the opposite order. x: our median rate over
that of model.generate (gen) and generate_batch (batch). prompt tokens: what the engine forwarded of prompts in one round, of what was
given (groups x samples x length). --json adds the lines to a file of bench/results, from which the README's table is written.
On a machine that others use, OMP_WAIT_POLICY=passive keeps waiting threads from taking the cores that they wait for.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.harness import commit, rounds_of, write_record  # noqa: E402
from fastalign.generation import Engine, SamplingParams  # noqa: E402
from fastalign.models.attention import use_fastalign_attention  # noqa: E402

STORIES = ROOT.parent / "shared" / "models" / "stories260k"
PAGE = 16  # tokens


def stories260k() -> PreTrainedModel:
    if STORIES.is_dir():
        return AutoModelForCausalLM.from_pretrained(str(STORIES), dtype=torch.float32)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True))


def qwen2_40m() -> PreTrainedModel:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True))


MODELS = {"stories260k": stories260k, "40M": qwen2_40m}
# name: (samples a prompt, prompt tokens, new tokens)
LOADS = {"short": (8, 32, 128), "shared 512": (8, 512, 128), "no group": (1, 32, 128)}
SIDES = ("fastalign", "generate", "generate_batch")


def sides(stock: PreTrainedModel, engine: Engine, load: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """One call of each side over the same work: (groups, samples, prompt tokens, new tokens). stock: the peers' model."""
    groups, samples, length, new = load
    numbers = dict.fromkeys(SIDES, 1000 * groups)
    common = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "num_return_sequences": samples, "pad_token_id": 0}
    pages = -(-(length + new) // PAGE) * groups * samples
    batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=1024)

    def prompts(side: str) -> torch.Tensor:
        numbers[side] += 1  # every side sees the same prompts in a round, and no round those of another
        generator = torch.Generator().manual_seed(numbers[side])
        return torch.randint(3, stock.config.vocab_size, (groups, length), generator=generator)

    def ours() -> None:
        ids = prompts("fastalign").tolist()
        engine.stats.reset()
        engine.generate(ids, SamplingParams(n=samples, max_tokens=new, seed=0, ignore_eos=True))

    def generate() -> None:
        ids = prompts("generate")
        stock.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, **common)

    def generate_batch() -> None:
        ids = prompts("generate_batch").tolist()
        config = GenerationConfig(eos_token_id=-1, **common)
        outs = stock.generate_batch(ids, generation_config=config, continuous_batching_config=batching, warmup=False)
        tokens = sum(len(out.generated_tokens) for out in outs.values())
        if tokens != groups * samples * new:  # it logs errors and returns what it has
            raise RuntimeError(f"generate_batch returned {tokens} tokens, expected {groups * samples * new}")

    return dict(zip(SIDES, (ours, generate, generate_batch), strict=True))


def working(cases: dict[str, Callable[[], object]]) -> list[str]:
    """The names of the sides that run at all, after a first call of each; the others' reasons are printed."""
    left = []
    for name, run in cases.items():
        try:
            run()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            print(f"  {name} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        else:
            left.append(name)
    return left


def line(times: dict[str, list[float]], tokens: int) -> str:
    """Rates and ratios of one load."""
    rate = {name: 1e3 * tokens / statistics.median(ms) for name, ms in times.items()}
    cells = []
    for name in SIDES:
        span = f"({1e3 * tokens / max(times[name]):.0f}-{1e3 * tokens / min(times[name]):.0f})" if name in times else ""
        cells.append(f"{rate[name]:8.0f} {span:15}" if name in rate else f"{'-':>8} {'':15}")
    ratios = [f"{rate['fastalign'] / rate[name]:8.2f}" if name in rate else f"{'-':>8}" for name in SIDES[1:]]
    return " ".join(cells + ratios)


def add_line(path: Path, key: dict[str, str], rates: dict[str, list[float]]) -> None:
    """Puts one load's tokens/s a round into a record, beside those of other loads."""
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"] if path.exists() else []
    mine = {"commit": commit(), **key, "tokens_per_second": rates}
    write_record(path, {"lines": [one for one in lines if {name: one[name] for name in key} != key] + [mine]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 groups, 32 new tokens, short prompts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--new", type=int, default=0, help="new tokens in place of the load's")
    parser.add_argument("--cpu_time", action="store_true", help="count CPU time of all threads: the figure for a machine that others use")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--skip", nargs="*", choices=SIDES[1:], default=[], help="sides that are left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", help="add the lines to this file, in the place of earlier ones of the same model, load and dtype")
    arguments = parser.parse_args()
    names = "".join(f"{name + ' tok/s':25}" for name in SIDES)
    print(f"{'model':13}{'load':20}{names}{'x gen':>8}{'x batch':>9}  prompt tokens   {arguments.dtype}, {torch.get_num_threads()} threads")
    for name in arguments.models:
        torch.manual_seed(0)
        stock = MODELS[name]().to(getattr(torch, arguments.dtype)).eval()
        model = copy.deepcopy(stock)
        use_fastalign_attention(model)
        engine = Engine(model)
        for title in ["short"] if arguments.quick else arguments.loads:
            samples, length, new = LOADS[title]
            groups = (4 if arguments.quick else arguments.groups) * (1 if samples > 1 else 8)
            new = arguments.new or (32 if arguments.quick else new)
            length = min(length, model.config.max_position_embeddings - new)
            small = sides(stock, engine, (1, samples, length, 4))  # tries and warms every side
            run = working({side: call for side, call in small.items() if side not in arguments.skip})
            cases = {side: call for side, call in sides(stock, engine, (groups, samples, length, new)).items() if side in run}
            times = rounds_of(cases, arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
            given = f"{engine.stats.prompt_tokens} of {groups * samples * length}"
            load, tokens = f"{groups}x{samples} {length}+{new}", groups * samples * new
            print(f"{name:13}{load:20}{line(times, tokens)}  {given}", flush=True)
            if arguments.json:
                key = {"model": name, "load": load, "dtype": arguments.dtype}
                add_line(Path(arguments.json), key, {side: [1e3 * tokens / ms for ms in each] for side, each in times.items()})


if __name__ == "__main__":
    main()
