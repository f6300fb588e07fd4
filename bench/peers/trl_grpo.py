"""GRPO in TRL and in fastalign: the same model, prompts, dtype and step, in turn.

    python -m bench.peers.trl_grpo --prompt_tokens short

A step samples num_prompts x num_generations completions of exactly completion_tokens tokens, scores them with a Python
function, takes the reference's log-probs and makes one optimizer step. Both sides read the same model folder and the same
prompts in the same order. The warm-up step (short prompts, few tokens) is also the check that the work is the same: fastalign
trains on the completions that TRL sampled, and the losses and gradient norms of the two must agree.

What differs: the sampled tokens (each side has its own random numbers), not their count; TRL pads prompts on the left and
repeats each num_generations times, which is how it works; its loss here is `loss_type="grpo"` without the bias correction of
the KL, gradient checkpointing is off and the batch is not accumulated unless --trl_batch_size says so, all of which makes it
faster. fastalign's reward runs in a worker process of its own, whose memory is not in the table.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import write_record

from . import grpo_in_fastalign, grpo_in_trl, inputs
from .machine import describe, pick_device
from .turns import Peer, Row, alternate, median, quiet_environment, table

LENGTHS = {"short": (20, 30), "long": (280, 320)}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of the gradient norm: sums in another order, other roundings


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_grpo", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--model", default="", help="a local model folder; default: a random 40M-parameter Qwen2 made on the spot")
    p.add_argument("--tiny", action="store_true", help="a random model of 0.1M parameters instead: tries the script in seconds")
    p.add_argument("--prompt_tokens", choices=LENGTHS, default="short", help="short: 20-30 tokens, long: 280-320")
    p.add_argument("--num_prompts", type=int, default=8)
    p.add_argument("--num_generations", type=int, default=8)
    p.add_argument("--completion_tokens", type=int, default=64)
    p.add_argument("--beta", type=float, default=0.04, help="coefficient of the KL to the reference; 0: no reference")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--learning_rate", type=float, default=1e-6)
    p.add_argument("--steps", type=int, default=2, help="measured steps a side, after the warm-up")
    p.add_argument("--warmup_tokens", type=int, default=8, help="completion tokens of the warm-up step")
    p.add_argument("--trl_batch_size", type=int, default=0, help="TRL's per_device_train_batch_size; 0: all completions at once")
    p.add_argument("--threads", type=int, default=0, help="compute threads a side; 0: torch's choice")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", default="", help="also write everything measured to this file")
    return p


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes model and prompts; returns the options that both sides get. The first batch of prompts is the warm-up's."""
    from transformers import AutoTokenizer

    where = {"model": args.model, "tokenizer": args.model}
    if not args.model:
        shape = inputs.TINY if args.tiny else inputs.SHAPE
        where = inputs.write_model(folder, inputs.word_tokenizer(shape["vocab_size"]), shape, args.seed)
    draw, (low, high) = random.Random(args.seed), LENGTHS[args.prompt_tokens]
    lengths = [draw.randint(*LENGTHS["short"]) for _ in range(args.num_prompts)]
    lengths += [draw.randint(low, high) for _ in range(args.num_prompts * args.steps)]
    prompts = inputs.random_prompts(AutoTokenizer.from_pretrained(where["tokenizer"]), lengths, args.seed)
    data = inputs.write_records(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    made = {
        "data": str(data),
        "output_dir": str(folder),
        "max_steps": 1 + args.steps,
        "max_length": high + 64 + args.completion_tokens,
        "device": pick_device(args.device),
        "trl_batch_size": args.trl_batch_size or args.num_prompts * args.num_generations,
    }
    return vars(args) | where | made


def check(theirs: dict[str, Any], ours: dict[str, Any], tolerance: float) -> str:
    """Compares the warm-up step, whose completions were the same on both sides.

    Raises:
        RuntimeError: the gradient norms differ: the sides do not compute the same update.
    """
    gap = abs(ours["grad_norm"] / theirs["grad_norm"] - 1)
    line = (
        f"same completions: loss {theirs['loss']:.3e} and {ours['loss']:.3e}, "
        f"gradient norm {theirs['grad_norm']:.6f} and {ours['grad_norm']:.6f} (relative difference {gap:.1e})"
    )
    if not gap < tolerance:
        raise RuntimeError(f"the two sides compute different updates: {line}")
    return line


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Loads both sides, warms both up, and lets them alternate."""
    peers = [Peer("trl", grpo_in_trl.side, options), Peer("fastalign", grpo_in_fastalign.side, options)]
    trl, fastalign = peers
    try:
        warm = {"completion_tokens": options["warmup_tokens"]}
        theirs = trl.turn(**warm)
        ours = fastalign.turn(**warm, rollout=theirs.pop("rollout"))
        checked = check(theirs, ours, TOLERANCE[options["dtype"]])
        print(checked, flush=True)
        turns = alternate(peers, options["steps"])
    finally:
        for peer in peers:
            peer.close()
    for name, steps in turns.items():
        wrong = [n for step in steps for n in step["completion_lengths"] if n != options["completion_tokens"]]
        if wrong:
            raise RuntimeError(f"{name}: expected completions of {options['completion_tokens']} tokens, got one of {wrong[0]}")
    return {"check": checked, "turns": turns, "facts": {peer.name: peer.facts for peer in peers}}


def rows(found: dict[str, Any], options: dict[str, Any]) -> list[Row]:
    """The table's rows: TRL first, fastalign second."""
    turns, facts = found["turns"], found["facts"]
    names = list(turns)
    tokens = options["num_prompts"] * options["num_generations"] * options["completion_tokens"]
    seconds = [median(turns[n], "seconds") for n in names]
    peaks = [max(step["peak_mib"] for step in turns[n]) for n in names]
    beyond = [peak - facts[n]["imports_mib"] - facts[n]["states_mib"] for peak, n in zip(peaks, names, strict=True)]
    out = [Row("seconds a step (median)", seconds)]
    for phase in ("rollout", "reward", "reference", "update"):
        phases = {n: [step["phases"] for step in turns[n]] for n in names}
        if all(phase in found[0] for found in phases.values()):
            out.append(Row(f"  {phase}, s", [median(phases[n], phase) for n in names], "" if phase == "reward" else "lower"))
    out.append(Row("CPU seconds a step", [median(turns[n], "cpu_seconds") for n in names]))
    out.append(Row("completion tokens/s", [tokens / s for s in seconds], "higher"))
    out += [Row("peak memory, MiB", peaks), Row("  beyond imports and states*, MiB", beyond)]
    out.append(Row("gradient norm (own samples)", [median(turns[n], "grad_norm") for n in names], ""))
    return out


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as folder:
        options = prepare(args, Path(folder))
        machine = describe("trl", "transformers", "torch", "fastalign")
        print(f"{machine}\n{workload(options)}", flush=True)
        found = measure(options)
    found |= {"machine": machine, "options": {name: value for name, value in vars(args).items() if name != "json"}}
    lines = rows(found, options)
    print(table(lines, list(found["turns"])))
    print("* states: weights, gradients, two AdamW moments" + (", the reference's weights" if args.beta > 0 else ""))
    if args.json:
        found["rows"] = [asdict(line) | {"ratio": line.ratio} for line in lines]
        write_record(Path(args.json), found)


def workload(options: dict[str, Any]) -> str:
    o = options
    completions = f"{o['num_generations']} completions x {o['completion_tokens']} tokens"
    return (
        f"GRPO, {o['num_prompts']} {o['prompt_tokens']} prompts x {completions} a step, "
        f"{o['dtype']}, beta {o['beta']}, {o['steps']} measured step(s)"
    )


if __name__ == "__main__":
    main()
