"""Turns with an environment: ids and masks are exact, log-probs are the trainer's, nothing depends on the schedule, failures stay alone."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from test_dialects import QWEN, tokenizer_of
from tiny_models import llama, ready, scored, values

from fastalign.algorithms import resolve
from fastalign.data import Prompt
from fastalign.environments import Kind, MultiTurn
from fastalign.environments.conversation import turn_text
from fastalign.generation import CompletionOutput, Engine, SamplingParams
from fastalign.ops.backend import native
from fastalign.packing import pack
from fastalign.recipes import arithmetic
from fastalign.recipes.policy import build_chunks
from fastalign.recipes.rollout_metrics import group_metrics, turn_metrics

TOKENIZER = arithmetic.build_tokenizer()
PARAMS = SamplingParams(n=3, max_tokens=40, seed=5)
HEARD: list[tuple[int, str]] = []


class Echo:
    """Ends a turn at "+", answers with how long it was, and is done after a turn with an even number of characters."""

    stop = ("+",)
    delay = 0.0

    def reset(self, seed, answer="7"):
        self.seed, self.answer = seed, answer
        self.draw = random.Random(seed)

    def step(self, text):
        if self.delay:
            time.sleep(self.draw.random() * self.delay)
        HEARD.append((self.seed, text))
        return f"{self.answer}{len(text)}=", 0.25, len(text) % 4 == 0


def kind_of(make, **changes) -> Kind:
    return replace(Kind("echo", make, frozenset({"seed", "answer", "level"}), (), stop=("+",), immediate=True), **changes)


def prompts_of(*texts, **columns) -> list[Prompt]:
    return [Prompt(TOKENIZER(text).input_ids, text, dict(columns), i) for i, text in enumerate(texts)]


PROMPTS = prompts_of("12+34=", "7+7=", "90+9999999999999=", answer="8")


@pytest.fixture(scope="module")
def model():
    return ready(llama(vocab_size=len(TOKENIZER)))


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def turns_of(sample):
    """(ids, scored) of each run of equal flags."""
    runs = []
    for token, flag in zip(sample.ids, sample.scored, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return runs


def test_turns_are_extended_by_ids_and_answers_are_not_scored(model):
    HEARD.clear()
    rollout = MultiTurn(kind_of(Echo), max_turns=4)(Engine(model, TOKENIZER), PROMPTS, PARAMS)
    assert rollout.prompts == [prompt.ids for prompt in PROMPTS]
    assert max(sample.turns for sample in rollout.flat) >= 3
    heard = {}
    for seed, text in HEARD:
        heard.setdefault(seed, []).append(text)
    said = []
    for sample in rollout.flat:
        runs = turns_of(sample)
        assert [flag for _, flag in runs] == [True, False] * (sample.turns - 1) + [True]
        turns = [text_of(ids) for ids, flag in runs if flag]
        said.append(turns)
        for i, (ids, flag) in enumerate(runs):
            if not flag:
                assert ids == TOKENIZER(f"8{len(turns[i // 2])}=", add_special_tokens=False).input_ids
        assert all(turn.endswith("+") or runs[2 * i][0][-1] == 2 for i, turn in enumerate(turns[:-1]))
        assert len(sample.ids) == len(sample.logprobs) == len(sample.raw_logprobs) == len(sample.weight_versions) <= PARAMS.max_tokens
        assert sample.num_scored == sum(len(ids) for ids, flag in runs if flag)
        assert sample.rewards == {"environment/echo": 0.25 * sample.turns}
        assert sample.text == text_of(sample.ids)
        done = len(turns[-1]) % 4 == 0
        assert sample.finish_reason == ("length" if not done or len(sample.ids) == PARAMS.max_tokens else "stop")
        assert done or sample.turns == 4 or len(sample.ids) + 5 >= PARAMS.max_tokens
    assert sorted(said) == sorted(heard.values())


def test_log_probs_are_the_models_own_and_the_trainer_reads_no_other(model):
    params = replace(PARAMS, temperature=0.7, top_p=0.9)
    rollout = MultiTurn(kind_of(Echo), max_turns=4)(Engine(model, TOKENIZER), PROMPTS, params)
    packed = pack(rollout.trees())
    assert packed.targets.tolist() == [t for s in rollout.flat for t, flag in zip(s.ids, s.scored, strict=True) if flag]
    flags = [flag for sample in rollout.flat for flag in sample.scored]
    raw = torch.tensor([v for sample in rollout.flat for v in sample.raw_logprobs])[torch.tensor(flags)]
    assert sum(flags) < len(flags)
    assert torch.equal(raw, scored(model, rollout, 1.0)) if native() else torch.allclose(raw, scored(model, rollout, 1.0), atol=1e-5)
    for sample in rollout.flat:  # what stands for an answer's tokens is read by nobody
        for i, flag in enumerate(sample.scored):
            if not flag:
                sample.logprobs[i] = sample.raw_logprobs[i] = sample.kept_mass[i] = math.nan
    chunks = build_chunks(rollout, torch.ones(len(rollout.flat)), resolve("grpo"), budget=40, max_tokens=10_000)
    sampler = torch.cat([chunk.sampler_logp for chunk in chunks])
    assert (sampler - scored(model, rollout, 0.7)).abs().max() < 1e-4
    lengths = torch.tensor([sample.num_scored for sample in rollout.flat])
    expected = torch.repeat_interleave(1 / (len(lengths) * lengths), lengths)  # every sequence counts the same, by what it wrote
    assert torch.allclose(torch.cat([chunk.weights for chunk in chunks]), expected)


SCHEDULES = {
    "blocks of 4": {"block_size": 4},
    "one at a time": {"max_num_seqs": 1},
    "chunks": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "preempted": {"block_size": 4, "kv_cache_tokens": 96},
    "no prefix cache": {"prefix_caching": False},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples_do_not_depend_on_the_schedule(model, schedule):
    sampler = MultiTurn(kind_of(Echo), max_turns=4)
    expected = sampler(Engine(model, TOKENIZER), PROMPTS, PARAMS, [3, 4, 5])
    engine = Engine(model, TOKENIZER, **SCHEDULES[schedule])
    found = sampler(engine, PROMPTS, PARAMS, [3, 4, 5])
    assert values(found) == values(expected)
    assert [s.scored for s in found.flat] == [s.scored for s in expected.flat]
    assert engine.num_used_blocks == 0
    one = sampler(engine, PROMPTS[1:2], PARAMS, [4])
    assert values(one) == values(expected)[1:2]


def test_samples_do_not_depend_on_how_fast_the_environment_answers(model, monkeypatch):
    expected = MultiTurn(kind_of(Echo), max_turns=4)(Engine(model, TOKENIZER), PROMPTS, PARAMS)
    monkeypatch.setattr(Echo, "delay", 0.03)
    found = MultiTurn(kind_of(Echo, immediate=False), max_turns=4)(Engine(model, TOKENIZER), PROMPTS, PARAMS)
    assert values(found) == values(expected)
    assert [s.rewards for s in found.flat] == [s.rewards for s in expected.flat]


def test_a_turn_draws_with_keys_of_its_own_place(model):
    """The second turn is what a fresh engine draws behind the same ids with the same request, sample and position."""
    rollout = MultiTurn(kind_of(Echo), max_turns=4)(Engine(model, TOKENIZER), PROMPTS[:1], PARAMS, [9])
    checked = 0
    for j, sample in enumerate(rollout.flat):
        runs = turns_of(sample)
        for turn in range(1, sample.turns):
            before = [token for ids, _ in runs[: 2 * turn] for token in ids]
            engine = Engine(model, TOKENIZER)
            params = replace(PARAMS, n=1, stop=("+",), max_tokens=PARAMS.max_tokens - len(before))
            request = engine.add_request([*PROMPTS[0].ids, *before], params, request_id=9, sample=j)
            while engine.has_work:
                engine.step()
            assert request.output().outputs[0].token_ids == runs[2 * turn][0]
            checked += 1
    assert checked >= 3
    assert len({tuple(sample.ids) for sample in rollout.flat}) == PARAMS.n


def test_the_next_turn_is_computed_from_where_the_last_one_ended(model):
    engine, cold = (Engine(model, TOKENIZER, block_size=4, prefix_caching=warm) for warm in (True, False))
    rollout, _ = (MultiTurn(kind_of(Echo), max_turns=6)(e, PROMPTS, PARAMS) for e in (engine, cold))
    prompt = sum(len(p) for p in rollout.prompts)
    expected = 0
    for ids, sample in zip([p for p in rollout.prompts for _ in range(PARAMS.n)], rollout.flat, strict=True):
        runs, length = turns_of(sample), len(ids)
        for said, answer in zip(runs[:-1:2], runs[1::2], strict=True):
            computed = length + len(said[0]) - 1  # the last token drawn has not been forwarded yet
            length += len(said[0]) + len(answer[0])
            expected += length - computed // 4 * 4
    assert engine.stats.prompt_tokens - prompt == expected
    assert engine.stats.cached_tokens > 2 * expected
    assert cold.stats.prompt_tokens - prompt == expected + engine.stats.cached_tokens


class Trouble(Echo):
    """Raises, hangs or answers nonsense for some prompts."""

    def reset(self, prompt, answer="7"):
        if prompt == "1+1=":
            raise RuntimeError("no room")
        self.prompt, self.answer, self.delay = prompt, answer, 0.0

    def step(self, text):
        if self.prompt == "2+2=":
            raise KeyError(text)
        if self.prompt == "3+3=":
            time.sleep(60)
        if self.prompt == "4+4=":
            return "just text"
        if self.prompt == "5+5=":
            return 5, 1.0, False
        return None, None, True


def test_an_environment_that_fails_costs_its_own_samples_and_is_named(model, caplog):
    kind = kind_of(Trouble, columns=frozenset({"prompt"}), immediate=False)
    prompts = prompts_of(*(f"{i}+{i}=" for i in range(1, 7)))
    began = time.monotonic()
    engine = Engine(model, TOKENIZER)
    rollout = MultiTurn(kind, max_turns=4, timeout=1.0)(engine, prompts, PARAMS)
    assert time.monotonic() - began < 30
    for group in rollout.samples[:5]:
        assert all(sample.finish_reason == "abort" and math.isnan(sample.rewards["environment/echo"]) for sample in group)
    assert [sample.rewards["environment/echo"] for sample in rollout.samples[5]] == [0.0] * 3
    assert all(not sample.ids for sample in rollout.samples[0])
    assert all(sample.ids for group in rollout.samples[1:] for sample in group)
    for i, message in enumerate(("RuntimeError: no room", "KeyError", "no answer within 1 s", "just text", "as text, got int"), 1):
        assert any(message in record.message and f"{i}+{i}=" in record.message for record in caplog.records), message
    assert engine.num_used_blocks == 0
    assert turn_metrics(rollout.flat)["tool_calls/failed"] == 15
    pack(rollout.trees())
    assert group_metrics(rollout, {"environment/echo": 1.0})["completions/min_length"] == 0


def test_an_error_of_the_engine_ends_the_call_and_frees_everything(model):
    def broken(ids, logits):
        return logits + math.nan if ids.shape[1] > 12 else logits

    engine = Engine(model, TOKENIZER)
    with pytest.raises(FloatingPointError):
        MultiTurn(kind_of(Echo), max_turns=4)(engine, PROMPTS, replace(PARAMS, logits_processors=[broken]))
    assert engine.num_used_blocks == 0
    assert not engine.has_work
    assert values(MultiTurn(kind_of(Echo))(engine, PROMPTS, PARAMS)) == values(
        MultiTurn(kind_of(Echo))(Engine(model, TOKENIZER), PROMPTS, PARAMS)
    )


class Opening(Echo):
    """A first observation: the same for a prompt's samples, or one of its own for each."""

    def reset(self, seed, level):
        self.seed, self.answer = seed, "7"
        return "1" if level == "same" else f"1{seed % 10}"


def test_a_first_observation_is_part_of_the_prompt_as_far_as_it_is_shared(model):
    sampler = MultiTurn(kind_of(Opening), max_turns=3)
    (same,), (own,) = (prompts_of("5+5=", level=level) for level in ("same", "own"))
    engine = Engine(model, TOKENIZER)
    rollout = sampler(engine, [same, own], PARAMS)
    opening = TOKENIZER("1", add_special_tokens=False).input_ids
    assert rollout.prompts[0] == [*same.ids, *opening]
    assert engine.stats.prompt_tokens >= 6
    assert all(sample.scored[0] for sample in rollout.samples[0])
    assert rollout.prompts[1] == [*own.ids, *opening]
    assert len({sample.ids[0] for sample in rollout.samples[1]}) > 1
    assert not any(sample.scored[0] for sample in rollout.samples[1])
    logp = torch.tensor([v for s in rollout.flat for v, flag in zip(s.logprobs, s.scored, strict=True) if flag])
    assert torch.allclose(logp, scored(model, rollout, 1.0), atol=1e-5)
    again = sampler(Engine(model, TOKENIZER), [same, own], PARAMS)
    assert [s.ids for s in again.flat] == [s.ids for s in rollout.flat]


def test_a_conversation_goes_on_through_the_chat_template():
    tokenizer = tokenizer_of(QWEN)
    model = ready(llama(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>")))
    messages = [{"role": "user", "content": "What is 12*7?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    class Tool:
        def reset(self):
            pass

        def step(self, text):
            return "84", None, False

    kind = Kind("tool", Tool, frozenset(), (), immediate=True, gives_reward=False)
    prompt = Prompt(ids, messages, {}, 0)
    rollout = MultiTurn(kind, max_turns=2)(Engine(model, tokenizer), [prompt], SamplingParams(n=8, max_tokens=400, seed=1))
    eos, seen = tokenizer.convert_tokens_to_ids("<|im_end|>"), 0
    between = "\n<|im_start|>user\n<tool_response>\n84\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    for sample in rollout.flat:
        runs = turns_of(sample)
        if len(runs) > 1:
            closed = runs[0][0][-1] == eos  # otherwise it ended by the tokenizer's own end-of-sequence token
            assert tokenizer.decode(runs[1][0]) == ("" if closed else "<|im_end|>") + between
            seen += closed
        assert sample.rewards == {}
    assert seen


def test_a_turns_text_has_the_stop_text_that_ended_it_and_no_other():
    tokenizer = tokenizer_of(QWEN)
    end, stops = tokenizer.convert_tokens_to_ids("<|im_end|>"), ("</tool>", "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.unk_token = tokenizer.eos_token  # an unknown text has the end-of-sequence token's id, as in GPT-2
    said = CompletionOutput(0, [5], "2+2", finish_reason="stop")
    for reason, expected in (("</tool>", "2+2</tool>"), (end, "2+2<|im_end|>"), (tokenizer.eos_token_id, "2+2"), ("stop", "2+2")):
        assert turn_text(replace(said, stop_reason=reason), stops, tokenizer) == expected
    assert turn_text(replace(said, finish_reason="length"), stops, tokenizer) == "2+2"


def test_the_budget_and_the_models_length_count_answers_too():
    short = ready(llama(vocab_size=len(TOKENIZER), max_position_embeddings=24))
    rollout = MultiTurn(kind_of(Echo), max_turns=50)(Engine(short, TOKENIZER), PROMPTS[:2], replace(PARAMS, n=8, max_tokens=100))
    for ids, group in zip(rollout.prompts, rollout.samples, strict=True):
        assert all(len(ids) + len(sample.ids) <= 24 for sample in group)
        assert any(sample.turns > 1 for sample in group)
        assert any(len(ids) + len(sample.ids) == 24 and sample.scored[-1] for sample in group)
