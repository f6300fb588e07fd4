"""TRL's trainers as they are and with `accelerate_trainer(trainer)`: the same losses, in less time and memory.

    python -m bench.peers.trl_integration

SFT, DPO, KTO and GRPO, each at two scales: stories260k (512 tokens of vocabulary: nothing is won at the head, so what is left is
the proof of equal losses) and a random 40M-parameter Qwen2 with a vocabulary of 32,000. All sides are TRL with the same model,
records, seed, optimizer and metrics; the one line is the difference. GRPO samples with TRL's own generation, so equal seeds and equal
weights give equal samples: their digests are compared. The run stops when a loss differs by more than 1e-4.

The floor of `+fastalign` is the backbone and the sampling, which are TRL's; with `pack=True` (`+packed`) the backbone runs without
padding, and the prompt of a preference pair or of a group once.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import write_record

from . import inputs, integration_in_trl
from .machine import describe, pick_device
from .turns import Peer, alternate, median, quiet_environment

TOLERANCE = 1e-4
METHODS = ("SFT", "DPO", "KTO", "GRPO")
STORIES = Path("..") / "shared" / "models" / "stories260k"
STORIES_SHAPE = inputs.SHAPE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
# prompt and completion lengths in tokens (GRPO's completions are sampled, up to the largest), sequences a step
SIZES: dict[str, dict[str, Any]] = {
    "stories260k": {"prompt": (20, 60), "completion": (10, 60), "batch_size": 16},
    "qwen2-40m": {"prompt": (60, 120), "completion": (20, 80), "batch_size": 8},
    "tiny": {"prompt": (4, 8), "completion": (3, 8), "batch_size": 4},
}
SIDES: dict[str, dict[str, Any] | None] = {"trl": None, "+fastalign": {}, "+packed": {"pack": True}}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_integration", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--scales", nargs="+", default=["stories260k", "qwen2-40m"], choices=list(SIZES))
    p.add_argument("--stories", default=str(STORIES), help="the stories260k folder; a random model of its shape where there is none")
    p.add_argument("--tiny", action="store_true", help="a random model of 0.1M parameters, 3 steps: tries the script in a minute")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--learning_rate", type=float, default=1e-4)
    p.add_argument("--steps", type=int, default=20, help="compared steps a side at the small scale; the first is not timed")
    p.add_argument("--large_steps", type=int, default=4, help="the same at the large scale")
    p.add_argument("--threads", type=int, default=1, help="compute threads a side; 0: torch's choice")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", default="", help="also write everything measured to this file")
    return p


def write_inputs(scale: str, stories: str, folder: Path, seed: int) -> dict[str, str]:
    """The model and tokenizer of a scale."""
    if scale == "stories260k" and Path(stories).is_dir():
        return {"model": stories, "tokenizer": stories}
    if scale == "stories260k":
        print(f"{stories} not found: a random model of stories260k's shape")
    shape = {"stories260k": STORIES_SHAPE, "qwen2-40m": inputs.SHAPE, "tiny": inputs.TINY}[scale]
    folder.mkdir()
    return inputs.write_model(folder, inputs.word_tokenizer(shape["vocab_size"]), shape, seed)


def records_of(method: str, tokenizer: Any, sizes: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` records of random words, of the lengths of the scale."""
    draw = random.Random(seed)

    def texts(limits: tuple[int, int], seed: int) -> list[str]:
        return inputs.random_prompts(tokenizer, [draw.randint(*limits) for _ in range(count)], seed)

    prompts = texts(sizes["prompt"], seed)
    if method == "GRPO":
        return [{"prompt": prompt} for prompt in prompts]
    good, bad = (texts(sizes["completion"], seed + i) for i in (1, 2))
    rows = zip(prompts, good, bad, strict=True)
    if method == "DPO":
        return [{"prompt": p, "chosen": " " + a, "rejected": " " + b} for p, a, b in rows]
    if method == "KTO":
        return [{"prompt": p, "completion": " " + a, "label": i % 2 == 0} for i, (p, a, _) in enumerate(rows)]
    return [{"prompt": p, "completion": " " + a} for p, a, _ in rows]


def measure(method: str, scale: str, where: dict[str, str], steps: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides of one method at one scale, in turn."""
    from transformers import AutoTokenizer

    sizes = SIZES[scale]
    batch = sizes["batch_size"] // 2 if method == "DPO" else sizes["batch_size"]  # a pair is two sequences
    records = records_of(method, AutoTokenizer.from_pretrained(where["tokenizer"]), sizes, steps * batch, args.seed)
    made = {"method": method, "batch_size": batch, "num_generations": batch // 2, "completion_tokens": sizes["completion"][1]}
    made |= {"data": str(inputs.write_records(folder / "records.jsonl", records)), "max_length": 512, "max_steps": steps}
    options = vars(args) | where | made | {"output_dir": str(folder), "device": pick_device(args.device)}
    peers = [Peer(name, integration_in_trl.side, options | {"accelerate": change}) for name, change in SIDES.items()]
    try:
        turns = alternate(peers, steps)
    finally:
        for peer in peers:
            peer.close()
    return {"method": method, "scale": scale, "turns": turns, "facts": {peer.name: peer.facts for peer in peers}}


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a side: how far its logs are from TRL's, and its time and memory against TRL's."""
    base = found["turns"]["trl"]
    rows = []
    for name, turns in found["turns"].items():
        pairs = [(a["logs"], b["logs"]) for a, b in zip(base, turns, strict=True)]
        row: dict[str, Any] = {"side": name}
        row["loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        row["grad_norm_difference"] = max(abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in pairs if a["grad_norm"])
        row["same_metrics"] = all(a.keys() == b.keys() for a, b in pairs)
        row["same_samples"] = all(a.get("samples") == b.get("samples") for a, b in zip(base, turns, strict=True))
        timed = [t | {"training": t["seconds"] - t.get("generation", 0.0)} for t in turns[1:] or turns]
        row |= {key: median(timed, key) for key in ("seconds", "training", "cpu_seconds")}
        row["peak_mib"] = max(t["peak_mib"] for t in timed)
        row["beyond_mib"] = row["peak_mib"] - found["facts"][name]["imports_mib"] - found["facts"][name]["states_mib"]
        rows.append(row)
    for row in rows:
        row |= {f"{key}_ratio": rows[0][key] / row[key] for key in ("seconds", "training", "cpu_seconds", "peak_mib", "beyond_mib")}
    return rows


def check(found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Stops the run when a side does not compute what TRL computes.

    Raises:
        RuntimeError: names the side, the method and the difference.
    """
    for row in rows:
        if not (row["loss_difference"] <= TOLERANCE and row["same_metrics"] and row["same_samples"]):
            raise RuntimeError(f"{found['method']} on {found['scale']}: {row['side']} is not TRL's computation: {row}")


def table(found: dict[str, Any]) -> str:
    """The rows of one method as text."""
    lines = []
    for row in found["rows"]:
        lines.append(
            f"{found['method']:5s}{found['scale']:12s}{row['side']:12s}{row['loss_difference']:9.1e}{row['grad_norm_difference']:9.1e}"
            f"{row['seconds']:9.3f}{row['seconds_ratio']:7.2f}x{row['training_ratio']:7.2f}x{row['cpu_seconds_ratio']:7.2f}x"
            f"{row['peak_mib']:9.0f}{row['peak_mib_ratio']:7.2f}x{row['beyond_mib']:9.0f}{row['beyond_mib_ratio']:7.2f}x"
        )
    return "\n".join(lines)


COLUMNS = (
    *(("|Δloss|", 9), ("|Δgrad|", 9), ("s/step", 9), ("ratio", 8), ("train*", 8), ("cpu", 8)),
    *(("peak MiB", 9), ("ratio", 8), ("beyond**", 9), ("ratio", 8)),
)
HEADER = " " * 29 + "".join(f"{name:>{width}s}" for name, width in COLUMNS)


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    scales = ["tiny"] if args.tiny else args.scales
    results, machine = [], describe("trl", "transformers", "torch", "fastalign")
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as folder:
        for scale in scales:
            where = write_inputs(scale, args.stories, Path(folder) / scale, args.seed)
            steps = {"tiny": 3, "qwen2-40m": args.large_steps}.get(scale, args.steps)
            for method in args.methods:
                found = measure(method, scale, where, steps, args, Path(folder))
                found["rows"] = summary(found)
                print(f"{HEADER}\n{table(found)}", flush=True)
                check(found, found["rows"])
                results.append(found)
    print("\n" + "\n".join([HEADER, *(table(found) for found in results)]))
    print("* without sampling  ** peak memory beyond imports, weights, gradients, AdamW moments and the reference's weights")
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        write_record(Path(args.json), {"machine": machine, "options": options, "results": results})


if __name__ == "__main__":
    main()
