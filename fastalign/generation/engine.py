"""The engine: prompts in, completions and both of their log-probs out, with the very parameters that are being trained."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastalign.generation.blocks import BlockPool
from fastalign.generation.groups import Group, Member
from fastalign.generation.outputs import request_output
from fastalign.generation.params import TIMEOUT, CompletionOutput, RequestFailedError, RequestOutput, SamplingParams, Stats
from fastalign.generation.requests import Limits, Prompt, Request, groups_of, read_requests
from fastalign.generation.rows import Record, Rows
from fastalign.generation.run import Run, finished
from fastalign.generation.runner import KVCache, Runner, cache_bytes_per_token, free_bytes
from fastalign.generation.sampler import Sampler
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopTable
from fastalign.generation.weights import fingerprint
from fastalign.models.attention import NAME, use_fastalign_attention
from fastalign.models.backbone import causal_lm, head_of
from fastalign.models.probe import probe
from fastalign.ops.gemm import packed_weights
from fastalign.rollout import Rollout, Sample

PromptLike = str | Sequence[int]
Progress = bool | Callable[[int], object]
MAX_STOP_SETS = 1024  # of a live engine; its table is begun anew when it is idle


class Engine:
    """Generates with a live model: no copy of the weights, a prompt forwarded once for all its samples.

    The log-probs are bitwise those that training computes for the same weights on the native CPU backend. `generate` and
    `rollout` take a batch and return when it is done. `add_request`, `step`, `abort` and `extend` serve requests as they come;
    all calls belong to one thread (`AsyncEngine` is for several).

    Args:
        model: a causal LM with the "fastalign" attention (`models.load.load_causal_lm`), or a PEFT model around one.
        tokenizer: for text prompts, `.text` and stop strings; None: token ids only.
        block_size: tokens of a KV-cache block. Changes memory and speed, never a result.
        kv_cache_tokens: tokens that the cache holds; None: what the requests need, within half of the free memory.
        max_num_seqs: sequences that decode at once.
        max_num_batched_tokens: tokens forwarded in one step; longer prompts are cut into chunks.
        prefix_caching: keep what was computed findable by its token ids, for prompts that begin alike and for `extend`.

    Attributes:
        stats: counts of what was done; `stats.reset()` sets them to zero.
        weight_version: how often the weights were updated; recorded with every token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        block_size: int = 16,
        kv_cache_tokens: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        prefix_caching: bool = True,
    ) -> None:
        for name, value in (("block_size", block_size), ("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if value < 1:
                raise ValueError(f"Engine: {name} must be >= 1, got {value}")
        if kv_cache_tokens is not None and kv_cache_tokens < block_size:
            raise ValueError(f"Engine: kv_cache_tokens must be at least one block ({block_size} tokens), got {kv_cache_tokens}")
        base = causal_lm(model)
        if base.config._attn_implementation != NAME:  # loaded elsewhere: switch it, and trust it only after a look
            use_fastalign_attention(base)
            probe(base)
        self.model, self.tokenizer = model, tokenizer
        self.block_size, self.kv_cache_tokens, self.prefix_caching = block_size, kv_cache_tokens, prefix_caching
        self.max_num_seqs, self.max_num_batched_tokens = min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens
        self.stats, self.weight_version = Stats(), 0
        self._cache: KVCache | None = None
        self._pool: BlockPool | None = None
        self._run: Run | None = None
        self._requests: dict[int, Request] = {}  # live ones, by id
        self._deadlines: list[tuple[float, int, Group]] = []
        self._arrivals = self._epoch = 0
        self._seen: list[Any] | None = None  # the weights of the current epoch
        self._at_work = ""

    # --- a batch -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[int] | None = None,
        priorities: Sequence[int] | None = None,
        progress: Progress = False,
    ) -> list[RequestOutput]:
        """Completes prompts, in the order given.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one each.
            request_ids: the request part of each prompt's random key, so that a resumed run repeats; default 0, 1, 2, ….
            priorities: one a prompt; lower values go first, equals in the order given.
            progress: show a bar of finished samples; or a function that is called with how many have just ended.

        Raises:
            ValueError: an empty or over-long prompt, a token id outside the vocabulary, a cache too small for one sequence.
            FloatingPointError: a row of logits holds NaN or +inf; names the request. Nothing is returned then.
            RuntimeError: a logits processor raised; names the request. Nothing is returned then.
        """
        read = read_requests(prompts, params or SamplingParams(), self.tokenizer, request_ids)
        groups, rows = self._complete(read, priorities, progress)
        return [request_output(group, prompt.text, self.tokenizer, rows) for prompt, group in zip(read, groups, strict=True)]

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_ids: Sequence[int] | None = None,
        progress: Progress = False,
    ) -> Rollout:
        """Samples each prompt `params.n` times, for training: `generate`, as a Rollout that always has log-probs."""
        read = read_requests(list(prompts), params, self.tokenizer, request_ids)
        groups, rows = self._complete(read, None, progress, logprobs=True)
        samples = [[_sample(out) for out in request_output(group, None, self.tokenizer, rows).outputs] for group in groups]
        return Rollout([prompt.ids.tolist() for prompt in read], samples, [{} for _ in read])

    def _complete(
        self, prompts: list[Prompt], priorities: Sequence[int] | None, progress: Progress, *, logprobs: bool = False
    ) -> tuple[list[Group], Rows]:
        if not prompts:
            return [], Rows(0, 0, 0, 0)
        if priorities is not None and len(priorities) != len(prompts):
            raise ValueError(f"generate: expected one priority a prompt, got {len(priorities)} for {len(prompts)} prompts")
        with self._working("generate"):
            run, groups = self._accept(prompts, priorities or [0] * len(prompts), live=False, logprobs=logprobs)
            total = sum(group.params.n for group in groups)
            with tqdm(total=total, disable=progress is not True, unit="sample") as bar, self._forwarding():
                run.on_finish = progress if callable(progress) else bar.update
                self._finish(run, groups)
                run.on_finish = _nothing
            assert finished(groups), "the scheduler has nothing left to do, so every sample must have ended"
            assert self._requests or run.scheduler.pool.num_used == 0, "every sample has ended, so every block must be free"
        return groups, run.rows

    def _finish(self, run: Run, groups: list[Group]) -> None:
        """Steps until the groups have ended; the first that fails ends them all and is raised."""
        pending = groups[::-1]
        while pending:
            if pending[-1].done:
                pending.pop()
                continue
            self._expire(run)
            run.step()
            failed = [group for group in run.touched.values() if group.error is not None and group in groups]
            for group in groups if failed else ():
                if not group.done:
                    run.end(group, "abort")
            if failed and failed[0].error is not None:
                raise failed[0].error

    # --- live requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, request_id: int | None = None, priority: int = 0
    ) -> Request:
        """Queues one prompt; `step` brings it forward.

        Args:
            prompt: text or token ids.
            params: how to sample.
            request_id: the request part of the random key; default: the request's own id.
            priority: lower values go first, and take the place of running requests with higher ones; equals in the order of arrival.

        Raises:
            ValueError: as `generate`.
        """
        with self._working("add_request"):
            key = self._arrivals if request_id is None else request_id
            read = read_requests(prompt, params or SamplingParams(), self.tokenizer, [key])
            run, groups = self._accept(read, [priority], live=True)
            request = self._requests[groups[0].index] = Request(groups[0], read[0].text, run.rows, self.tokenizer)
            return request

    def step(self) -> list[Request]:
        """One forward pass; the requests that drew tokens or ended in it. An empty list, and nothing done, without work."""
        with self._working("step"):
            run = self._run
            if run is None:
                return []
            touched = self._expire(run)
            if run.scheduler.busy:
                run.tracks = True
                with self._forwarding():
                    run.step()
                touched |= run.touched
            requests = [self._requests[index] for index in touched if index in self._requests]
            for request in requests:
                if request.finished:
                    del self._requests[request.id]
            return requests

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return self._run is not None and self._run.scheduler.busy

    def abort(self, request: Request, *, keep_partial: bool = True) -> None:
        """Ends a request at once and frees its blocks; without effect on one that has ended.

        Args:
            request: of this engine.
            keep_partial: its samples keep what they have drawn; otherwise those that had not ended are emptied.
        """
        with self._working("abort"):
            if self._requests.pop(request.id, None) is None:
                return
            assert self._run is not None
            for member in self._run.end(request._group, "abort"):
                if not keep_partial:
                    member.record, member.streamed = Record.empty(), 0
                    member.top_logprobs.clear()

    def extend(self, request: Request, ids: Sequence[int], params: SamplingParams | None = None, *, priority: int = 0) -> Request:
        """Goes on with a finished request of one sample: its prompt, its completion and `ids` are the prompt of a new one.

        Nothing is tokenized again, and what is in the prefix cache is not forwarded again. The random key stays, and its positions
        go on; two extensions of one request are two branches.

        Args:
            request: finished, with n = 1.
            ids: [K] what follows its completion: a tool's answer, the user's next turn. May be empty after "length" or "abort".
            params: default: those of the request.

        Raises:
            ValueError: the request runs, or has several samples.
        """
        if not request.finished:
            raise ValueError(f"extend: request {request.id} is still running; step until it has finished, or abort it")
        if request.params.n != 1:
            raise ValueError(f"extend: request {request.id} has n={request.params.n} samples, expected 1; add a request for the one meant")
        group = request._group
        known = [*group.prompt.tolist(), *group.members[0].record.tokens.tolist(), *ids]
        following = self.add_request(known, params or request.params, request_id=group.request, priority=priority)
        if following.params.seed is None:
            following._group.seed = group.seed
        return following

    # --- weights and memory ------------------------------------------------------------------------------------------

    @contextmanager
    def updating_weights(self) -> Iterator[None]:
        """Around every change of the weights: what was computed with the old ones is not used again.

        Live requests keep what they have drawn, are forwarded anew and go on with the new weights; `weight_versions` tells which
        token came from which.
        """
        if self._at_work:
            raise RuntimeError("updating_weights: the engine is generating with these weights; update between calls")
        try:
            yield
        finally:
            self.weight_version += 1
            self._seen = None
            self._next_epoch()

    def release_cache(self) -> None:
        """Gives the KV cache's memory back; the next call allocates it again."""
        if self._at_work or self.has_work:
            raise RuntimeError("release_cache: the engine is generating; release between calls, when no request is left")
        self._cache = self._pool = self._run = None

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the KV cache in use; 0 when nothing is left to do. Cached prefixes do not count."""
        return self._pool.num_used if self._pool is not None else 0

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _working(self, call: str) -> Iterator[None]:
        """One call at a time."""
        if self._at_work:
            raise RuntimeError(f"{call}: the engine is already generating; it runs one call at a time")
        self._at_work = call
        try:
            yield
        finally:
            self._at_work = ""

    @contextmanager
    def _forwarding(self) -> Iterator[None]:
        """Around steps: how the model must be for them; whatever breaks off in the middle of one leaves nothing taken."""
        try:
            with _evaluating(self.model), torch.no_grad(), packed_weights():
                yield
        except RequestFailedError:
            raise
        except BaseException as error:
            self._break_off(error)
            raise

    def _break_off(self, error: BaseException) -> None:
        """After an interrupt or an error in the middle of a step: live requests end with what they have, every block is free."""
        run, self._run = self._run, None
        for request in self._requests.values():
            for member in request._group.members:
                if member.row >= 0 and run is not None:
                    member.record, member.row = run.rows.record(member.row), -1
                member.finish_reason = member.finish_reason or "error"
            missing = range(len(request._group.members), request.params.n)
            request._group.members.extend(Member(request._group, j, finish_reason="error") for j in missing)
            request._group.error = RuntimeError(f"the engine's step broke off: {type(error).__name__}: {error}")
        self._requests.clear()
        self._deadlines.clear()
        if self._pool is not None:
            self._pool.reset()

    def _accept(self, prompts: list[Prompt], priorities: Sequence[int], *, live: bool, logprobs: bool = False) -> tuple[Run, list[Group]]:
        """Checks the prompts and queues them as groups."""
        self._check_weights()
        stops = self._run.stops if self._run is not None and self.has_work else StopTable(head_of(self.model).weight.shape[0])
        limits = Limits.of(self.model, self.tokenizer)
        groups = groups_of(prompts, limits, stops, self.tokenizer, first=self._arrivals, priorities=priorities)
        for group in groups:
            group.logprobs |= logprobs
        pool, cache = self._ready_cache(groups, live=live)
        run = self._run = self._ready_run(groups, pool, cache, stops, live=live)
        self._arrivals += len(groups)
        for group in groups:
            run.scheduler.add(group)
            if group.params.timeout is not None:
                heapq.heappush(self._deadlines, (time.monotonic() + group.params.timeout, group.index, group))
        return run, groups

    def _expire(self, run: Run) -> dict[int, Group]:
        """Ends the requests whose time is over."""
        ended = {}
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            group = heapq.heappop(self._deadlines)[2]
            if not group.done:
                run.end(group, "abort", TIMEOUT)
                ended[group.index] = group
        return ended

    def _check_weights(self) -> None:
        """Notices a change that nobody announced, when nothing is running."""
        if self.has_work:
            return
        seen = fingerprint(self.model)
        if self._seen is not None and seen != self._seen:
            self._next_epoch()
        self._seen = seen

    def _next_epoch(self) -> None:
        self._epoch += 1
        if self.has_work:
            assert self._run is not None
            self._run.restart(self.weight_version, self._root)
            self._run.sampler.head = head_of(self.model)
        elif self._pool is not None:
            self._pool.forget()

    @property
    def _root(self) -> bytes | None:
        return self._epoch.to_bytes(8, "little") if self.prefix_caching else None

    def _ready_run(self, groups: list[Group], pool: BlockPool, cache: KVCache, stops: StopTable, *, live: bool) -> Run:
        """The run that is going on, made wide enough; a new one when there is none."""
        width = max(group.limit for group in groups)
        completion = max(group.limit - len(group.prompt) for group in groups)
        if self._run is not None and self.has_work:
            self._run.rows.reserve(width, completion, pool.blocks_for(width))
            return self._run
        num_rows = self.max_num_seqs if live else min(self.max_num_seqs, sum(group.params.n for group in groups))
        rows = Rows(num_rows, width, completion, pool.blocks_for(width))
        scheduler = Scheduler(pool, rows, self.max_num_batched_tokens, self.stats, self._root)
        runner = Runner(self.model, cache, rows, self.block_size)
        sampler = Sampler(head_of(self.model), rows, stops)
        return Run(rows, scheduler, runner, sampler, stops, tokenizer=self.tokenizer, version=self.weight_version)

    def _ready_cache(self, groups: list[Group], *, live: bool) -> tuple[BlockPool, KVCache]:
        """The pool and the cache, made or enlarged for these groups."""
        largest = max(groups, key=lambda group: group.limit)
        held = self._pool.num_blocks if self._pool is not None else 0
        if self.kv_cache_tokens is None:
            affordable = free_bytes(self.model) // 2 // (cache_bytes_per_token(self.model) * self.block_size)
            waiting = [request._group for request in self._requests.values()]
            wanted = _blocks_wanted(groups + waiting, self.block_size, self.max_num_seqs)
            if live and wanted > held:  # more will come: not one block at a time
                wanted = max(wanted, held * 3 // 2)
            num_blocks = max(held, min(wanted, held + affordable))
        else:
            num_blocks = self.kv_cache_tokens // self.block_size
        needed = -(-largest.limit // self.block_size)
        if needed > num_blocks:
            source = "half of the free memory" if self.kv_cache_tokens is None else f"kv_cache_tokens={self.kv_cache_tokens}"
            raise ValueError(
                f"generate: request {largest.place} can grow to {largest.limit} tokens ({len(largest.prompt)} of prompt, max_tokens="
                f"{largest.params.max_tokens}), {needed} blocks of {self.block_size}; the KV cache has {num_blocks} ({source});"
                " raise kv_cache_tokens or lower max_tokens"
            )
        if self._pool is None or self._cache is None:
            self._cache, self._pool = KVCache(self.model, num_blocks, self.block_size), BlockPool(num_blocks, self.block_size)
        elif self._pool.num_blocks < num_blocks:
            if not self.has_work and not self._pool.num_cached:
                self._cache = None  # nothing in it is worth the copy
                self._cache, self._pool = KVCache(self.model, num_blocks, self.block_size), BlockPool(num_blocks, self.block_size)
            else:
                self._cache.grow(num_blocks)
                self._pool.grow(num_blocks)
        return self._pool, self._cache


def _nothing(count: int) -> None:
    """Nobody watches."""


def _blocks_wanted(groups: list[Group], block_size: int, max_num_seqs: int) -> int:
    """Blocks with which no sequence of the call has to wait or be preempted (an upper bound)."""
    shared = [len(group.prompt) // block_size for group in groups]
    own = [-(-group.limit // block_size) - s + 1 for group, s in zip(groups, shared, strict=True)]
    everything = sum(s + o * group.params.n for s, o, group in zip(shared, own, groups, strict=True))
    largest = max(s + o for s, o in zip(shared, own, strict=True))
    return min(everything, largest * (max_num_seqs + 1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside; afterwards the modules that were training train again, the others not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _sample(out: CompletionOutput) -> Sample:
    return Sample(
        ids=out.token_ids,
        logprobs=out.logprobs or [],
        raw_logprobs=out.raw_logprobs or [],
        kept_mass=out.kept_mass,
        weight_versions=out.weight_versions,
        finish_reason=out.finish_reason,
        text=out.text,
    )
