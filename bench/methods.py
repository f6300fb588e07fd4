"""Writes docs/algorithms.md, a table of every method, from the catalogue.

    python -m bench.methods [--check]

--check writes nothing and fails when the file says something else (a test runs it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastalign import catalogue
from fastalign.catalogue import Entry

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
# table of the catalogue → the test that holds its equations against the papers; each row is named there, or the table is walked through
TESTS = {
    "ALGORITHMS": "tests/test_recipes.py",
    "ADVANTAGES": "tests/test_advantages.py",
    "ACTOR_CRITICS": "tests/test_ppo.py",
    "TOKEN_ADVANTAGES": "tests/test_ppo.py",
    "POLICY_LOSSES": "tests/test_policy_losses.py",
    "AGGREGATES": "tests/test_policy_losses.py",
    "PREFERENCE_LOSSES": "tests/test_preference_losses.py",
    "UNPAIRED_LOSSES": "tests/test_preference_losses.py",
    "SUPERVISED_LOSSES": "tests/test_supervised_losses.py",
    "REWARD_LOSSES": "tests/test_reward_losses.py",
    "DIVERGENCES": "tests/test_linear_kl.py",
    "ADAPTERS": "tests/test_adapters.py",
}
INTRODUCTION = """# Methods

<!-- written by python -m bench.methods from fastalign/catalogue.py -->

Every method is a row of a table, named by a flag; `fastalign algorithms` prints the same. A row's own arguments are given as
`--loss.NAME` and `--advantage.NAME` and default to its paper's values. Where no row has TRL's name, the row says which one means it.
"""


def page() -> str:
    """The whole file."""
    blocks = [INTRODUCTION]
    for command, tables in catalogue.ROWS.items():
        blocks.append(f"## fastalign {command}\n\n{catalogue.COMMANDS[command][0].upper()}{catalogue.COMMANDS[command][1:]}.\n")
        blocks += [table_of(flag, table) for flag, table in tables.items()]
    blocks.append("## Adapters\n\nOf every training command; [adapters.md](adapters.md) says more.\n")
    blocks.append(table_of("peft_method", catalogue.ADAPTERS))
    return "\n".join(blocks)


def table_of(flag: str, table: dict[str, Entry]) -> str:
    """One Markdown table."""
    tests = TESTS.get(name_of(table), "")
    named = f"[{Path(tests).name}](../{tests})" if tests else ""
    lines = [f"| `--{flag}` | what | paper | its own flags | tests |", "|---|---|---|---|---|"]
    for name, entry in table.items():
        text = entry.help + (f" (TRL's `{entry.trl}`)" if entry.trl else "")
        flags = " ".join(f"`--{flag}.{option}`" for option in entry.options)
        lines.append(f"| `{name}` | {escaped(text)} | {paper_of(entry)} | {flags} | {named} |")
    return "\n".join(lines) + "\n"


def name_of(table: dict[str, Entry]) -> str:
    """What the catalogue calls the table."""
    return next(name for name, value in vars(catalogue).items() if value is table)


def paper_of(entry: Entry) -> str:
    """The paper, linked where it has a number."""
    number = entry.paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != entry.paper else entry.paper


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is not current")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page():
            raise SystemExit(f"{PAGE} is not what the catalogue says; run python -m bench.methods")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
