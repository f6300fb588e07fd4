"""Loss and gradients do not depend on how a batch is cut into micro-batches, for SFT and for GRPO and its kin."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.algorithms import ALGORITHMS, Algorithm, resolve
from fastalign.models.attention import use_fastalign_attention
from fastalign.ops.backend import load_native, use_backend
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
    greedy = [Sample([1], [-1.0], [-1.0], rewards={"r": 0.4}) for _ in prompts]
    return Rollout(prompts, samples, [{} for _ in prompts], greedy)


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


def off_policy_chunks(u: Updater, data: Rollout, row: Algorithm, max_tokens: int):
    """Micro-batches whose old policy, sampler and reference are deterministic waves around the current one."""
    chunks = build_chunks(data, group_advantages(data, row, {"r": 1.0}), row, budget=8, max_tokens=max_tokens)
    for chunk in chunks:
        current = score(u.model, chunk.packed)
        wave = torch.sin(torch.arange(VOCAB)[chunk.packed.targets].float())
        chunk.old_logp = current + 0.3 * wave
        chunk.sampler_logp = current - 0.4 * wave
        if row.kl_coef > 0:
            chunk.ref_logp = current - 0.2 * wave
    return chunks


OTHER_ROWS = [
    resolve("grpo", loss="gspo_token", loss_options={"epsilon": 0.05, "epsilon_high": 0.05}),
    resolve("grpo", loss="sapo"),
    resolve("grpo", loss="gmpo", loss_options={"epsilon": 0.2}),
    resolve("dapo", loss="raft"),
    resolve("dapo", loss="raft_pp"),
    resolve("rloo", loss="self_imitation"),
    replace(
        resolve("dr_grpo"), entropy_coef=0.01, correction_options={"correction": "mask", "correction_low": 0.8, "correction_high": 1.5}
    ),
    replace(resolve("gspo"), kl_coef=0.1, kl="k2", correction_options={"correction": "sequence_truncate"}),
    replace(resolve("cispo"), kl_coef=0.1, kl="k1", correction_options={"correction": "truncate", "correction_high": 1.1}),
]
EVERY_ROW = [*(resolve(name) for name in ALGORITHMS), *OTHER_ROWS]


@pytest.mark.parametrize("row", EVERY_ROW, ids=[f"{i}-{row.loss}" for i, row in enumerate(EVERY_ROW)])
def test_policy_kernel_and_equations_agree_in_the_trainer(row):
    """Loss, gradients and every metric of the online objective: the native op against the torch functions."""
    if load_native()[0] is None:
        pytest.skip("the native module is not built")
    u, found = updater(), []
    (chunk,) = off_policy_chunks(u, rollout(), row, 10_000)
    logp = score(u.model, chunk.packed)
    for side in ("native", "reference"):
        leaf, entropy = logp.clone().requires_grad_(), (0.5 - logp).requires_grad_()
        with use_backend(side):
            loss, sums = micro_batch(chunk, row).objective(leaf, entropy, slice(0, len(leaf)))
        loss.backward()
        found.append((loss.detach(), leaf.grad, entropy.grad, sums))
    (loss, grad, d_entropy, sums), (loss_, grad_, d_entropy_, sums_) = found
    assert grad_.norm() > 1e-4
    assert abs(loss - loss_) <= 1e-6 * max(1.0, abs(loss_))
    assert (grad - grad_).norm() <= 1e-6 * grad_.norm()
    assert (d_entropy is None) == (d_entropy_ is None) == (row.entropy_coef == 0)
    assert d_entropy is None or (d_entropy - d_entropy_).norm() <= 1e-6 * d_entropy_.norm()
    assert sums.keys() == sums_.keys()
    for name in sums:
        assert abs(float(sums[name] - sums_[name])) <= 1e-6 * max(1.0, abs(float(sums_[name]))), name


@pytest.mark.parametrize("row", EVERY_ROW, ids=[f"{i}-{row.loss}" for i, row in enumerate(EVERY_ROW)])
def test_policy_is_invariant_to_micro_batches(row):
    u, data = updater(), rollout()

    def run(max_tokens: int):
        chunks = off_policy_chunks(u, data, row, max_tokens)
        return len(chunks), gradients_of(u, [micro_batch(c, row) for c in chunks])

    one, whole = run(10_000)
    many, cut = run(12)
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


@pytest.mark.parametrize("loss", ["raft", "raft_pp", "self_imitation", "clip"])
def test_samples_without_a_gradient_are_not_forwarded(loss):
    u, data = updater(), rollout()
    row = resolve("dr_grpo", loss=loss)
    advantages = group_advantages(data, row, {"r": 1.0})
    advantages[1] = 0.0
    chunks = build_chunks(data, advantages, row, budget=8, max_tokens=10_000)
    reads = advantages != 0 if loss == "clip" else advantages > 0
    assert sum(c.packed.num_sequences for c in chunks) == int(reads.sum()) < len(advantages)
    everything = build_chunks(data, advantages, replace(row, kl_coef=0.1), budget=8, max_tokens=10_000)  # no ref_logp: no KL term
    assert sum(c.packed.num_sequences for c in everything) == len(advantages)
    assert_same(gradients_of(u, [micro_batch(c, row) for c in chunks]), gradients_of(u, [micro_batch(c, row) for c in everything]))


def test_an_entropy_bonus_keeps_every_sample():
    data, row = rollout(), replace(resolve("dr_grpo"), entropy_coef=0.01)
    chunks = build_chunks(data, torch.zeros(len(data.flat)), row, budget=8, max_tokens=10_000)
    assert sum(c.packed.num_sequences for c in chunks) == len(data.flat)
    assert build_chunks(data, torch.zeros(len(data.flat)), resolve("dr_grpo"), budget=8, max_tokens=10_000) == []


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
