"""The scheduler on a toy cache that holds token ids: what each sequence would read is checked before every draw.

The toy model draws a token from the whole prefix and the random key, so a wrong block, a lost copy on write or a stale
prefix changes the output, and every schedule must give what a naive one-by-one generator gives.
"""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastalign.generation.blocks import BlockPool
from fastalign.generation.draws import Drawn, Sampled
from fastalign.generation.groups import Group
from fastalign.generation.params import SamplingParams, Stats
from fastalign.generation.rows import Rows
from fastalign.generation.run import Run, finished
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopTable

VOCAB = 50
EOS = 0


def next_token(prefix, request, sample):
    """A token that depends on every token before it and on the key; the end of sequence one time in 16."""
    digest = zlib.crc32(np.array([*prefix, request, sample], np.int64).tobytes())
    return EOS if digest % 16 == 0 else 1 + digest // 16 % (VOCAB - 1)


def naive(prompt, request, sample, max_tokens):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens, request, sample))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


class ToyRunner:
    """Stores token ids where keys would go."""

    def __init__(self, rows, pool, budget):
        self.rows, self.pool, self.budget = rows, pool, budget
        self.cache = np.full((pool.num_blocks, pool.block_size), -1)
        self.forwarded = 0

    def forward(self, plan, unread=None):
        assert 0 < plan.counts.sum() <= self.budget
        sources, targets = plan.copies
        self.cache[targets] = self.cache[sources]
        known, here = self.rows.length[plan.rows], self.rows.tokens.copy()
        here[plan.rows, np.minimum(known, here.shape[1] - 1)] = -2  # nobody knows them yet
        late = np.flatnonzero(plan.starts >= known)
        if len(late):
            assert (plan.starts[late] == known[late]).all()
            assert (plan.counts[late] == 1).all()
            ids = torch.full((len(plan.rows),), -3)
            unread.put(ids, plan.rows[late], late)
            here[plan.rows[late], known[late]] = ids[late]
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for position in range(start, start + count):
                block = self.rows.table[row, position // self.pool.block_size]
                assert self.pool.references[block] == 1, "a shared block was written"
                self.cache[block, position % self.pool.block_size] = here[row, position]
        self.forwarded += plan.counts.sum()
        return plan

    def select(self, plan, at):
        return [self.read(row) for row in plan.rows[at]]

    def keep_logits(self, plan, at):
        return None

    def read(self, row):
        """The sequence as its block table and the cache tell it."""
        length, known = self.rows.expected[row], self.rows.length[row]
        blocks = self.rows.table[row, : -(-length // self.pool.block_size)]
        tokens = self.cache[blocks].reshape(-1)[:length]
        assert length - known in (0, 1)
        assert np.array_equal(tokens[:known], self.rows.tokens[row, :known])
        assert (tokens >= 0).all()
        return tokens.tolist()


class ToySampler:
    def draw(self, prefixes, draws, keep=None):
        rows = self.rows
        tokens = [
            next_token(prefixes[a], int(rows.request[r]), int(s)) for a, r, s in zip(draws.at, draws.source, draws.sample, strict=True)
        ]
        values = np.array([len(prefixes[a]) for a in draws.at], np.float32)  # a value that tells the position
        drawn = Drawn(np.array(tokens, np.int64), -values, -2 * values, np.ones(len(tokens), np.float32))
        return Sampled.known(drawn, torch.device("cpu"))

    def waits(self, draws):
        return False


def run(requests, *, num_blocks, block_size, num_rows, budget, ahead):
    """requests: [(prompt, n, max_tokens)] → (groups, stats, runner)."""
    pool, stats, stops = BlockPool(num_blocks, block_size), Stats(), StopTable(VOCAB)
    stop_set = stops.add([EOS])
    groups = [
        Group(i, np.array(prompt), SamplingParams(n=n, max_tokens=most), 0, 100 + i, len(prompt) + most, stop_set)
        for i, (prompt, n, most) in enumerate(requests)
    ]
    width = max(group.limit for group in groups)
    rows = Rows(num_rows, width, width, pool.blocks_for(width))
    scheduler = Scheduler(pool, rows, budget, stats)
    for group in groups:
        scheduler.add(group)
    runner, sampler = ToyRunner(rows, pool, budget), ToySampler()
    sampler.rows = rows
    job = Run(rows, scheduler, runner, sampler, stops, tokenizer=None, version=3, ahead=ahead)
    called = 0
    while scheduler.busy:
        job.step()
        called += 1
        held = sum(rows.num_blocks[row] for row in scheduler.active)
        assert pool.references.sum() >= held
        assert called < 20000, "no progress"
    assert pool.num_used == 0
    assert finished(groups)
    return groups, stats, runner


def check(requests, **limits):
    """With the draws of each step read at once, and read a step later; returns the counts of the former."""
    stats = check_run(requests, **limits, ahead=False)
    check_run(requests, **limits, ahead=True)
    return stats


def check_run(requests, *, ahead, **limits):
    groups, stats, runner = run(requests, ahead=ahead, **limits)
    for group, (prompt, n, most) in zip(groups, requests, strict=True):
        assert len(group.members) == n
        for member in group.members:
            wanted = naive(prompt, group.request, member.index, most)
            record = member.record
            assert record.tokens.tolist() == wanted
            assert member.finish_reason == ("stop" if wanted[-1] == EOS else "length")
            positions = np.arange(len(prompt), len(prompt) + len(wanted))
            assert np.array_equal(record.logprobs, -positions)
            assert np.array_equal(record.raw_logprobs, -2 * positions)
            assert (record.versions == 3).all()
    assert stats.prompt_tokens == sum(len(prompt) for prompt, _, _ in requests)
    assert stats.decoded_tokens == sum(len(m.record.tokens) for g in groups for m in g.members)
    first_time = sum(len(g.prompt) + sum(len(m.record.tokens) - 1 for m in g.members) for g in groups)
    stops = sum(member.finish_reason == "stop" for group in groups for member in group.members)
    in_vain = runner.forwarded - first_time - stats.recomputed_tokens
    assert 0 <= in_vain <= stops if ahead else in_vain == 0  # the one token behind a stop
    return stats


PROMPT = list(range(1, 22))


def test_schedule_one_sequence():
    stats = check([(PROMPT, 1, 30)], num_blocks=20, block_size=4, num_rows=4, budget=64)
    assert stats.copied_blocks == stats.preemptions == stats.recomputed_tokens == 0


def test_schedule_forwards_a_groups_prompt_once():
    stats = check([(PROMPT, 8, 20), (PROMPT[:7], 8, 20)], num_blocks=300, block_size=4, num_rows=16, budget=64)
    assert stats.prompt_tokens == 28
    assert stats.recomputed_tokens == 0


def test_schedule_cuts_prompts_into_chunks():
    stats = check([(PROMPT * 5, 2, 5), (PROMPT, 2, 5)], num_blocks=100, block_size=4, num_rows=4, budget=8)
    assert stats.steps > 105 // 8
    assert stats.recomputed_tokens == 0


def test_schedule_more_samples_than_rows():
    stats = check([(PROMPT, 20, 12)], num_blocks=200, block_size=4, num_rows=3, budget=32)
    assert stats.preemptions == 0
    assert stats.recomputed_tokens == 0


def test_schedule_preempts_when_blocks_run_out():
    stats = check([(PROMPT, 6, 40)] * 3, num_blocks=18, block_size=4, num_rows=18, budget=64)
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0


def test_schedule_fits_one_sequence_exactly():
    check([(PROMPT, 3, 11)] * 3, num_blocks=8, block_size=4, num_rows=9, budget=16)  # 32 tokens, 8 blocks


@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 30)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 3, 8, 16]),
    spare_blocks=st.integers(0, 30),
    num_rows=st.integers(1, 12),
    spare_budget=st.integers(0, 40),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_schedule_random_loads_give_what_one_by_one_gives(requests, block_size, spare_blocks, num_rows, spare_budget):
    work = [([1 + (i * 7 + k) % (VOCAB - 1) for k in range(length)], n, most) for i, (length, n, most) in enumerate(requests)]
    needed = max(-(-(len(prompt) + most) // block_size) for prompt, _, most in work)
    check(work, num_blocks=needed + spare_blocks, block_size=block_size, num_rows=num_rows, budget=num_rows + spare_budget)


@pytest.mark.slow
@given(
    requests=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=20),
    block_size=st.integers(1, 20),
    spare_blocks=st.integers(0, 100),
    num_rows=st.integers(1, 40),
    spare_budget=st.integers(0, 100),
)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_schedule_long_random_campaign(requests, block_size, spare_blocks, num_rows, spare_budget):
    work = [([1 + (i * 7 + k) % (VOCAB - 1) for k in range(length)], n, most) for i, (length, n, most) in enumerate(requests)]
    needed = max(-(-(len(prompt) + most) // block_size) for prompt, _, most in work)
    check(work, num_blocks=needed + spare_blocks, block_size=block_size, num_rows=num_rows, budget=num_rows + spare_budget)
