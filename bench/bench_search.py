"""Search against greedy decoding: what more tokens buy, on the demo's additions.

    python -m bench.bench_search [--seed 0] [--json FILE] [--folder DIR]

The model is the cold start of `fastalign demo`, as it is; every method draws from it. What guides them is a process reward model of
`bench.learn`: it judges each digit of an answer, and has seen neither the held-out problems nor the policy's samples. All methods run by
`fastalign search` in one table: held-out accuracy on 400 problems, and tokens a problem.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import learn_offline, learn_setting
from bench.harness import write_record
from fastalign.recipes.arguments import Arguments, SamplingArguments, SearchArguments
from fastalign.recipes.search_arguments import Method

METHODS: list[Method] = ["greedy", "best_of_n", "majority", "weighted", "beam", "mcts"]
BY_STEPS: list[Method] = ["beam", "mcts"]  # methods that the number of expansions is for
EXPANSIONS = (4, 8)


def train(root: Path, seed: int) -> learn_setting.Setting:
    """The problems, the cold start, and the model of steps in `process`; what a folder already has is kept."""
    from fastalign.recipes import demo, sft

    files = demo.prepare(root, seed)
    setting = learn_setting.Setting(root, files, seed)
    if not (root / "sft" / "summary.json").exists():
        sft.run(demo.cold_start(root, files, seed, quick=False))
    if not (root / "process" / "summary.json").exists():
        print(learn_offline.process(setting), flush=True)
    return setting


def arguments(setting: learn_setting.Setting, num_expansions: int, **changes: Any) -> Arguments:
    """`fastalign search`: a digit is a step."""
    own = SearchArguments(
        output_dir=str(setting.root / f"search-{num_expansions}"),
        method=METHODS if num_expansions == EXPANSIONS[-1] else BY_STEPS,
        num_expansions=num_expansions,
        scorer=str(setting.root / "process"),
        step_separator="",
        max_step_tokens=1,
        vote="text",
        reward=[learn_setting.REWARD],
        block_size=2,
        seed=setting.seed,
    )
    args = setting.arguments("search", "search", setting.files["heldout"], 1)
    return replace(args, sampling=SamplingArguments(max_completion_length=8), search=replace(own, **changes))


def markdown(summary: dict[str, Any]) -> str:
    """The table of docs/search.md."""
    lines = ["| method | accuracy | any right | drawn | prefilled | reused | scored |", "|---|---|---|---|---|---|---|"]
    for method, own in summary.items():
        counts = " | ".join(f"{own[name]:.1f}" for name in ("num_tokens", "num_prefilled", "num_reused", "num_scored"))
        lines.append(f"| {method} | {own['accuracy']['value']:.1%} | {own['any_right']:.1%} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m bench.bench_search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folder", type=Path, help="train and search here, and go on from what is there; default: a temporary folder")
    p.add_argument("--json", type=Path, help="write what was found to this file")
    args = p.parse_args()
    from fastalign.recipes import search

    with tempfile.TemporaryDirectory(prefix="fastalign-search-") as temporary:
        setting = train(args.folder or Path(temporary), args.seed)
        summary = {}
        for num_expansions in EXPANSIONS[::-1]:
            for method, found in search.run(arguments(setting, num_expansions)).items():
                summary[f"{method}, {num_expansions} expansions" if method in BY_STEPS else method] = found
    print(markdown(summary))
    if args.json:
        write_record(args.json, {"seed": args.seed, "methods": summary})


if __name__ == "__main__":
    main()
