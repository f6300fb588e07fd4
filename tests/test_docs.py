"""The documentation agrees with the code it is about."""

import json
import re
from pathlib import Path

import pytest

from bench import methods
from fastalign import catalogue
from fastalign.data import Record, sft_examples
from fastalign.recipes.arguments import COMMANDS
from fastalign.recipes.flags import flag_types

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_methods_page_is_current():
    assert methods.PAGE.read_text(encoding="utf-8") == methods.page(), "run python -m bench.methods"


def test_methods_page_has_every_row():
    text = methods.page()
    for tables in catalogue.ROWS.values():
        for flag, table in tables.items():
            assert f"| `--{flag}` |" in text
            assert all(f"| `{name}` |" in text for name in table)


@pytest.mark.parametrize("table", methods.TESTS)
def test_methods_page_names_tests_that_are_about_the_rows(table):
    """The file names each row, or walks through the table."""
    text = (ROOT / methods.TESTS[table]).read_text(encoding="utf-8")
    whole = {table, table.removesuffix("_LOSSES")} & set(re.findall(r"\b[A-Z_]+\b", text))
    missing = [name for name in getattr(catalogue, table) if not re.search(rf"\b{name}\b", text)]
    assert whole or not missing, f"{methods.TESTS[table]} says nothing of {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_flags_and_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    known = {name for command in COMMANDS for name in flag_types(command)}
    known |= {"config", "restart"}  # of the parser, and of fastalign run
    known |= {"check", "json", "model", "only"}  # of bench scripts
    known |= {"model_args", "tasks"}  # of the lm-evaluation-harness
    unknown = set(re.findall(r"--([a-z][a-z_0-9]+)\b(?!\.)", text)) - known
    assert not unknown, f"{page.name} names flags that no command has: {sorted(unknown)}"
    links = re.findall(r"\]\(([^)#]+)", text)
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


def test_data_page_examples_are_read_as_it_says():
    """Each ```json line of the supervised formats becomes a scored example."""
    from test_dialects import QWEN, tokenizer_of

    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = text.partition("## Supervised")[2].partition("\n## ")[0]
    lines = [line for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL) for line in block.strip().splitlines()]
    assert len(lines) >= 6
    tokenizer = tokenizer_of(QWEN)
    for line in lines:
        segment = sft_examples([Record(json.loads(line), "docs/data.md", 1)], tokenizer, max_length=4000).segments[0]
        assert any(segment.scored)


def test_rewards_page_names_every_built_in_reward_and_parameter():
    import inspect

    from fastalign.rewards import BUILTIN

    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    for name, row in BUILTIN.items():
        assert f"`{name}`" in text
        for parameter in inspect.signature(row.function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert re.search(rf"\b{parameter.name}\b", text), f"{name}: {parameter.name}"
                assert name == "command" or f"`{parameter.name}=" in text, f"{name}: {parameter.name}"
