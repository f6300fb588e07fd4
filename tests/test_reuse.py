"""The rollout's forward pass as the update's: the same weights to the bit as when it is computed again, and never another one's."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from online_runs import built, online_arguments, write_task
from preference_runs import rows_of
from safetensors.torch import load_file
from tiny_models import llama, prompts_of, qwen2, ready

import fastalign as fa
from fastalign.algorithms import resolve
from fastalign.generation.recorder import Recorder
from fastalign.models import decoder_run, recorded
from fastalign.models.backbone import causal_lm, head_of, hidden_states
from fastalign.models.linear import RowLinear, recording_of
from fastalign.models.recorded import Recording, Replay
from fastalign.ops.backend import native, use_backend
from fastalign.ops.linear_loss import linear_loss
from fastalign.packing import Segment, one_sequence, pack, sequences
from fastalign.recipes import online, ppo
from fastalign.recipes.policy import build_chunks
from fastalign.recipes.reuse import ForwardReuse

pytestmark = pytest.mark.skipif(native() is None, reason="bitwise parity needs the native attention")

REWARDS = "def odd(prompts, completions, **columns):\n    return [float(len(c) % 2) for c in completions]\n"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("reuse"), REWARDS)


def trained(task, output, reuse, changes=None):
    """Weights and metrics of a run of four steps."""
    sections = {name: dict(values) for name, values in (changes or {}).items()}
    sections.setdefault("online", {}).update(reuse_forward=reuse, reward=[f"{task / 'reward.py'}:odd"])
    recipe, command = (ppo, "ppo") if sections["online"].get("algorithm") == "ppo" else (online, "grpo")
    recipe.run(online_arguments(task, output, sections, command=command))
    rows = [row for row in rows_of(output) if "forward_reused" in row]
    (weights,) = [file for file in output.iterdir() if file.name in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(weights), rows


RUNS = {
    "grpo": {},
    "grpo with a reference": {"online": {"beta": 0.04}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "two passes": {"online": {"num_iterations": 2}},
    "many micro-batches": {"batch": {"max_tokens_per_micro_batch": 40}},
    "dapo": {"online": {"algorithm": "dapo"}},
    "gspo": {"online": {"algorithm": "gspo"}},
    "ppo": {"online": {"algorithm": "ppo"}},
    "prime": {"online": {"algorithm": "prime"}},
    "nash_md": {"online": {"algorithm": "nash_md"}},
    "raft_pp": {"online": {"algorithm": "raft_pp"}},
    "remax": {"online": {"algorithm": "remax"}},
    "truncated": {"sampling": {"top_k": 9, "temperature": 0.8}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "checkpointing in bfloat16": {"model": {"gradient_checkpointing": True, "dtype": "bfloat16"}},
    "lora": {"model": {"use_peft": True}},
    "a small cache": {"sampling": {"kv_cache_tokens": 64, "max_num_seqs": 3}},
}


LONG = ("gspo", "raft_pp", "remax", "checkpointing in bfloat16")  # each a mixture of what the others cover


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in RUNS])
def test_weights_are_those_of_a_forward_pass_of_its_own(task, tmp_path, name):
    weights, rows = trained(task, tmp_path / "reused", True, RUNS[name])
    again, plain = trained(task, tmp_path / "again", False, RUNS[name])
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    told = [row["forward_reused"] for row in rows if row["frac_reward_zero_std"] < 1]
    assert told
    least = 0.5 if name == "lora" else 0.9  # what the adapter multiplies is computed
    assert all(least < share <= 1 for share in told), told
    assert all(row["forward_reused"] in (0, None) or math.isnan(row["forward_reused"]) for row in plain)
    for ours, theirs in zip(rows, plain, strict=True):
        assert [ours[key] for key in ("loss", "grad_norm", "reward")] == [theirs[key] for key in ("loss", "grad_norm", "reward")]


def recorded_rollout(model, *, max_bytes=1 << 30, num_rows=4096, seed=0, n=4, new=11, **options):
    recording = recording_of(causal_lm(model), num_rows, max_bytes)
    engine = fa.Engine(model, **options)
    lengths = [random.Random(seed + i).randint(1, 30) for i in range(5)]
    with engine.recording(recording):
        params = fa.SamplingParams(n=n, max_tokens=new, seed=seed, temperature=0.9)
        rollout = engine.rollout([ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in prompts_of(*lengths)], params)
    return rollout, recording, engine


def chunk_of(rollout):
    (chunk,) = build_chunks(rollout, torch.ones(len(rollout.flat)), resolve("grpo"), budget=16, max_tokens=1 << 20)
    return chunk


def assert_replays(model, rollout, recording, *, known=None):
    """Hidden rows, logits and gradients with and without the recording, to the bit."""
    chunk, head = chunk_of(rollout), head_of(model)
    assert len(chunk.recorded) == chunk.packed.num_tokens
    share = float((chunk.recorded >= 0).double().mean())
    assert share > 0.8 if known is None else known(share), share

    def run(replay):
        model.zero_grad()
        if replay is None:
            hidden, options = hidden_states(model, chunk.packed), {}
        else:
            with replay.active():
                hidden = hidden_states(model, chunk.packed)
            options = {"known_logits": replay.logits(chunk.packed.rows, hidden.shape[1])}
        scored = hidden.index_select(0, chunk.packed.rows)
        loss, found = linear_loss(scored, head.weight, chunk.packed.targets, lambda logp, span: (-logp * logp).sum(), **options)
        loss.backward()
        return hidden.detach(), loss.detach(), found, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    replay = Replay(recording, chunk.recorded)
    mine, theirs = run(replay), run(None)
    assert replay.saved > 0
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
    assert torch.equal(mine[2]["logp"], theirs[2]["logp"])
    assert len(mine[3]) == len(theirs[3]) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine[3], theirs[3], strict=True))
    return mine[2]["flops_tvh"], theirs[2]["flops_tvh"]


SCHEDULES = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "preempted": {"kv_cache_tokens": 90, "block_size": 3, "max_num_seqs": 8},
    "small blocks": {"block_size": 1},
    "no prefix cache": {"prefix_caching": False, "block_size": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [llama, qwen2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_replay_has_the_bits_of_the_forward_pass(name, build, dtype):
    model = ready(build().to(dtype))
    rollout, recording, engine = recorded_rollout(model, **SCHEDULES[name])
    assert name != "preempted" or engine.stats.preemptions > 0
    known, computed = assert_replays(model, rollout, recording)
    assert (known, computed) == (4.0, 6.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_run_op_by_op_record_the_same(monkeypatch, dtype):
    model = ready(qwen2().to(dtype))
    monkeypatch.setattr(decoder_run, "_in_one_call", decoder_run._one_by_one)
    assert_replays(model, *recorded_rollout(model)[:2])


def test_torch_alone_agrees_to_rounding(task, tmp_path):
    """Where rows of a product depend on how many there are, and the logits lie in a buffer that the next step writes."""
    with use_backend("reference"):
        weights, rows = trained(task, tmp_path / "reused", True)
        again, _ = trained(task, tmp_path / "again", False)
    assert all(row["forward_reused"] > 0.9 for row in rows)
    for key, value in weights.items():
        torch.testing.assert_close(value, again[key], atol=2e-3, rtol=1e-3)  # Adam's first steps have the gradient's sign


def test_every_token_but_the_last_has_a_row():
    model = ready(llama())
    rollout, _, _ = recorded_rollout(model)
    for prompt, samples in zip(rollout.prompts, rollout.samples, strict=True):
        for sample in samples:
            assert len(sample.recorded) == len(prompt) + len(sample.ids) - 1
            assert (sample.recorded >= 0).all()
            assert (sample.recorded[: len(prompt)] == samples[0].recorded[: len(prompt)]).all(), "the prompt was forwarded once"


def test_torch_alone_checkpoints_bfloat16(task, tmp_path):
    """Where a layer has no product of ours, its forward in the backward pass is torch's, and so must the first have been."""
    with use_backend("reference"):
        _, rows = trained(task, tmp_path, True, RUNS["checkpointing in bfloat16"])
    assert len(rows) == 4


def test_rows_beyond_the_memory_are_computed():
    model = ready(llama())
    whole = recorded_rollout(model)[1]
    bound = whole._bytes // 3
    rollout, recording, _ = recorded_rollout(model, max_bytes=bound)
    assert recording._bytes <= bound
    known, _ = assert_replays(model, rollout, recording, known=lambda share: 0 < share < 0.8)
    assert 4 < known <= 6
    rollout, recording, _ = recorded_rollout(model, max_bytes=0)
    assert all((sample.recorded < 0).all() for sample in rollout.flat)
    assert chunk_of(rollout).recorded is None


def test_without_the_memory_everything_is_computed(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(recorded, "_reserved", refuse)
    rollout, _, _ = recorded_rollout(ready(llama()))
    assert all((sample.recorded < 0).all() for sample in rollout.flat)
    assert caplog.text.count("is not kept, and is computed again") == 1
    assert "can't allocate memory" in caplog.text
    assert chunk_of(rollout).recorded is None


def test_a_second_rollout_may_find_prefixes_that_were_not_recorded():
    """Blocks that an earlier call computed have no row in this recording."""
    model = ready(llama())
    engine = fa.Engine(model, block_size=4)
    (prompt,) = (list(map(int, ids)) for ids in prompts_of(23))
    params = fa.SamplingParams(n=3, max_tokens=7, seed=1, ignore_eos=True)
    engine.rollout([prompt], params)
    recording = recording_of(model, 1000, 1 << 30)
    with engine.recording(recording):
        rollout = engine.rollout([prompt], params)
    assert engine.stats.cached_tokens >= 20
    assert (rollout.flat[0].recorded[:20] < 0).all()
    assert (rollout.flat[0].recorded[23:] >= 0).all()
    assert_replays(model, rollout, recording, known=lambda share: 0.3 < share < 0.9)


def test_two_calls_add_to_one_recording():
    model = ready(llama())
    recording, engine = recording_of(model, 1000, 1 << 30), fa.Engine(model)
    rollouts = []
    for seed in (0, 1):
        with engine.recording(recording):
            rollouts.append(engine.rollout([[5 + seed, 6, 7]], fa.SamplingParams(n=2, max_tokens=5, seed=seed, ignore_eos=True)))
    first, second = ({int(row) for s in r.flat for row in s.recorded} for r in rollouts)
    assert not first & second
    for rollout in rollouts:
        assert_replays(model, rollout, recording)


def test_new_weights_in_the_middle_discard_what_was_recorded():
    model = ready(llama())
    recording, engine = recording_of(model, 1000, 1 << 30), fa.Engine(model)
    with engine.recording(recording):
        request = engine.add_request([5, 6, 7], fa.SamplingParams(n=2, max_tokens=9, seed=0, ignore_eos=True))
        for _ in range(4):
            engine.step()
        with engine.updating_weights(), torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        while engine.has_work:
            engine.step()
    assert request.finished
    assert all(recording.outputs(layer) is None for layer in model.modules() if isinstance(layer, RowLinear))
    assert recording.logits([0, 1], torch.float32, torch.empty(2, 131)) is None


def test_a_recording_that_is_not_of_these_weights_is_told_and_not_used(task, tmp_path, caplog):
    args = online_arguments(task, tmp_path / "run", {"online": {"reward": [f"{task / 'reward.py'}:odd"]}})
    made = built(args)
    try:
        sample = made.sampler

        class Shifted:
            weights = sample.weights

            def __call__(self, *given, **named):
                rollout = sample(*given, **named)
                causal_lm(made.engine.model).model.layers[0].mlp.down_proj.weight.data.mul_(1.5)  # behind everybody's back
                return rollout

        made.sampler = Shifted()
        with caplog.at_level("WARNING"):
            row = made.step(0)
        assert row["forward_reused"] == 0
        assert row["sampling/sampling_logp_difference/max"] > 1e-5
        assert "--reuse_forward false" in caplog.text
        assert made.state_dict()["reuses_forward"] is False
        made.sampler = sample
        assert made.step(1)["forward_reused"] == 0
    finally:
        made.close()


@pytest.mark.parametrize("what", ["rows", "outputs", "logits"])
def test_a_recording_that_does_not_fit_its_completion_is_noticed(task, tmp_path, monkeypatch, caplog, what):
    """Its log-probs are the sampler's all the same."""
    if what == "rows":
        of = Recorder.of
        monkeypatch.setattr(Recorder, "of", lambda self, blocks, count: of(self, blocks, count)[::-1].copy())
    elif what == "outputs":
        room = Recording.room
        monkeypatch.setattr(Recording, "room", lambda self, layer, *given: room(self, layer, *given) if layer.bias is None else None)
        outputs = Recording.outputs
        monkeypatch.setattr(Recording, "outputs", lambda self, layer: None if (found := outputs(self, layer)) is None else found * 1.01)
    else:
        keep = Recording.keep_logits
        monkeypatch.setattr(Recording, "keep_logits", lambda self, rows, logits: keep(self, rows, logits + 0.01))
    made = built(online_arguments(task, tmp_path / "run", {"online": {"reward": [f"{task / 'reward.py'}:odd"]}}))
    try:
        with caplog.at_level("WARNING"):
            row = made.step(0)
    finally:
        made.close()
    assert row["forward_reused"] == 0
    assert "of their outputs" in caplog.text


def test_a_layer_that_is_called_twice_is_noticed():
    model = ready(llama())
    model.model.layers[1].mlp = model.model.layers[0].mlp
    rollout, recording, engine = recorded_rollout(model)
    reuse = ForwardReuse(engine)
    reuse._recording = recording
    chunk = chunk_of(rollout)
    assert reuse.take(model, [chunk], temperature=0.9, key=0) is None
    assert not reuse.works


def test_a_critic_that_warms_up_alone_records_nothing(task, tmp_path, monkeypatch):
    recorded = []
    recording = ForwardReuse.recording
    monkeypatch.setattr(ForwardReuse, "recording", lambda self, tokens: recorded.append(tokens) or recording(self, tokens))
    _, rows = trained(task, tmp_path, True, {"online": {"algorithm": "ppo"}, "ppo": {"critic_warmup": 2}})
    assert len(recorded) == 2
    assert [row["forward_reused"] for row in rows if math.isfinite(row.get("forward_reused") or math.nan)] == [1, 1]


def test_live_requests_that_outlive_a_recording_go_on_without_it():
    model = ready(llama())
    recording, engine = recording_of(model, 1000, 1 << 30), fa.Engine(model)
    with engine.recording(recording):
        request = engine.add_request([5, 6, 7], fa.SamplingParams(max_tokens=9, seed=0, ignore_eos=True))
        engine.step()
    rows = recording._rows
    while engine.has_work:
        engine.step()
    assert request.finished
    assert recording._rows == rows == 3


def test_samples_are_compared_by_what_was_sampled():
    rollout, _, _ = recorded_rollout(ready(llama()))
    one = rollout.flat[0]
    assert one == dataclasses.replace(one, recorded=None)
    assert one in rollout.flat


def test_engines_that_cannot_record_say_so():
    model = ready(llama())
    recording = recording_of(model, 100, 1 << 20)
    quantized = fa.Engine(model, quantization="int8")
    assert not quantized.records
    with pytest.raises(RuntimeError, match="quantized"), quantized.recording(recording):
        pass
    busy = fa.Engine(model)
    busy.add_request([5, 6], fa.SamplingParams(max_tokens=3))
    with pytest.raises(RuntimeError, match="at work"), busy.recording(recording):
        pass
    assert not ForwardReuse(quantized).works


def test_a_recording_is_given_back_as_it_is_read():
    model = ready(llama())
    rollout, recording, _ = recorded_rollout(model)
    chunk = chunk_of(rollout)
    with Replay(recording, chunk.recorded, last=True).active():
        hidden_states(model, chunk.packed)
    assert not recording._outputs


def test_other_passes_are_left_alone():
    """Without a gradient, over other rows, outside: layers compute."""
    model = ready(llama())
    rollout, recording, _ = recorded_rollout(model)
    chunk, other = chunk_of(rollout), pack(Segment([5, 6, 7, 8]))
    expected = hidden_states(model, other)
    with Replay(recording, chunk.recorded).active():
        assert torch.equal(hidden_states(model, other), expected)
        with torch.no_grad():
            hidden_states(model, chunk.packed)
    assert len(recording._outputs) == 14


def test_known_logits_are_asked_by_span_and_may_be_missing():
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(23, 8, requires_grad=True)
    targets = torch.randint(0, 23, (40,))

    def objective(logp, span):
        return (logp.exp() * torch.arange(span.start + 1, span.stop + 1)).sum()

    def run(known):
        hidden.grad = weight.grad = None
        loss, found = linear_loss(hidden, weight, targets, objective, known_logits=known, max_chunk_bytes=16 * 23 * 4)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad, found["flops_tvh"]

    asked = []

    def known(span, dtype, out):
        asked.append((span.start, span.stop, dtype))
        if span.start >= 20:
            return None
        out[:] = hidden[span].detach() @ weight.detach().t()
        out[3:5] = torch.nan
        return torch.tensor([3, 4])

    mine, theirs = run(known), run(None)
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a, b)
    assert theirs[3] == 6
    assert 4 < mine[3] < 6
    assert (asked[0][0], asked[-1][1]) == (0, 40)
    assert {dtype for _, _, dtype in asked} == {torch.float32}


def test_one_sequence_of_a_tree():
    forks = Segment([3, 4], True, (Segment([5], True), Segment([], False)))
    tree = Segment([1, 2], False, (forks, Segment([6, 7, 8], [True, False, True])))
    packed = pack([tree, Segment([9, 10], True)])
    for b, ids in enumerate(sequences(packed)):
        one = one_sequence(packed, b)
        assert one.input_ids.tolist() == ids
        assert one.position_ids.tolist() == list(range(len(ids)))
        own = slice(*packed.cu_targets[b : b + 2].tolist())
        assert one.targets.tolist() == packed.targets[own].tolist()
        assert one.input_ids[one.rows + 1].tolist() == one.targets.tolist()
    assert one_sequence(packed, 0).num_targets == 3
    assert one_sequence(packed, 1).num_targets == 0
