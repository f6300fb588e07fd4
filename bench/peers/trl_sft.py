"""Supervised fine-tuning in TRL and in fastalign: the same model, records, dtype and optimizer, in turn.

    python -m bench.peers.trl_sft

Both sides train on GSM8K's prompts and completions (synthetic text of similar lengths where the file is not found) in the
file's order, batch for batch, and score the completions only. TRL pads each batch to its longest sequence and, on a CPU,
computes the head for every position; fastalign packs the batch and computes the head for scored tokens. Both see the same
tokens, so the losses of every step must agree; the largest difference is printed. Gradient checkpointing is off on both sides.
The first step is the warm-up: it is trained on and compared, not timed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import write_record

from . import inputs, sft_in_fastalign, sft_in_trl
from .machine import describe, pick_device
from .turns import Peer, Row, alternate, median, quiet_environment, table

# nats a token, over all steps: after the first, rounding has moved the weights apart by a little
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_sft", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--model", default="", help="a local model folder; default: a random 40M-parameter Qwen2 made on the spot")
    p.add_argument("--tiny", action="store_true", help="a random model of 0.1M parameters instead: tries the script in seconds")
    p.add_argument("--data", default=str(inputs.GSM8K), help="a GSM8K .jsonl file (question, answer)")
    p.add_argument("--batch_size", type=int, default=16, help="sequences an optimizer step, forwarded at once")
    p.add_argument("--max_length", type=int, default=1024)
    p.add_argument("--loss", default="nll", choices=["nll", "dft"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--learning_rate", type=float, default=1e-4)
    p.add_argument("--steps", type=int, default=4, help="measured steps a side, after the warm-up")
    p.add_argument("--threads", type=int, default=0, help="compute threads a side; 0: torch's choice")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", default="", help="also write everything measured to this file")
    return p


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes model, tokenizer and records; returns the options that both sides get."""
    max_steps = 1 + args.steps
    records = inputs.supervised_records(max_steps * args.batch_size, Path(args.data), args.seed)
    where = {"model": args.model, "tokenizer": args.model}
    if not args.model:
        shape = inputs.TINY if args.tiny else inputs.SHAPE
        corpus = inputs.supervised_records(4000, Path(args.data), args.seed)
        texts = (r["prompt"] + r["completion"] for r in corpus)
        where = inputs.write_model(folder, inputs.text_tokenizer(texts, shape["vocab_size"]), shape, args.seed)
    data = inputs.write_records(folder / "records.jsonl", records)
    made = {"data": str(data), "output_dir": str(folder), "max_steps": max_steps, "device": pick_device(args.device)}
    return vars(args) | where | made


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Loads both sides, warms both up on the first batch, and lets them alternate."""
    peers = [Peer("trl", sft_in_trl.side, options), Peer("fastalign", sft_in_fastalign.side, options)]
    try:
        warm = {peer.name: [peer.turn()] for peer in peers}
        turns = alternate(peers, options["steps"])
    finally:
        for peer in peers:
            peer.close()
    return {"warm": warm, "turns": turns, "facts": {peer.name: peer.facts for peer in peers}}


def check(found: dict[str, Any], dtype: str) -> str:
    """Compares tokens and losses step by step.

    Raises:
        RuntimeError: the sides read different tokens, or their losses differ by more than rounding.
    """
    theirs, ours = (found["warm"][name] + found["turns"][name] for name in found["turns"])
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if (a["tokens"], a["scored"]) != (b["tokens"], b["scored"]):
            raise RuntimeError(
                f"step {step}: the sides read different data: {a['tokens']} tokens, {a['scored']} scored in TRL; "
                f"{b['tokens']} and {b['scored']} in fastalign"
            )
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(theirs, ours, strict=True)]
    norms = max(abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in zip(theirs, ours, strict=True))
    losses = " ".join(f"{b['loss']:.4f}" for b in ours)
    line = f"loss by step {losses}; largest difference {max(gaps):.1e} (first step {gaps[0]:.1e}), gradient norm {norms:.1e} (relative)"
    if not max(gaps) < TOLERANCE[dtype]:
        raise RuntimeError(f"the two sides compute different losses: {line}")
    return line


def rows(found: dict[str, Any]) -> list[Row]:
    """The table's rows: TRL first, fastalign second."""
    turns, facts = found["turns"], found["facts"]
    names = list(turns)
    peaks = [max(step["peak_mib"] for step in turns[n]) for n in names]
    beyond = [peak - facts[n]["imports_mib"] - facts[n]["states_mib"] for peak, n in zip(peaks, names, strict=True)]
    totals = [{key: sum(step[key] for step in turns[n]) for key in ("seconds", "tokens", "computed")} for n in names]
    return [
        Row("seconds a step (median)", [median(turns[n], "seconds") for n in names]),
        Row("CPU seconds a step (median)", [median(turns[n], "cpu_seconds") for n in names]),
        Row("seconds, all steps", [t["seconds"] for t in totals]),
        Row("tokens/s (padding not counted)", [t["tokens"] / t["seconds"] for t in totals], "higher"),
        Row("tokens forwarded a step", [t["computed"] / len(turns[n]) for t, n in zip(totals, names, strict=True)]),
        Row("peak memory, MiB", peaks),
        Row("  beyond imports and states*, MiB", beyond),
    ]


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as folder:
        options = prepare(args, Path(folder))
        machine = describe("trl", "transformers", "torch", "fastalign")
        if not Path(args.data).exists():
            print(f"{args.data} not found: synthetic text of GSM8K's lengths")
        print(f"{machine}\nSFT ({args.loss}), {args.batch_size} sequences a step, {args.dtype}, {args.steps} measured step(s)", flush=True)
        found = measure(options)
    found |= {
        "machine": machine,
        "options": {name: value for name, value in vars(args).items() if name != "json"},
        "check": check(found, args.dtype),
    }
    lines = rows(found)
    print(table(lines, list(found["turns"])))
    print(f"* states: weights, gradients, two AdamW moments\n{found['check']}")
    if args.json:
        found["rows"] = [asdict(line) | {"ratio": line.ratio} for line in lines]
        write_record(Path(args.json), found)


if __name__ == "__main__":
    main()
