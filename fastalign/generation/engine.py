"""The engine: prompts in, completions and both of their log-probs out, with the very parameters that are being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from fastalign.generation.groups import Group
from fastalign.generation.live import LiveEngine
from fastalign.generation.outputs import request_output
from fastalign.generation.params import CompletionOutput, RequestOutput, SamplingParams
from fastalign.generation.recorder import Recorder
from fastalign.generation.requests import Prompt, PromptLike, read_requests
from fastalign.generation.rows import Rows
from fastalign.generation.run import Run, finished
from fastalign.generation.scoring import SequenceScores, score_sequences
from fastalign.generation.weights import evaluating
from fastalign.models.backbone import causal_lm
from fastalign.models.recorded import Recording
from fastalign.rollout import Rollout, Sample

Progress = bool | Callable[[int], object]
OnGroup = Callable[[int, list[Sample]], object]


class Engine(LiveEngine):
    """Generates with a live model: no copy of the weights, a prompt forwarded once for all its samples.

    The log-probs are bitwise those that training computes for the same weights on the native CPU backend, in bf16 with AVX-512 and no
    AMX as far as torch's own products give a row the same bits in any batch. `generate` and `rollout` take a batch and return when it is
    done. `add_request`, `step`, `abort` and `extend` serve requests as they come; all calls belong to one thread (`AsyncEngine` is for
    several).

    Args:
        model: a causal LM with the "fastalign" attention (`models.load.load_causal_lm`), or a PEFT model around one.
        tokenizer: for text prompts, `.text` and stop strings; None: token ids only.
        block_size: tokens of a KV-cache block. Changes memory and speed, never a result.
        kv_cache_tokens: tokens that the cache holds; None: what the requests need, within half of the free memory.
        max_num_seqs: sequences that decode at once.
        max_num_batched_tokens: tokens forwarded in one step; longer prompts are cut into chunks.
        prefix_caching: keep what was computed findable by its token ids, for prompts that begin alike and for `extend`.
        quantization: "int8": on the CPU linear layers multiply by 8-bit weights (`ops.int8`), the head by its own. Log-probs are then
            those of the quantized model, which differ from training's; the weights themselves stay as they are.
        cuda_graphs: on a GPU, record decode steps and replay them (generation/graphs.py).
        async_scheduling: queue a step before the tokens of the one before have been read (generation/run.py), so that the device does
            not wait for the host; None: on a GPU.

    Attributes:
        stats: counts of what was done; `stats.reset()` sets them to zero.
        weight_version: how often the weights were updated; recorded with every token.
    """

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[int] | None = None,
        priorities: Sequence[int] | None = None,
        progress: Progress = False,
        keep_computed: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts, in the order given.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one each.
            request_ids: the request part of each prompt's random key, so that a resumed run repeats; default 0, 1, 2, ….
            priorities: one a prompt; lower values go first, equals in the order given.
            progress: show a bar of finished samples; or a function that is called with how many have just ended.
            keep_computed: later calls will go on from these completions, so that not only prompts but they, too, stay findable.

        Raises:
            ValueError: an empty or over-long prompt, a token id outside the vocabulary, a cache too small for one sequence.
            FloatingPointError: a row of logits holds NaN or +inf; names the request. Nothing is returned then.
            RuntimeError: a logits processor raised; names the request. Nothing is returned then.
        """
        read = read_requests(prompts, params or SamplingParams(), self.tokenizer, request_ids)
        groups, rows = self._complete(read, priorities, progress, extended=keep_computed)
        return [request_output(group, prompt.text, self.tokenizer, rows) for prompt, group in zip(read, groups, strict=True)]

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_ids: Sequence[int] | None = None,
        progress: Progress = False,
        logprobs: bool = True,
        on_group: OnGroup | None = None,
    ) -> Rollout:
        """Samples each prompt `params.n` times, for training: `generate`, as a Rollout that has log-probs whatever `params` say.

        Args:
            logprobs: False leaves them to `params`.
            on_group: called with a prompt's place and its samples as soon as the last of them has ended, between two steps.
        """
        read = read_requests(list(prompts), params, self.tokenizer, request_ids)
        known: dict[int, list[Sample]] = {}  # by the group's index

        def tell(group: Group, rows: Rows) -> None:
            known[group.index] = self._samples(group, rows)
            if on_group is not None:
                on_group(group.place, known[group.index])

        groups, rows = self._complete(read, None, progress, logprobs=logprobs, on_done=tell if on_group is not None else None)
        samples = [known.get(group.index) or self._samples(group, rows) for group in groups]
        return Rollout([prompt.ids.tolist() for prompt in read], samples, [{} for _ in read])

    def _samples(self, group: Group, rows: Rows) -> list[Sample]:
        samples = [_sample(out) for out in request_output(group, None, self.tokenizer, rows).outputs]
        for sample, member in zip(samples, group.members, strict=True):
            sample.recorded = member.record.recorded
        return samples

    @contextmanager
    def recording(self, recording: Recording) -> Iterator[None]:
        """Inside, forward passes are kept, and samples of `rollout` say where: `Sample.recorded`. Good for as long as the weights are.

        Args:
            recording: with room for what will be forwarded (`models.linear.recording_of`).

        Raises:
            RuntimeError: requests are running, or the engine is of a kind that cannot record (`records`).
        """
        if not self.records or self._recorder is not None or self._at_work or self._busy:
            raise RuntimeError("recording: the engine is at work, on a GPU or quantized; see Engine.records")
        self._run, self._recorder = None, Recorder(recording, self.block_size)
        try:
            yield
        finally:
            if self._run is not None:  # live requests may go on, unrecorded
                self._run.runner.recorder = self._run.rows.recorder = None
            self._run, self._recorder = (self._run if self._busy else None), None

    @property
    def records(self) -> bool:
        """Whether forward passes can be kept for training: on the CPU, by the weights themselves."""
        return not self._packs.quantizes and next(causal_lm(self.model).parameters()).device.type == "cpu"

    def score(self, sequences: Sequence[Sequence[int]], *, temperature: float = 1.0, top_logprobs: int = 0) -> list[SequenceScores]:
        """Log-probs of given sequences, as `raw_logprobs` would have them if they had been sampled (`scoring.score_sequences`).

        Args:
            sequences: token ids, at least one each; what they begin with alike is forwarded once.
            temperature: divides the logits.
            top_logprobs: return so many of the most probable tokens at each place, too.

        Raises:
            ValueError: an empty or over-long sequence, an id outside the vocabulary, or an option out of its range.
        """
        options = {"temperature": temperature, "top_logprobs": top_logprobs, "max_tokens": self.max_num_batched_tokens}
        with self._working("score"), evaluating(self.model), self._packs.active():
            self._check_weights()
            return score_sequences(self.model, sequences, **options)  # type: ignore[arg-type]

    def _complete(
        self,
        prompts: list[Prompt],
        priorities: Sequence[int] | None,
        progress: Progress,
        *,
        logprobs: bool = False,
        extended: bool = False,
        on_done: Callable[[Group, Rows], object] | None = None,
    ) -> tuple[list[Group], Rows]:
        if not prompts:
            return [], Rows(0, 0, 0, 0)
        if priorities is not None and len(priorities) != len(prompts):
            raise ValueError(f"generate: expected one priority a prompt, got {len(priorities)} for {len(prompts)} prompts")
        with self._working("generate"):
            run, groups = self._accept(prompts, priorities or [0] * len(prompts), live=False, logprobs=logprobs, extended=extended)
            total = sum(group.params.n for group in groups)
            with tqdm(total=total, disable=progress is not True, unit="sample") as bar, self._forwarding():
                run.on_finish, run.tracks = progress if callable(progress) else bar.update, bool(self._requests)
                if on_done is not None:
                    own = {group.index for group in groups}
                    run.on_done = lambda group: on_done(group, run.rows) if group.index in own else None
                try:
                    self._finish(run, groups)
                finally:
                    run.on_finish, run.on_done = _nothing, None
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
            self._tell(self._expire(run))
            if not run.scheduler.busy:  # their time was over
                continue
            run.step()
            self._tell(run.touched)
            failed = [group for group in run.touched.values() if group.error is not None and group in groups]
            run.on_done = None if failed else run.on_done  # nothing is returned: what is broken off now is nobody's
            for group in groups if failed else ():
                if not group.done:
                    run.end(group, "abort")
            if failed and failed[0].error is not None:
                raise failed[0].error

    def _tell(self, touched: dict[int, Group]) -> None:
        """Leaves it to the next `step` to name the live ones of these."""
        self._untold |= {index: group for index, group in touched.items() if index in self._requests}


def _nothing(count: int) -> None:
    """Nobody watches."""


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
