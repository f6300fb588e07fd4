"""Random schedules of everything that can be done to one live engine, against a generator that does one sequence at a time.

Whatever was added, stepped, aborted, extended, updated, preempted and shared: the same tokens, the same log-probs to the bit,
the same ends, and no block that nobody holds.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive_generator import Key, NaiveGenerator
from tiny_models import gemma2, llama, ready

from fastalign.generation import Engine, SamplingParams
from fastalign.generation.params import RequestFailedError
from fastalign.models.backbone import head_of, hidden_states
from fastalign.ops.backend import native
from fastalign.ops.linear_logp import linear_logp
from fastalign.packing import conversation, pack

pytestmark = pytest.mark.skipif(native() is None, reason="bitwise only on the native attention; the reference sums differ by batch")

VOCAB, EOS, LONGEST = 61, 2, 96
TINY = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": LONGEST}


class Letters:
    """A tokenizer of three letters, so that strings come up; the last two tokens are the halves of one character."""

    eos_token_id = EOS
    all_special_tokens = ()
    pieces = [bytes([97 + i % 3]) for i in range(57)] + [b"ab", "é".encode(), b"\xc3", b"\xa9"]

    def decode(self, ids, **_):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


# --- the models: one live, whose parameters are overwritten, and its two versions for the naive generator ----------------


def versions_of(build):
    """Two models of one shape."""
    first, second = ready(build()), ready(build())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in second.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return [first, second]


def tiny_gemma2():
    return gemma2(**TINY)


@dataclass
class Subject:
    """A live model, its versions, and what a naive generator says of them (memoized over all schedules)."""

    live: torch.nn.Module
    versions: list
    naive: NaiveGenerator

    def load(self, version):
        """Overwrites the live parameters in place."""
        with torch.no_grad():
            for p, source in zip(self.live.parameters(), self.versions[version % 2].parameters(), strict=True):
                p.copy_(source)


def subject_of(build):
    versions = versions_of(build)
    return Subject(ready(build()), versions, NaiveGenerator(versions, [EOS], LONGEST, Letters()))


@pytest.fixture(scope="module")
def subjects():
    return {"llama": subject_of(lambda: llama(**TINY)), "gemma2": subject_of(tiny_gemma2)}


# --- what a schedule is made of ------------------------------------------------------------------------------------------


def no_repeats(ids, scores):
    """Tokens of the sequence become unlikely."""
    return scores.scatter(1, ids, scores.gather(1, ids) - 2.0)


def only_even(ids, scores):
    """Odd tokens are impossible after an even one."""
    if int(ids[0, -1]) % 2:
        return scores
    return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


def breaks(ids, scores):
    """Fails on some sequences."""
    if int(ids[0, -1]) % 7 == 3:
        raise ArithmeticError(f"length {ids.shape[1]}")
    return scores


PROMPTS = torch.randint(3, VOCAB, (3, 80), generator=torch.Generator().manual_seed(3)).tolist()
TRUNCATIONS = [{}, {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9, "min_p": 0.02}]
ENDS = [
    {},
    {},
    {"ignore_eos": True},
    {"stop_token_ids": (5, 9, 17)},
    {"stop": ("abc", "bb")},
    {"stop": ("cacb", "aab", "é"), "min_tokens": 3},
]
ENDS += [{"min_tokens": 4}, {"stop_token_ids": (8,), "min_tokens": 2}]
OTHERS = [{}] * 12 + [{"logprobs": False}] * 2 + [{"top_logprobs": 3}, {"top_logprobs": 100, "logprobs": False}, {"timeout": 1e-6}]
PROCESSORS = [()] * 6 + [(no_repeats,), (only_even,), (no_repeats, only_even), (breaks,)]


@st.composite
def sampling(draw, most_samples=5):
    """SamplingParams out of a small set, so that the naive generator's answers are met again."""
    most = draw(st.sampled_from([1, 2, 4, 7, 9, 12]))
    ends = dict(draw(st.sampled_from(ENDS)))
    ends["min_tokens"] = min(most, ends.get("min_tokens", 0))
    return SamplingParams(
        n=min(most_samples, draw(st.sampled_from([1, 1, 1, 2, 3, 5]))),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.0, 1.6])),
        max_tokens=most,
        seed=draw(st.sampled_from([0, 7, 2**64 - 1])),
        logits_processors=draw(st.sampled_from(PROCESSORS)),
        **draw(st.sampled_from(TRUNCATIONS)),
        **draw(st.sampled_from(OTHERS)),
        **ends,
    )


@dataclass(frozen=True)
class Add:
    base: int
    length: int
    params: SamplingParams
    key: int | None
    priority: int


@dataclass(frozen=True)
class Step:
    times: int


@dataclass(frozen=True)
class Abort:
    which: int
    keep: bool
    after: int = 0


@dataclass(frozen=True)
class Extend:
    which: int
    ids: tuple
    params: SamplingParams | None
    priority: int


@dataclass(frozen=True)
class Generate:
    base: int
    length: int
    params: SamplingParams


@dataclass(frozen=True)
class Update:
    after: int = 0


@dataclass(frozen=True)
class Release:
    pass


PRIORITY = st.sampled_from([0, 0, 0, -1, 3])
LENGTH = st.sampled_from([1, 2, 5, 8, 9, 13, 16, 17, 20, 24, 28, 32, 33, 36, 39, 40])
ADD = st.builds(Add, st.sampled_from([0, 0, 1, 2]), LENGTH, sampling(), st.sampled_from([None, None, 0, 5]), PRIORITY)
EXTEND = st.builds(
    Extend,
    st.integers(0, 9),
    st.sampled_from([(), (11,), (4, 33, 20), tuple(range(20, 31))]),
    st.none() | sampling(3),
    PRIORITY,
)
GENERATE = st.builds(Generate, st.sampled_from([0, 1, 2]), LENGTH, sampling(2))
STEP = st.builds(Step, st.integers(1, 4))
ABORT = st.builds(Abort, st.integers(0, 9), st.booleans(), st.integers(0, 3))
UPDATE, RELEASE = st.builds(Update, st.integers(0, 4)), st.just(Release())
OPERATIONS = st.one_of(STEP, ADD, ADD, STEP, EXTEND, STEP, ADD, EXTEND, ABORT, UPDATE, GENERATE, ADD, UPDATE, RELEASE)


@st.composite
def engines(draw):
    """Options of an engine; small caches and few rows are what preempts."""
    rows = draw(st.sampled_from([1, 2, 3, 5, 9, 9]))
    return {
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "kv_cache_tokens": draw(st.sampled_from([48, 48, 52, 64, 80, None])),
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows + draw(st.sampled_from([0, 7, 30, 30, 400])),
        "prefix_caching": draw(st.sampled_from([True, True, False])),
        "async_scheduling": draw(st.booleans()),
    }


SCHEDULES = {
    "options": engines(),
    "family": st.sampled_from(["llama", "llama", "llama", "gemma2"]),
    "operations": st.lists(OPERATIONS, min_size=8, max_size=14),
}
RANDOM = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}


# --- one schedule --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ticket:
    """A request and what is known of it from outside.

    Attributes:
        streamed: by sample, the tokens that `new_tokens` gave.
        versions: by sample, (k, v): from token k on the weights are version v.
        ended: it was seen to be finished.
    """

    request: object
    prompt: list
    params: SamplingParams
    key: int
    streamed: list = field(default_factory=list)
    versions: list = field(default_factory=list)
    aborted: str | None = None
    keep: bool = True
    ended: bool = False


class Schedule:
    """Plays operations on one engine and keeps the books."""

    def __init__(self, subject, options):
        self.subject, self.options = subject, options
        subject.load(0)
        self.engine = Engine(subject.live, Letters(), **options)
        self.tickets, self.batches, self.untold, self.version, self.counts = [], [], set(), 0, Counter()

    def play(self, operations):
        for operation in operations:
            getattr(self, type(operation).__name__.lower())(operation)
            check_blocks(self.engine)
        steps = 0
        while self.engine.has_work:
            self.step(Step(1))
            steps += 1
            assert steps < 5000, "no progress"
        assert self.engine.num_used_blocks == 0
        assert self.engine.step() == []
        self.check()
        return self._summary()

    # --- operations --------------------------------------------------------------------------------------------------

    def add(self, operation):
        prompt = PROMPTS[operation.base][: operation.length]
        self._enter(
            prompt,
            operation.params,
            None if operation.key is None else operation.key,
            lambda: self.engine.add_request(prompt, operation.params, request_id=operation.key, priority=operation.priority),
        )

    def extend(self, operation):
        able = [t for t in self.tickets if t.ended and t.params.n == 1]
        if not able:
            return
        self.counts["extended"] += 1
        ticket = able[operation.which % len(able)]
        made = ticket.streamed[0] if ticket.keep else []
        params = operation.params or ticket.params
        self._enter(
            [*ticket.prompt, *made, *operation.ids],
            params,
            ticket.key,
            lambda: self.engine.extend(ticket.request, list(operation.ids), operation.params, priority=operation.priority),
        )

    def _enter(self, prompt, params, key, enter):
        """Starts a request, or sees it refused, for the right reason and without a trace."""
        before = self.engine.has_work
        if not self._fits(prompt, params):
            with pytest.raises(ValueError, match=r"longest sequence|KV cache"):
                enter()
            assert self.engine.has_work == before
            self.counts["refused"] += 1
            return
        request = enter()
        assert self.engine.has_work
        assert request.prompt_token_ids == prompt
        key = request.id if key is None else key
        n = params.n
        self.tickets.append(Ticket(request, prompt, params, key, [[] for _ in range(n)], [[(0, self.version)] for _ in range(n)]))

    def _fits(self, prompt, params):
        tokens, size = self.options["kv_cache_tokens"], self.options["block_size"]
        needed = min(len(prompt) + params.max_tokens, LONGEST)
        return len(prompt) < LONGEST and (tokens is None or -(-needed // size) <= tokens // size)

    def step(self, operation):
        for _ in range(operation.times):
            touched = self.engine.step()
            moved = {ticket for ticket in self.tickets if self._read(ticket)} | self.untold
            self.untold = set()
            assert Counter(map(id, touched)) == Counter(id(ticket.request) for ticket in moved)
            check_blocks(self.engine)

    def _read(self, ticket):
        """Takes what a request has got; whether there was anything."""
        if ticket.ended:
            return False
        new = ticket.request.new_tokens()
        assert len(new) == ticket.params.n
        for have, more in zip(ticket.streamed, new, strict=True):
            have += more
        ticket.ended = ticket.request.finished
        out = ticket.request.output()
        if ticket.keep:
            assert [o.token_ids for o in out.outputs] == ticket.streamed
        assert ticket.ended == all(o.finish_reason for o in out.outputs)
        return any(new) or ticket.ended

    def abort(self, operation):
        self.step(Step(operation.after))
        if not self.tickets:
            return
        ticket = self.tickets[operation.which % len(self.tickets)]
        if ticket.ended:
            return
        ticket.aborted, ticket.keep = "abort", operation.keep
        self.untold.discard(ticket)
        self.engine.abort(ticket.request, keep_partial=operation.keep)
        assert ticket.request.finished
        self._read(ticket)

    def generate(self, operation):
        """A batch of one among the live requests, which go on meanwhile."""
        prompt, params = PROMPTS[operation.base][: operation.length], operation.params
        if not self._fits(prompt, params):
            return
        try:
            (out,) = self.engine.generate([prompt], params, request_ids=[17])
        except RequestFailedError:
            assert breaks in params.logits_processors
            return
        finally:
            self.untold |= {ticket for ticket in self.tickets if self._read(ticket)}  # the next step tells
        self.batches.append((out, Ticket(None, prompt, params, 17, versions=[[(0, self.version)]] * params.n)))

    def update(self, operation):
        self.step(Step(operation.after))
        self.version += 1
        with self.engine.updating_weights():
            self.subject.load(self.version)
        for ticket in self.tickets:
            for versions, have in zip(ticket.versions, ticket.streamed, strict=True):
                versions.append((len(have), self.version))
        assert self.engine.weight_version == self.version

    def release(self, operation):
        if not all(ticket.ended for ticket in self.tickets):
            with pytest.raises(RuntimeError):
                self.engine.release_cache()
        else:
            self.engine.release_cache()

    # --- the end -----------------------------------------------------------------------------------------------------

    def check(self):
        for ticket in self.tickets:
            self._check_output(ticket, ticket.request.output())
        for out, ticket in self.batches:
            ticket.streamed = [o.token_ids for o in out.outputs]
            self._check_output(ticket, out)

    def _check_output(self, ticket, out):
        assert out.prompt_token_ids == ticket.prompt
        assert [o.index for o in out.outputs] == list(range(ticket.params.n))
        for j, found in enumerate(out.outputs):
            self._check_sample(ticket, j, found)

    def _summary(self):
        """What this schedule came to, counted."""
        stats = self.engine.stats
        seen = Counter(steps=stats.steps, tokens=stats.decoded_tokens, preemptions=stats.preemptions, copies=stats.copied_blocks)
        seen.update(cached=stats.cached_tokens, recomputed=stats.recomputed_tokens, schedules=1, **self.counts)
        for ticket in self.tickets:
            for out in ticket.request.output().outputs:
                seen[out.finish_reason] += 1
                seen["string"] += isinstance(out.stop_reason, str) and out.finish_reason == "stop"
                seen["timeout"] += out.stop_reason == "timeout"
                seen["two versions"] += len(set(out.weight_versions)) > 1
        return seen

    def _check_sample(self, ticket, j, found):
        have, params, naive = ticket.streamed[j], ticket.params, self.subject.naive
        cut_off = found.finish_reason in ("abort", "error")
        versions = _in_force(ticket.versions[j], len(have))
        naive.foresee({v % 2 for _, v in versions}, [*ticket.prompt, *have[:-1]], len(ticket.prompt))
        wanted = naive.sample(ticket.prompt, params, Key(params.seed, ticket.key, j), versions, len(have) if cut_off else None)
        assert have == list(wanted.token_ids)
        if cut_off and not ticket.keep:
            assert (found.token_ids, found.logprobs or [], found.text, found.top_logprobs or []) == ([], [], "", [])
            return
        assert found.text == wanted.text
        assert tuple(found.token_ids) == wanted.token_ids
        assert tuple(found.weight_versions) == wanted.weight_versions
        self._check_logprobs(params, found, wanted)
        if cut_off:
            self._check_cut_off(ticket, found)
        else:
            assert (found.finish_reason, found.stop_reason) == (wanted.finish_reason, wanted.stop_reason)

    def _check_logprobs(self, params, found, wanted):
        if not params.logprobs and not params.top_logprobs:
            assert found.logprobs is found.raw_logprobs is found.kept_mass is found.top_logprobs is None
            return
        assert tuple(found.raw_logprobs) == wanted.raw_logprobs
        assert tuple(found.logprobs) == wanted.logprobs
        assert (found.kept_mass is None) == (not params.truncates)
        assert not params.truncates or tuple(found.kept_mass) == wanted.kept_mass
        assert (found.top_logprobs is None) == (not params.top_logprobs)
        for pairs, logprobs in zip(found.top_logprobs or (), wanted.model_logprobs, strict=False):
            ids, values = [token for token, _ in pairs], np.array([value for _, value in pairs])
            assert len(set(ids)) == min(params.top_logprobs, VOCAB)
            assert np.abs(values - np.sort(logprobs)[::-1][: len(ids)]).max() < 1e-5
            assert np.abs(values - logprobs[ids]).max() < 1e-5

    def _check_cut_off(self, ticket, found):
        """Nothing is cut off but by the caller, by its time, or by a processor that raises."""
        if found.finish_reason == "error":
            assert breaks in ticket.params.logits_processors
            assert "length" in found.error
        elif found.stop_reason == "timeout":
            assert ticket.params.timeout is not None
        else:
            assert ticket.aborted


def _in_force(versions, length):
    """(k, v) pairs that matter for a completion of `length` tokens: the last one at each k."""
    return tuple(sorted({k: v for k, v in versions if k < max(length, 1)}.items()))


def check_blocks(engine):
    """The books of the block pool: every reference has a holder, every block is in one place."""
    pool, run = engine._memory.pool, engine._run
    kept = {index for index, request in engine._requests.items() if request.finished}
    assert kept <= engine._untold.keys(), "a finished request is kept alive, and nobody will be told"
    if pool is None:
        return
    rows = [] if run is None else run.scheduler.active.tolist()
    held = [run.rows.blocks(row) for row in rows]
    held += [] if run is None else [group.hold for group in run.scheduler._holds.values()]
    assert all(len(set(blocks.tolist())) == len(blocks) for blocks in held), "a sequence holds a block twice"
    counts = np.bincount(np.concatenate([[], *held]).astype(np.int64), minlength=pool.num_blocks)
    assert np.array_equal(counts, pool.references), "references without a holder, or holders without a reference"
    empty, cached, used = pool._free[: pool._num_empty].tolist(), list(pool._idle), np.flatnonzero(pool.references).tolist()
    assert sorted(empty + cached + used) == list(range(pool.num_blocks)), "a block is in two places, or in none"
    assert pool.num_used == engine.num_used_blocks == len(used)
    assert {digest: block for block, digest in pool._digest.items()} == pool._block
    assert pool._digest.keys() >= set(cached)
    assert not pool._digest.keys() & set(empty)
    assert engine.has_work or not used


# --- the campaigns -------------------------------------------------------------------------------------------------------


HAPPENINGS = ("preemptions", "copies", "cached", "recomputed", "extended", "string", "two versions")


def campaign(subjects, examples):
    """Plays random schedules, and makes sure that what the campaign is for did happen in some of them."""
    seen = Counter()

    @given(**SCHEDULES)
    @settings(max_examples=examples, **RANDOM)
    def play(options, family, operations):
        seen.update(Schedule(subjects[family], options).play(operations))

    play()
    rare = ("error",) if examples >= 1000 else ()  # one part in some dozens has none
    missing = [name for name in (*HAPPENINGS, "stop", "length", "abort", *rare) if not seen[name]]
    assert not missing, f"none of {seen['schedules']} schedules had: {missing}"
    return seen


@pytest.mark.parametrize("part", [0, 1])  # two halves for two processes; each draws its own schedules
def test_campaign_random_schedules_give_what_one_by_one_gives(subjects, part):
    torch.set_num_threads(1)  # a model this small only waits for a second one; the long campaign has them all
    campaign(subjects, 250)


@pytest.mark.slow
def test_campaign_long(subjects):
    campaign(subjects, 5000)


# --- the naive generator itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_naive_foresight_changes_nothing(subjects, family):
    torch.set_num_threads(1)
    versions = subjects[family].versions
    plain, quick = (NaiveGenerator(versions, [EOS], LONGEST, Letters()) for _ in range(2))
    params = SamplingParams(max_tokens=12, temperature=1.3, top_k=20, logits_processors=(no_repeats,), ignore_eos=True)
    for length in (1, 17, 40):
        prompt, switch = PROMPTS[0][:length], ((0, 0), (5, 1))
        wanted = plain.sample(prompt, params, Key(3, 1, 2), switch)
        quick.foresee([0, 1], [*prompt, *wanted.token_ids], length)
        assert quick.sample(prompt, params, Key(3, 1, 2), switch) == wanted


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_naive_logprobs_are_the_trainers(subjects, family):
    subject = subjects[family]
    model, prompt = subject.versions[1], PROMPTS[1][:9]
    out = subject.naive.sample(prompt, SamplingParams(max_tokens=20, temperature=0.7, ignore_eos=True), Key(4, 0, 1), ((0, 1),))
    packed, head = pack(conversation([*prompt, *out.token_ids])), head_of(model)
    with torch.no_grad():
        hidden = hidden_states(model, packed)[len(prompt) - 1 : -1]
        for temperature, found in ((0.7, out.logprobs), (1.0, out.raw_logprobs)):
            options = {"temperature": head.temperature(temperature), "logit_softcap": head.logit_softcap}
            assert linear_logp(hidden, head.weight, torch.tensor(out.token_ids), **options).tolist() == list(found)
