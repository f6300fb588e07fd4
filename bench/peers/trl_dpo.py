"""DPO in TRL and in fastalign: the same model, reference, pairs, dtype and optimizer, in turn.

    python -m bench.peers.trl_dpo

TRL forwards prompt and completion of both sides, padded, through policy and reference at every step. fastalign forwards a pair's
prompt once and no padding, and scores the reference once a pair before the first step: those seconds are a line of their own,
shared out over the steps of one epoch. The losses of every step must agree. Gradient checkpointing is off on both sides. The
first step is the warm-up: it is trained on and compared, not timed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import write_record

from . import dpo_in_fastalign, dpo_in_trl, inputs
from .machine import describe, pick_device
from .turns import Peer, Row, alternate, median, quiet_environment, table

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the loss, over all steps: rounding moves the weights apart by a little


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_dpo", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--tiny", action="store_true", help="a random model of 0.1M parameters and short pairs: tries the script in seconds")
    p.add_argument("--batch_size", type=int, default=8, help="pairs an optimizer step, forwarded at once")
    p.add_argument("--prompt_tokens", type=int, default=290, help="mean; a prompt has 0.8 to 1.2 times as many")
    p.add_argument("--completion_tokens", type=int, default=70, help="mean; a completion has 0.5 to 1.5 times as many")
    p.add_argument("--max_length", type=int, default=1024)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--learning_rate", type=float, default=1e-5)
    p.add_argument("--steps", type=int, default=4, help="measured steps a side, after the warm-up")
    p.add_argument("--threads", type=int, default=0, help="compute threads a side; 0: torch's choice")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", default="", help="also write everything measured to this file")
    return p


def pairs(count: int, vocab_size: int, args: argparse.Namespace) -> list[dict[str, str]]:
    """Pairs of random words of the word tokenizer, one token each."""
    draw, (prompt, completion) = random.Random(args.seed), (args.prompt_tokens, args.completion_tokens)
    if args.tiny:
        prompt, completion = 24, 8

    def text(low: float, high: float) -> str:
        return " ".join(f"w{draw.randrange(2, vocab_size)}" for _ in range(draw.randint(round(low), round(high))))

    def row() -> dict[str, str]:
        sides = {name: " " + text(0.5 * completion, 1.5 * completion) for name in ("chosen", "rejected")}
        return {"prompt": text(0.8 * prompt, 1.2 * prompt), **{name: f"{words} <eos>" for name, words in sides.items()}}

    return [row() for _ in range(count)]


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes model, reference, tokenizer and pairs; returns the options that both sides get."""
    shape = inputs.TINY if args.tiny else inputs.SHAPE
    max_steps = 1 + args.steps
    tokenizer = inputs.word_tokenizer(shape["vocab_size"])
    where = inputs.write_model(folder, tokenizer, shape, args.seed)
    other = inputs.write_model(folder / "other", tokenizer, shape, args.seed + 1)
    data = inputs.write_records(folder / "records.jsonl", pairs(max_steps * args.batch_size, shape["vocab_size"], args))
    made = {"reference": other["model"], "data": str(data), "output_dir": str(folder / "out")}
    return vars(args) | where | made | {"max_steps": max_steps, "device": pick_device(args.device)}


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Loads both sides, warms both up on the first batch, and lets them alternate."""
    peers = [Peer("trl", dpo_in_trl.side, options), Peer("fastalign", dpo_in_fastalign.side, options)]
    try:
        warm = {peer.name: [peer.turn()] for peer in peers}
        turns = alternate(peers, options["steps"])
    finally:
        for peer in peers:
            peer.close()
    return {"warm": warm, "turns": turns, "facts": {peer.name: peer.facts for peer in peers}}


def check(found: dict[str, Any], dtype: str) -> str:
    """Compares tokens, losses and reward margins step by step.

    Raises:
        RuntimeError: the sides read different tokens, or their losses differ by more than rounding.
    """
    theirs, ours = (found["warm"][name] + found["turns"][name] for name in found["turns"])
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a["tokens"] != b["tokens"]:
            raise RuntimeError(f"step {step}: the sides read different data: {a['tokens']} tokens in TRL, {b['tokens']} in fastalign")
    gaps = {key: max(abs(a[key] - b[key]) for a, b in zip(theirs, ours, strict=True)) for key in ("loss", "margin")}
    line = f"loss by step {' '.join(format(b['loss'], '.4f') for b in ours)}; largest difference {gaps['loss']:.1e}"
    line += f", of the reward margin {gaps['margin']:.1e}"
    if not gaps["loss"] < TOLERANCE[dtype]:
        raise RuntimeError(f"the two sides compute different losses: {line}")
    return line


def rows(found: dict[str, Any]) -> list[Row]:
    """The table's rows: TRL first, fastalign second."""
    turns, facts = found["turns"], found["facts"]
    names = list(turns)
    count = len(turns[names[0]]) + 1
    medians = [median(turns[n], "seconds") for n in names]
    share = [facts[n]["preparation_s"] / count for n in names]
    peaks = [max(step["peak_mib"] for step in turns[n]) for n in names]
    beyond = [peak - facts[n]["imports_mib"] - facts[n]["states_mib"] for peak, n in zip(peaks, names, strict=True)]
    return [
        Row("seconds a step (median)", medians),
        Row("  with the reference, one epoch", [a + b for a, b in zip(medians, share, strict=True)]),
        Row("CPU seconds a step (median)", [median(turns[n], "cpu_seconds") for n in names]),
        Row("tokens forwarded a step", [sum(s["computed"] for s in turns[n]) / len(turns[n]) for n in names]),
        Row("peak memory, MiB", peaks),
        Row("  beyond imports and states*, MiB", beyond),
    ]


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as folder:
        options = prepare(args, Path(folder))
        machine = describe("trl", "transformers", "torch", "fastalign")
        print(f"{machine}\nDPO, {args.batch_size} pairs a step, {args.dtype}, {args.steps} measured step(s)", flush=True)
        found = measure(options)
    found |= {
        "machine": machine,
        "options": {name: value for name, value in vars(args).items() if name != "json"},
        "check": check(found, args.dtype),
    }
    lines = rows(found)
    print(table(lines, list(found["turns"])))
    print(f"* states: weights, gradients, two AdamW moments, and in TRL the reference's weights\n{found['check']}")
    if args.json:
        found["rows"] = [asdict(line) | {"ratio": line.ratio} for line in lines]
        write_record(Path(args.json), found)


if __name__ == "__main__":
    main()
