"""The fastalign side of the GRPO comparison: the task that `fastalign grpo` runs, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .turns import Gate


def side(gate: Gate, options: dict[str, Any]) -> None:
    """Builds the task, then runs one optimizer step a turn. The first turn is the warm-up."""
    from fastalign.recipes.online import build_task, prompts_of
    from fastalign.recipes.setup import load, seed_everything

    from .memory import PeakMemory, states_mib

    memory = PeakMemory(options["device"])
    args = arguments(options)
    seed_everything(args.run.seed)
    loaded = load(args.model)
    prompts = prompts_of(args, loaded, args.data.dataset_name, 0)
    task = build_task(args, loaded, prompts, [], options["max_steps"])
    task.params = replace(task.params, ignore_eos=True)
    gate.ready(states_mib=states_mib(loaded.model, reference=options["beta"] > 0), imports_mib=memory.imports_mib)
    try:
        for index in range(options["max_steps"]):
            gate.report(**turn(gate, memory, task, index, options["completion_tokens"]))
    finally:
        task.rewards.close()


def turn(gate: Gate, memory: Any, task: Any, index: int, completion_tokens: int) -> dict[str, Any]:
    """One optimizer step. Given another side's rollout, it trains on that one after having sampled its own."""
    message = gate.wait()
    memory.reset()
    task.params = replace(task.params, max_tokens=message.get("completion_tokens", completion_tokens))
    metrics = step_on(task, index, message["rollout"]) if message.get("rollout") else task.step(index)
    times = gate.elapsed()
    phases = {name.removeprefix("timing_s/"): value for name, value in metrics.items() if name.startswith("timing_s/")}
    return {
        **times,
        "phases": phases,
        "peak_mib": memory.peak_mib(),
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "kl": metrics.get("kl", 0.0),
        "completion_lengths": sorted({int(metrics[f"completions/{end}_length"]) for end in ("min", "max")}),
    }


def step_on(task: Any, index: int, other: dict[str, Any]) -> dict[str, Any]:
    """A step whose completions are replaced by `other`'s, for the same prompts: both sides then compute one and the same update."""
    sample = task.engine.rollout

    def replayed(*args: Any, **kwargs: Any) -> Any:
        rollout = sample(*args, **kwargs)
        prompts = other["prompt_ids"][:: len(rollout.samples[0])]
        if rollout.prompts != prompts:
            raise ValueError(f"the sides disagree on the prompts: {rollout.prompts[0][:8]}… here, {prompts[0][:8]}… there")
        for mine, ids in zip(rollout.flat, other["completion_ids"], strict=True):
            mine.ids, mine.text = ids, task.engine.tokenizer.decode(ids, skip_special_tokens=True)
            mine.logprobs, mine.raw_logprobs = [0.0] * len(ids), [0.0] * len(ids)
            mine.recorded = None  # the engine forwarded other tokens
        return rollout

    task.engine.rollout = replayed
    try:
        return task.step(index)
    finally:
        del task.engine.rollout


def arguments(options: dict[str, Any]) -> Any:
    """What `fastalign grpo` would get on its command line."""
    from fastalign.recipes import arguments as a

    reward = Path(__file__).with_name("reward.py")
    return a.Arguments(
        command="grpo",
        model=a.ModelArguments(
            model_name_or_path=options["model"],
            tokenizer_name_or_path=options["tokenizer"],
            dtype=options["dtype"],
            device=options["device"],
        ),
        data=a.DataArguments(dataset_name=options["data"], max_length=options["max_length"], shuffle=False),
        optim=a.OptimArguments(learning_rate=options["learning_rate"], lr_scheduler_type="constant", max_steps=options["max_steps"]),
        batch=a.BatchArguments(per_device_train_batch_size=options["num_prompts"] * options["num_generations"]),
        run=a.RunArguments(output_dir=options["output_dir"], seed=options["seed"]),
        sampling=a.SamplingArguments(max_completion_length=options["completion_tokens"]),
        online=a.OnlineArguments(
            algorithm="grpo", num_generations=options["num_generations"], beta=options["beta"], reward=[f"{reward}:checksum"]
        ),
    )
