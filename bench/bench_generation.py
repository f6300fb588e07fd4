"""The engine against transformers' model.generate, interleaved in one run: the same weights, prompts and token counts.

    python bench/bench_generation.py [--quick] [--rounds 2] [--models stories260k 40M] [--dtype float32]

stories260k is the pretrained folder where it is beside the project, else a random model of its shape; 40M is a random Qwen2 of
512 hidden, 8 layers, 8/4 heads and 32,000 tokens. Both sides sample at temperature 1 and never stop early; the engine also
returns two log-probs a token, which model.generate does not. x generate: our rate over that of model.generate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.harness import interleaved  # noqa: E402
from fastalign.generation import Engine, SamplingParams  # noqa: E402
from fastalign.models.attention import NAME, use_fastalign_attention  # noqa: E402
from fastalign.models.load import load_causal_lm  # noqa: E402

STORIES = ROOT.parent / "shared" / "models" / "stories260k"


def stories260k() -> PreTrainedModel:
    if STORIES.is_dir():
        return load_causal_lm(str(STORIES))
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512, max_position_embeddings=512, tie_word_embeddings=True))


def qwen2_40m() -> PreTrainedModel:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True))


MODELS = {"stories260k": stories260k, "40M": qwen2_40m}
# name: (prompts, samples a prompt, prompt tokens, new tokens)
LOADS = {
    "64 prompts": (64, 1, 32, 64),
    "8 prompts x 8": (8, 8, 32, 64),
    "64 long prompts": (64, 1, 256, 64),
    "8 long prompts x 8": (8, 8, 256, 64),
}


def sides(model: PreTrainedModel, load: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """One call of each side over the same work."""
    prompts, samples, length, new = load
    vocab = model.config.vocab_size
    ids = torch.randint(3, vocab, (prompts, length), generator=torch.Generator().manual_seed(0))
    engine = Engine(model)
    params = SamplingParams(n=samples, max_tokens=new, seed=0, ignore_eos=True)
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}

    def ours() -> None:
        model.set_attn_implementation(NAME)
        engine.generate(ids.tolist(), params)

    def generate() -> None:
        model.set_attn_implementation("sdpa")
        model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=samples, **options)

    return {"fastalign": ours, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 new tokens and the short prompts alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    print(f"{'model':14}{'load':22}{'dtype':10}{'tokens/s':>10}{'generate':>10}{'x generate':>12}   threads {torch.get_num_threads()}")
    for name in arguments.models:
        torch.manual_seed(0)
        model = MODELS[name]().to(getattr(torch, arguments.dtype)).eval()
        use_fastalign_attention(model)
        for title, load in LOADS.items():
            if arguments.quick and "long" in title:
                continue
            load = (*load[:3], 16) if arguments.quick else load
            best = interleaved(sides(model, load), arguments.rounds)
            tokens = load[0] * load[1] * load[3]
            ours, theirs = (1e3 * tokens / best[side] for side in ("fastalign", "generate"))
            print(f"{name:14}{title:22}{arguments.dtype:10}{ours:10.0f}{theirs:10.0f}{ours / theirs:12.2f}", flush=True)


if __name__ == "__main__":
    main()
