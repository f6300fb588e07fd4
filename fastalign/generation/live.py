"""Requests that come and go while the engine steps, over weights that may change in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastalign.generation.blocks import BlockPool
from fastalign.generation.deadlines import Deadlines
from fastalign.generation.graphs import DecodeGraphs
from fastalign.generation.groups import Group
from fastalign.generation.memory import Memory
from fastalign.generation.params import TIMEOUT, RequestFailedError, SamplingParams, Stats
from fastalign.generation.recorder import Recorder
from fastalign.generation.requests import Limits, Prompt, PromptLike, Request, groups_of, in_int64, read_requests
from fastalign.generation.rows import Record, Rows
from fastalign.generation.run import Run
from fastalign.generation.runner import KVCache, Runner
from fastalign.generation.sampler import Sampler
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopTable
from fastalign.generation.weights import evaluating, fingerprint
from fastalign.models.attention import NAME, use_fastalign_attention
from fastalign.models.backbone import causal_lm, head_of
from fastalign.models.linear import packs_for
from fastalign.models.probe import probe


class LiveEngine:
    """The part of `Engine` that serves requests as they come."""

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
        quantization: str | None = None,
        cuda_graphs: bool = True,
        async_scheduling: bool | None = None,
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
        self.block_size, self.prefix_caching = block_size, prefix_caching
        self.cuda_graphs, self.async_scheduling = cuda_graphs, async_scheduling
        self.max_num_seqs, self.max_num_batched_tokens = min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens
        self.stats, self.weight_version, self._packs = Stats(), 0, packs_for(base, quantization)
        self.kv_cache_tokens, self._memory = kv_cache_tokens, Memory(model, block_size, kv_cache_tokens, self.max_num_seqs)
        self._run: Run | None = None
        self._requests: dict[int, Request] = {}  # live ones, by id
        self._untold: dict[int, Group] = {}  # moved by a batch's steps; the next `step` names them
        self._deadlines = Deadlines()
        self._arrivals, self._epoch, self._at_work = 0, 0, ""
        self._seen: list[Any] | None = None  # the weights of the current epoch
        self._recorder: Recorder | None = None

    # --- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, request_id: int | None = None, sample: int = 0, priority: int = 0
    ) -> Request:
        """Queues one prompt; `step` brings it forward.

        Args:
            prompt: text or token ids.
            params: how to sample.
            request_id: the request part of the random key; default: the request's own id.
            sample: the sample part of the random key, of its first sample; the others count on from there.
            priority: lower values go first, and take the place of running requests with higher ones; equals in the order of arrival.

        Raises:
            ValueError: as `generate`.
        """
        with self._working("add_request"):
            key = self._arrivals if request_id is None else request_id
            read = read_requests([prompt], params or SamplingParams(), self.tokenizer, [key])
            run, groups = self._accept(read, [priority], live=True)
            groups[0].first_sample = in_int64(sample, "sample")
            request = self._requests[groups[0].index] = Request(groups[0], read[0].text, run.rows, self.tokenizer)
            return request

    def step(self) -> list[Request]:
        """One forward pass; the requests that drew tokens or ended in it. An empty list, and nothing done, without work."""
        with self._working("step"):
            touched, self._untold = self._untold, {}
            if (run := self._run) is not None:
                touched |= self._expire(run)
            if run is not None and run.scheduler.busy:
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
        """Whether `step` has something to do or to tell."""
        return self._busy or bool(self._untold)

    @property
    def _busy(self) -> bool:
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

    def extend(
        self, request: Request, ids: Sequence[int], params: SamplingParams | None = None, *, sample: int | None = None, priority: int = 0
    ) -> Request:
        """Goes on with a finished sample of a request: its prompt, its completion and `ids` are the prompt of a new one.

        Nothing is tokenized again, and what is in the prefix cache is not forwarded again. The random key stays, its positions go on.

        Args:
            request: its other samples may still run.
            ids: [K] what follows the completion: a tool's answer, the user's next turn. May be empty after "length" or "abort".
            params: default: those of the request.
            sample: which one; None: the only one.

        Raises:
            ValueError: the sample runs, or it is not said which of several is meant.
        """
        (known, place), key = request.sample_to_extend(sample), request._group.request
        params = params or replace(request.params, n=1)
        following = self.add_request([*known, *ids], params, request_id=key, sample=place, priority=priority)
        following._group.seed = request._group.seed if params.seed is None else following._group.seed
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
            self.weight_version, self._seen = self.weight_version + 1, None
            self._next_epoch()

    def release_cache(self) -> None:
        """Gives the memory of the KV cache and of packed weights back; the next call allocates it again."""
        if self._at_work or self._busy:
            raise RuntimeError("release_cache: the engine is generating; release between calls, when no request is left")
        self._run = None
        self._packs.clear()
        self._memory.release()

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the KV cache in use; 0 when nothing is left to do. Cached prefixes do not count."""
        return self._memory.pool.num_used if self._memory.pool is not None else 0

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
            kept = nullcontext() if self._recorder is None else self._recorder.recording.active()
            with evaluating(self.model), torch.no_grad(), self._packs.active(), kept:
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
            request._group.break_off(error, None if run is None else run.rows)
        for known in (self._requests, self._untold, self._deadlines):
            known.clear()
        if self._memory.pool is not None:
            self._memory.pool.reset()

    def _accept(
        self, prompts: list[Prompt], priorities: Sequence[int], *, live: bool, logprobs: bool = False, extended: bool = False
    ) -> tuple[Run, list[Group]]:
        """Checks the prompts and queues them as groups; `extended`: a later call goes on from their completions."""
        self._check_weights()
        stops = self._run.stops if self._run is not None and self._busy else StopTable(head_of(self.model).weight.shape[0])
        limits = Limits.of(self.model, self.tokenizer)
        groups = groups_of(prompts, limits, stops, self.tokenizer, first=self._arrivals, priorities=priorities)
        for group in groups:
            group.logprobs, group.live = group.logprobs or logprobs, live or extended
        pool, cache = self._memory.ready(groups, [r._group for r in self._requests.values()], live=live, busy=self._busy, keeping=extended)
        run = self._run = self._ready_run(groups, pool, cache, stops, live=live)
        self._arrivals += len(groups)
        for group in groups:
            run.scheduler.add(group)
            self._deadlines.add(group)
        return run, groups

    def _expire(self, run: Run) -> dict[int, Group]:
        """Ends the requests whose time is over."""
        ended = self._deadlines.passed()
        for group in ended:
            run.end(group, "abort", TIMEOUT)
        return {group.index: group for group in ended}

    def _check_weights(self) -> None:
        """Notices a change that nobody announced, when nothing is running."""
        if self._busy:
            return
        seen = fingerprint(self.model)
        if self._seen is not None and seen != self._seen:
            self._next_epoch()
        self._seen = seen

    def _next_epoch(self) -> None:
        self._epoch += 1
        self._packs.clear()
        if self._recorder is not None:
            self._recorder.recording.discard()
        if self._memory.cache is not None and self._memory.cache.graphs is not None:
            self._memory.cache.graphs.verify()
        if self._busy:
            assert self._run is not None
            self._run.restart(self.weight_version, self._root)
            self._run.sampler.head = head_of(self.model)
        elif self._memory.pool is not None:
            self._memory.pool.forget()

    @property
    def _root(self) -> bytes | None:
        return self._epoch.to_bytes(8, "little") if self.prefix_caching else None

    def _ready_run(self, groups: list[Group], pool: BlockPool, cache: KVCache, stops: StopTable, *, live: bool) -> Run:
        """The run that is going on, made wide enough; a new one when there is none."""
        width = max(group.limit for group in groups)
        completion = max(group.limit - len(group.prompt) for group in groups)
        if self._run is not None and self._busy:
            self._run.rows.reserve(width, completion, pool.blocks_for(width))
            return self._run
        num_rows = self.max_num_seqs if live else min(self.max_num_seqs, sum(group.params.n for group in groups))
        rows = Rows(num_rows, width, completion, pool.blocks_for(width))
        scheduler = Scheduler(pool, rows, self.max_num_batched_tokens, self.stats, self._root)
        if self.cuda_graphs and cache.data.is_cuda and cache.graphs is None:
            cache.graphs = DecodeGraphs(self.model, self.block_size)
        rows.recorder = self._recorder
        runner = Runner(self.model, cache, rows, self.block_size, self._recorder)
        sampler = Sampler(head_of(self.model), rows, stops)
        ahead = cache.data.is_cuda if self.async_scheduling is None else self.async_scheduling and self._recorder is None
        return Run(rows, scheduler, runner, sampler, stops, tokenizer=self.tokenizer, version=self.weight_version, ahead=ahead)
