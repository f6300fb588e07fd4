"""The engine: prompts in, completions and both of their log-probs out, with the very parameters that are being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastalign.generation.blocks import BlockPool
from fastalign.generation.groups import Group
from fastalign.generation.outputs import completions
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams, Stats
from fastalign.generation.requests import Limits, Request, groups_of, read_requests
from fastalign.generation.rows import Rows
from fastalign.generation.run import Run, finished
from fastalign.generation.runner import KVCache, Runner, cache_bytes_per_token, free_bytes
from fastalign.generation.sampler import Sampler
from fastalign.generation.scheduler import Scheduler
from fastalign.generation.stops import StopTable
from fastalign.models.attention import NAME, use_fastalign_attention
from fastalign.models.backbone import causal_lm, head_of
from fastalign.models.probe import probe
from fastalign.ops.gemm import packed_weights
from fastalign.rollout import Rollout, Sample

Prompt = str | Sequence[int]
Progress = bool | Callable[[int], object]


class Engine:
    """Generates with a live model: no copy of the weights, a prompt forwarded once for all its samples.

    The log-probs are bitwise those that training computes for the same weights on the native CPU backend.

    Args:
        model: a causal LM with the "fastalign" attention (`models.load.load_causal_lm`), or a PEFT model around one.
        tokenizer: for text prompts, `.text` and stop strings; None: token ids only.
        block_size: tokens of a KV-cache block. Changes memory and speed, never a result.
        kv_cache_tokens: tokens that the cache holds; None: what a call needs, within half of the free memory.
        max_num_seqs: sequences that decode at once.
        max_num_batched_tokens: tokens forwarded in one step; longer prompts are cut into chunks.

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
        self.block_size, self.kv_cache_tokens = block_size, kv_cache_tokens
        self.max_num_seqs, self.max_num_batched_tokens = min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens
        self.stats, self.weight_version = Stats(), 0
        self._cache: KVCache | None = None
        self._pool: BlockPool | None = None
        self._generating = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[int] | None = None,
        progress: Progress = False,
    ) -> list[RequestOutput]:
        """Completes prompts, in the order given.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one each.
            request_ids: the request part of each prompt's random key, so that a resumed run repeats; default 0, 1, 2, ….
            progress: show a bar of finished samples; or a function that is called with how many have just ended.

        Raises:
            ValueError: an empty or over-long prompt, a token id outside the vocabulary, a cache too small for one sequence.
            FloatingPointError: a row of logits holds NaN or +inf; names the request. Nothing is returned then.
        """
        requests = read_requests(prompts, params or SamplingParams(), self.tokenizer, request_ids)
        groups = self._complete(requests, progress, any(request.params.logprobs for request in requests))
        return [
            RequestOutput(request.text, request.ids.tolist(), completions(group, self.tokenizer, logprobs=request.params.logprobs))
            for request, group in zip(requests, groups, strict=True)
        ]

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_ids: Sequence[int] | None = None,
        progress: Progress = False,
    ) -> Rollout:
        """Samples each prompt `params.n` times, for training: `generate`, as a Rollout that always has log-probs."""
        requests = read_requests(list(prompts), params, self.tokenizer, request_ids)
        groups = self._complete(requests, progress, True)
        samples = [[_sample(out) for out in completions(group, self.tokenizer, logprobs=True)] for group in groups]
        return Rollout([request.ids.tolist() for request in requests], samples, [{} for _ in requests])

    @contextmanager
    def updating_weights(self) -> Iterator[None]:
        """Around every change of the weights: what was computed with the old ones is not used again."""
        if self._generating:
            raise RuntimeError("updating_weights: the engine is generating with these weights; update between calls")
        try:
            yield
        finally:
            self.weight_version += 1

    def release_cache(self) -> None:
        """Gives the KV cache's memory back; the next call allocates it again."""
        if self._generating:
            raise RuntimeError("release_cache: the engine is generating; release between calls")
        self._cache = self._pool = None

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the KV cache in use; 0 between calls."""
        return self._pool.num_used if self._pool is not None else 0

    def _complete(self, requests: list[Request], progress: Progress, logprobs: bool) -> list[Group]:
        if self._generating:
            raise RuntimeError("generate: the engine is already generating; it runs one call at a time")
        if not requests:
            return []
        stops = StopTable(head_of(self.model).weight.shape[0])
        groups = groups_of(requests, Limits.of(self.model, self.tokenizer), stops, self.tokenizer)
        pool, cache = self._ready_cache(groups)
        total = sum(group.params.n for group in groups)
        self._generating = True
        try:
            with (
                tqdm(total=total, disable=progress is not True, unit="sample") as bar,
                _evaluating(self.model),
                torch.no_grad(),
                packed_weights(),
            ):
                on_finish = progress if callable(progress) else bar.update
                run = self._run(groups, pool, cache, stops, logprobs, on_finish)
                while run.scheduler.busy:
                    run.step()
            assert finished(groups), "the scheduler has nothing left to do, so every sample must have ended"
            assert pool.num_used == 0, "every sample has ended, so every block must be free"
        finally:
            pool.reset()  # after an exception or an interrupt in any step: nothing stays taken
            self._generating = False
        return groups

    def _run(
        self, groups: list[Group], pool: BlockPool, cache: KVCache, stops: StopTable, logprobs: bool, on_finish: Callable[[int], object]
    ) -> Run:
        width = max(group.limit for group in groups)
        completion = max(group.limit - len(group.prompt) for group in groups)
        num_rows = min(self.max_num_seqs, sum(group.params.n for group in groups))
        rows = Rows(num_rows, width, completion, pool.blocks_for(width))
        scheduler = Scheduler(pool, rows, self.max_num_batched_tokens, self.stats)
        for group in groups:
            scheduler.add(group)
        runner = Runner(self.model, cache, rows, self.block_size)
        sampler = Sampler(head_of(self.model), rows, stops, logprobs)
        extra = {"tokenizer": self.tokenizer, "version": self.weight_version, "on_finish": on_finish}
        return Run(rows, scheduler, runner, sampler, stops, **extra)

    def _ready_cache(self, groups: list[Group]) -> tuple[BlockPool, KVCache]:
        """The pool and the cache, made or enlarged for this call."""
        largest = max(groups, key=lambda group: group.limit)
        if self.kv_cache_tokens is None:
            affordable = free_bytes(self.model) // 2 // (cache_bytes_per_token(self.model) * self.block_size)
            held = self._pool.num_blocks if self._pool is not None else 0
            num_blocks = max(held, min(_blocks_wanted(groups, self.block_size, self.max_num_seqs), held + affordable))
        else:
            num_blocks = self.kv_cache_tokens // self.block_size
        needed = -(-largest.limit // self.block_size)
        if needed > num_blocks:
            source = "half of the free memory" if self.kv_cache_tokens is None else f"kv_cache_tokens={self.kv_cache_tokens}"
            raise ValueError(
                f"generate: request {largest.index} can grow to {largest.limit} tokens ({len(largest.prompt)} of prompt, max_tokens="
                f"{largest.params.max_tokens}), {needed} blocks of {self.block_size}; the KV cache has {num_blocks} ({source});"
                " raise kv_cache_tokens or lower max_tokens"
            )
        if self._pool is None or self._cache is None or self._pool.num_blocks < num_blocks:
            self.release_cache()
            self._cache = KVCache(self.model, num_blocks, self.block_size)
            self._pool = BlockPool(num_blocks, self.block_size)
        return self._pool, self._cache


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
