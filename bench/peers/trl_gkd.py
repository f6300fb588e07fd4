"""Distillation (GKD) in TRL and in fastalign: the same student, teacher, tokens and optimizer; the losses must agree.

    python -m bench.peers.trl_gkd

The student is stories260k, the teacher the same model with noise on its weights; both sides get the same token ids in fp32, batch for
batch, and no sampling (lmbda 0). Compared are the loss and the gradient norm of every step, the later ones after both have moved.
TRL pads a batch and holds the logits of every position of both models; fastalign packs it and holds a chunk of scored rows.

What differs on purpose, and is therefore not in the comparison:
- TRL divides the loss of a sampled batch by the number of tokens in the *given* completions (`num_items_in_batch` is counted before it
  samples); fastalign by the tokens that were sampled.
- TRL's `temperature` is that of sampling alone: its loss is always at 1. fastalign's divergence takes the sampling temperature unless
  --divergence_temperature says otherwise.
- TRL draws for each forward pass whether it is on-policy, from Python's global generator; fastalign for each optimizer step, from seed
  and step, so that a resumed run repeats.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from . import gkd_in_fastalign, gkd_in_trl, inputs
from .machine import describe
from .turns import quiet_environment

STORIES = Path("..") / "shared" / "models" / "stories260k"
TOLERANCE = 1e-4  # of losses, nats a token; and relative, of gradient norms


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers.trl_gkd", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--stories", default=str(STORIES), help="the stories260k folder")
    p.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.5, 0.9, 1.0], help="of the generalized JSD; 0: forward, 1: reverse KL")
    p.add_argument("--noise", type=float, default=0.2, help="standard deviation of the teacher's noise, relative to each matrix's own")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--batch_size", type=int, default=8, help="sequences of one forward pass in TRL; two passes an optimizer step")
    p.add_argument("--learning_rate", type=float, default=1e-3)
    p.add_argument("--threads", type=int, default=0, help="compute threads; 0: torch's choice")
    p.add_argument("--seed", type=int, default=0)
    return p


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes the perturbed teacher, encodes the records; returns the options that both sides get."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastalign.data import load_records, sft_examples

    torch.manual_seed(args.seed)
    teacher = AutoModelForCausalLM.from_pretrained(args.stories, dtype="float32")
    with torch.no_grad():
        for weight in teacher.parameters():
            if weight.dim() == 2:
                weight.add_(torch.randn_like(weight) * args.noise * weight.std())
    tokenizer = AutoTokenizer.from_pretrained(args.stories)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    records = inputs.supervised_records(args.steps * args.batch_size * 2, Path("none"), args.seed)
    short = ({"prompt": r["prompt"][:120], "completion": r["completion"][: 60 + 20 * (i % 7)]} for i, r in enumerate(records))
    data = inputs.write_records(folder / "records.jsonl", short)
    found = sft_examples(load_records(str(data)), tokenizer, max_length=512)
    examples = [{"input_ids": list(s.ids), "scored": list(s.scored)} for s in found.segments]
    made = {"teacher": str(folder / "teacher"), "data": str(data), "output_dir": str(folder / "out"), "examples": examples}
    return vars(args) | {"model": args.stories, "max_steps": args.steps, "device": "cpu", "dtype": "float32"} | made


def check(beta: float, theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> str:
    """One line about a beta.

    Raises:
        RuntimeError: losses or gradient norms differ by more than rounding.
    """
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(theirs, ours, strict=True)]
    norms = [abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in zip(theirs, ours, strict=True)]
    trl, fastalign = (" ".join(format(step["loss"], ".5f") for step in steps) for steps in (theirs, ours))
    line = f"beta {beta:g}: loss by step {fastalign}; largest difference {max(gaps):.1e}, gradient norm {max(norms):.1e} (relative)"
    if not (max(gaps) < TOLERANCE and max(norms) < TOLERANCE):
        raise RuntimeError(f"the two sides compute different losses: {line}; in TRL {trl}")
    return line


def main() -> None:
    args = parser().parse_args()
    quiet_environment(args.threads)
    if not Path(args.stories).is_dir():
        print(f"skipped: {args.stories} not found; give --stories")
        return
    with tempfile.TemporaryDirectory(prefix="fastalign-peers-") as folder:
        options = prepare(args, Path(folder))
        print(f"{describe('trl', 'transformers', 'torch', 'fastalign')}\nGKD, {2 * args.batch_size} sequences a step, fp32, lmbda 0")
        for beta in args.betas:
            options["beta"] = beta
            print(check(beta, gkd_in_trl.train(options), gkd_in_fastalign.train(options)), flush=True)


if __name__ == "__main__":
    main()
