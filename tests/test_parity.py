"""The sampler's log-probs are the trainer's to the bit, whatever the schedule: whole completions on two shapes, and a run of GRPO."""

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_models import ready, sampled_logprobs, scored, values
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastalign.generation import Engine, SamplingParams
from fastalign.models.load import load_causal_lm
from fastalign.ops.backend import native
from fastalign.recipes import arithmetic, online
from fastalign.recipes.arguments import (
    Arguments,
    BatchArguments,
    DataArguments,
    ModelArguments,
    OnlineArguments,
    OptimArguments,
    RunArguments,
    SamplingArguments,
)

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
GROUPS, SAMPLES, NEW = 8, 8, 128
WIDE = {"vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.1}

pytestmark = pytest.mark.skipif(native() is None, reason="bitwise parity needs the native attention")


def stories_shape():
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**WIDE, **shape))


def qwen2_of_8_layers():
    shape = {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**WIDE, **shape))


def stories260k():
    if not STORIES.is_dir():
        pytest.skip("../shared/models/stories260k is not here")
    return load_causal_lm(str(STORIES))


def schedule(seed):
    """Random engine options under which whole sequences wait, are cut into chunks and are preempted."""
    chance = random.Random(seed)
    longest = 40 + NEW
    return {
        "block_size": chance.choice((1, 3, 8, 16, 32)),
        "max_num_seqs": chance.randint(9, GROUPS * SAMPLES),
        "max_num_batched_tokens": chance.randint(64, 300),
        "kv_cache_tokens": longest * chance.randint(6, 12),
    }


def rollout_of(built, seed):
    lengths = [random.Random(seed + i).randint(1, 40) for i in range(GROUPS)]
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    engine = Engine(built, **schedule(seed))
    rollout = engine.rollout(prompts, SamplingParams(n=SAMPLES, temperature=0.9, max_tokens=NEW, seed=seed, ignore_eos=True))
    assert engine.stats.preemptions > 0
    return rollout


def assert_parity(built, seed):
    rollout = rollout_of(built, seed)
    built.train()
    ours, theirs = sampled_logprobs(rollout), scored(built, rollout, 0.9)
    assert len(ours) == GROUPS * SAMPLES * NEW
    differing = int((ours != theirs).sum())
    assert differing == 0, f"{differing} of {len(ours)} log-probs differ, by up to {(ours - theirs).abs().max():.2g}"
    assert torch.equal(sampled_logprobs(rollout, raw=True), scored(built, rollout, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [stories_shape, qwen2_of_8_layers, stories260k])
def test_parity_of_every_logprob_of_64_samples(shape, dtype):
    torch.manual_seed(0)
    assert_parity(ready(shape().to(dtype)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_under_many_schedules_and_threads(dtype, seed, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in (stories_shape, qwen2_of_8_layers):
            torch.manual_seed(seed)
            assert_parity(ready(shape().to(dtype)), seed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_parity_in_every_step_of_a_grpo_run(tmp_path, dtype):
    tokenizer = arithmetic.build_tokenizer()
    arithmetic.build_model(0, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arithmetic.write_jsonl(tmp_path / "train.jsonl", arithmetic.problems(0, demonstrations=1, heldout=1)[2][:40], ("prompt", "answer"))
    (tmp_path / "reward.py").write_text("def even(prompts, completions, **columns):\n    return [float(len(c) % 2) for c in completions]\n")
    args = Arguments(
        command="grpo",
        model=ModelArguments(model_name_or_path=str(tmp_path / "model"), dtype=dtype, device="cpu"),
        data=DataArguments(dataset_name=str(tmp_path / "train.jsonl"), max_length=48),
        optim=OptimArguments(learning_rate=1e-3, max_steps=50, lr_scheduler_type="constant"),
        batch=BatchArguments(per_device_train_batch_size=8),
        run=RunArguments(output_dir=str(tmp_path / "run")),
        sampling=SamplingArguments(max_completion_length=6),
        online=OnlineArguments(num_generations=4, reward=[f"{tmp_path / 'reward.py'}:even"], reuse_forward=False),  # all of it anew
    )
    online.run(args)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["sampling/sampling_logp_difference/max"] for row in rows if "sampling/sampling_logp_difference/max" in row]
    assert len(found) == 50
    assert max(found) == 0, f"log-probs differ in {sum(map(bool, found))} of 50 steps, by up to {max(found)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_serve_many_calls_and_follow_every_change(dtype):
    built = ready(stories_shape().to(dtype))
    engine, params = Engine(built), SamplingParams(n=2, max_tokens=8, seed=0, ignore_eos=True)
    weight = built.model.layers[0].mlp.up_proj.weight
    engine.rollout([[5, 6, 7]], params)
    packed = engine._packs.of(weight)
    engine.rollout([[5, 6, 7, 8]], params)
    assert engine._packs.of(weight) is packed
    weight.data.mul_(1.5)  # which no version counter sees
    assert values(engine.rollout([[5, 6, 7]], params)) == values(Engine(built).rollout([[5, 6, 7]], params))
    with engine.updating_weights(), torch.no_grad():
        weight.mul_(1.5)
    assert values(engine.rollout([[5, 6, 7]], params)) == values(Engine(built).rollout([[5, 6, 7]], params))
    engine.release_cache()
    assert not engine._packs._kept
