"""Loss and gradients do not depend on how a batch is cut into micro-batches, for SFT and for GRPO and its kin."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.algorithms import resolve
from fastalign.models.attention import use_fastalign_attention
from fastalign.packing import conversation
from fastalign.recipes.policy import build_chunks, group_advantages, micro_batch
from fastalign.recipes.sft_task import micro_batches
from fastalign.rollout import Rollout, Sample
from fastalign.training.optimizer import build_optimizer, build_schedule
from fastalign.training.step import LogitOptions, Updater, score

VOCAB = 61


def updater(tied: bool = False, dtype: torch.dtype = torch.float32) -> Updater:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    use_fastalign_attention(model)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = build_schedule(optimizer, "constant", warmup_steps=0, max_steps=10)
    return Updater(model, optimizer, schedule, max_grad_norm=0.0, options=LogitOptions())


def conversations(n: int = 12):
    rng = random.Random(1)
    lengths = [rng.randint(2, 14) for _ in range(n)]
    return [
        conversation([rng.randrange(VOCAB) for _ in range(m)], [i % 3 != 0 for i in range(m)], weight=rng.choice([1.0, 0.5]))
        for m in lengths
    ]


def rollout(num_groups: int = 5, size: int = 4) -> Rollout:
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(num_groups)]
    samples = []
    for g in range(num_groups):
        lengths = [rng.randint(1, 8) for _ in range(size + g % 2)]
        ids = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
        samples.append([Sample(x, [-1.0] * len(x), [-1.0] * len(x), rewards={"r": rng.random()}) for x in ids])
    return Rollout(prompts, samples, [{} for _ in prompts])


def gradients_of(u: Updater, batches) -> tuple[float, torch.Tensor]:
    result = u.accumulate(batches)
    return result.loss, torch.cat([b.flatten().double() for b in u.gradients.buffers])


def assert_same(got, expected):
    assert abs(got[0] - expected[0]) <= 1e-6 * max(abs(expected[0]), 1e-3)
    assert (got[1] - expected[1]).norm() <= 1e-6 * expected[1].norm()


@pytest.mark.parametrize("tied", [False, True])
def test_sft_is_invariant_to_micro_batches(tied):
    u, segments = updater(tied), conversations()
    whole = gradients_of(u, micro_batches(segments, 10_000))
    assert whole[1].norm() > 1e-3
    for budget in (1, 17, 40):
        batches = micro_batches(segments, budget)
        assert len(batches) > 2
        assert_same(gradients_of(u, batches), whole)


def test_sft_equals_plain_transformers():
    u, segments = updater(), conversations()
    loss, grads = gradients_of(u, micro_batches(segments, 10_000))
    u.gradients.detach()
    total, weight = 0.0, 0.0
    for s in segments:
        ids = torch.tensor([s.ids])
        logp = u.model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(s.scored[1:]).float() * s.weight
        total, weight = total - (logp * mask).sum(), weight + float(mask.sum())
    (total / weight).backward()
    expected = torch.cat([p.grad.flatten().double() for p in u.model.parameters()])
    assert abs(loss - float(total / weight)) < 1e-6
    assert (grads - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "reinforce"])
def test_policy_is_invariant_to_micro_batches(algorithm):
    u, data, row = updater(), rollout(), resolve(algorithm)
    advantages = group_advantages(data, row, {"r": 1.0})

    def run(max_tokens: int):
        chunks = build_chunks(data, advantages, row, budget=8, max_tokens=max_tokens)
        for chunk in chunks:
            torch.manual_seed(5)
            current = score(u.model, chunk.packed)
            wave = torch.sin(torch.arange(VOCAB)[chunk.packed.targets].float())  # a deterministic "old policy" and reference
            chunk.old_logp = current + 0.3 * wave
            if row.kl_coef > 0:
                chunk.ref_logp = current - 0.2 * wave
        return len(chunks), gradients_of(u, [micro_batch(c, row) for c in chunks])

    one, whole = run(10_000)
    many, cut = run(30)
    assert one == 1
    assert many >= 3
    assert whole[1].norm() > 1e-4
    assert_same(cut, whole)


def test_groups_without_advantage_are_not_forwarded_and_still_count():
    u, data = updater(), rollout()
    row = resolve("dr_grpo")
    for sample in data.samples[1]:
        sample.rewards["r"] = 0.5
    advantages = group_advantages(data, row, {"r": 1.0})
    chunks = build_chunks(data, advantages, row, budget=8, max_tokens=10_000)
    forwarded = sum(c.packed.num_sequences for c in chunks)
    assert forwarded == len(data.flat) - len(data.samples[1])
    with_kl = build_chunks(data, advantages, resolve("dr_grpo", kl_coef=0.1), budget=8, max_tokens=10_000)
    assert sum(c.packed.num_sequences for c in with_kl) == len(data.flat)
    dropped = gradients_of(u, [micro_batch(c, row) for c in chunks])
    kept = gradients_of(u, [micro_batch(c, row) for c in with_kl])  # no ref_logp set: the KL term is absent, groups are not
    assert_same(dropped, kept)


def test_bf16_step_moves_every_master_and_matches_fp32():
    low, high = updater(dtype=torch.bfloat16), updater()
    high.model.load_state_dict({k: v.float() for k, v in low.model.state_dict().items()})
    segments = conversations()
    low.update(micro_batches(segments, 10_000))
    high.update(micro_batches(segments, 10_000))
    moved = 0.0
    for p, q in zip(low.model.parameters(), high.model.parameters(), strict=True):
        state = low.optimizer.state[p]
        moved += float((state["tail"] != 0).float().mean()) / len(low.gradients.parameters)
        torch.testing.assert_close(p.float(), q.detach(), atol=4e-3, rtol=1e-2)
    assert moved > 0.5, "updates far below bf16's resolution live on in the tail"


def test_update_skips_what_is_not_finite_and_stops_at_the_third():
    u, segments = updater(), conversations()
    before = [p.detach().clone() for p in u.model.parameters()]
    with torch.no_grad():
        u.model.lm_head.weight[3, 3] = float("nan")
    result = u.update(micro_batches(segments, 10_000))
    assert not result.applied
    assert torch.equal(before[0], next(u.model.parameters()))
    u.update(micro_batches(segments, 10_000))
    with pytest.raises(FloatingPointError, match="three steps in a row"):
        u.update(micro_batches(segments, 10_000))
