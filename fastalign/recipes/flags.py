"""Flags and YAML into the arguments' dataclasses: one conversion for both, errors that name the nearest valid ones."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from .. import catalogue
from ..catalogue import nearest
from .arguments import COMMANDS, Arguments

_ROW_OPTION = re.compile(r"(loss|advantage)\.\w+")  # --loss.epsilon: an argument of the row itself
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_POSITIVE = {
    *("lora_r", "max_length", "learning_rate", "adam_epsilon", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_tokens_per_micro_batch", "logging_steps", "max_completion_length", "max_num_seqs", "num_generations", "num_iterations"),
    *("num_kept", "num_rounds", "reward_timeout", "num_samples", "top_p", "max_num_batched_tokens", "divergence_temperature"),
    *("stream_window", "critic_learning_rate", "kl_horizon", "prm_learning_rate", "prm_beta", "max_turns", "environment_timeout"),
    *("num_beams", "num_expansions", "num_simulations", "block_size", "min_probability"),
}
_NOT_NEGATIVE = {
    *("max_samples", "eval_max_samples", "max_prompt_length", "warmup_steps", "weight_decay", "max_grad_norm", "max_chunk_bytes"),
    *("seed", "save_steps", "save_total_limit", "eval_steps", "temperature", "top_k", "min_p", "kv_cache_tokens"),
    *("beta", "epsilon", "epsilon_high", "adam_beta1", "adam_beta2", "importance_correction_low", "importance_correction_high"),
    *("port", "max_waiting", "label_smoothing", "desirable_weight", "undesirable_weight", "center_rewards_coefficient"),
    *("f_alpha_divergence_coef", "ld_alpha", "jsd_beta", "lmbda", "prompts_per_round"),
    *("critic_warmup", "value_clip", "kl_target", "reward_clip", "nll_coef", "outcome_coef", "exploration_coef", "mixture_coef"),
    *("max_step_tokens", "min_margin", "max_staleness"),
}
_AT_MOST_ONE = {
    "top_p",
    "min_p",
    "adam_beta1",
    "adam_beta2",
    "label_smoothing",
    "ld_alpha",
    "jsd_beta",
    "lmbda",
    "mixture_coef",
    "min_probability",
}
_EXPECTED = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def parse(command: str, argv: list[str]) -> dict[str, Any]:
    """Values by flag name: those of --config, overridden by flags. What is given nowhere is left out.

    Raises:
        ValueError: an unknown flag or key (the nearest are named), a value of the wrong type, an unknown choice.
        FileNotFoundError: the --config file does not exist.
    """
    rest, options = _split_row_options(command, argv)
    given, unknown = parser(command).parse_known_args(rest)
    for token in unknown:
        if not token.startswith("-"):
            raise ValueError(f"unexpected argument {token!r}: every value belongs to a flag; see fastalign {command} -h")
        name = token.lstrip("-").partition("=")[0]
        raise ValueError(f"{nearest(name, _names(command), prefix='--')} See fastalign {command} -h")
    flags, kinds = vars(given), flag_types(command)
    config = flags.pop("config")
    values = _read_config(command, Path(config)) if config else {}
    values |= {name: convert(name, kinds[name], value, f"--{name}", command) for name, value in flags.items()}
    return values | options


def build(command: str, values: Mapping[str, Any]) -> Arguments:
    """Distributes values by flag name over the command's dataclasses."""
    homes = {kind: section for section, kind in get_type_hints(Arguments).items()}
    sections: dict[str, Any] = {}
    for kind in COMMANDS[command]:
        sections[homes[kind]] = kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
    for row in ("loss", "advantage"):
        sections[f"{row}_options"] = {name.removeprefix(f"{row}."): v for name, v in values.items() if name.startswith(f"{row}.")}
    return Arguments(command=command, **sections)


@cache
def flag_types(command: str) -> dict[str, Any]:
    """Every flag of a command with its type."""
    return {name: kind for section in COMMANDS[command] for name, kind in get_type_hints(section).items()}


def flag_help(section: type) -> dict[str, str]:
    """Each field's line in the docstring's "Args:"."""
    _, _, text = (section.__doc__ or "").partition("Args:\n")
    found = re.findall(r"^        (\w+): (.*(?:\n {9,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in found}


def convert(name: str, kind: Any, value: Any, where: str, command: str = "grpo") -> Any:
    """A value from the command line (text) or from YAML, as flag `name`'s type `kind`.

    Args:
        command: whose tables the names of rows are looked up in.

    Raises:
        ValueError: says where the value was given, what was expected and what was got.
    """
    if kind == str | list[str]:  # one name or several
        names = convert(name, list[str], value, where, command)
        return names[0] if len(names) == 1 else names
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [convert(name, get_args(kind)[0], item, where, command) for item in items]
    if NoneType in get_args(kind):
        inner = next(arg for arg in get_args(kind) if arg is not NoneType)
        return None if value in (None, "none", "null") else convert(name, inner, value, where, command)
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind), where)
    rows = catalogue.ROWS.get(command, {})
    if name in rows and value != "":
        return _choice(value, rows[name], where)
    converted = _scalar(kind, value)
    if converted is None:
        raise ValueError(f"{where}: expected {_EXPECTED[kind]}, got {value!r}")
    _check_range(name, converted, where)
    return converted


def _check_range(name: str, value: Any, where: str) -> None:
    if isinstance(value, str):
        return  # another command's flag of that name is a number
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{where} must be > 0, got {value}")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{where} must be >= 0, got {value}")
    if name in _AT_MOST_ONE and value > 1:
        raise ValueError(f"{where} must be <= 1, got {value}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@cache
def parser(command: str) -> argparse.ArgumentParser:
    """argparse splits the words and lays out the help; `convert` reads the values, as it reads YAML's."""
    result = _Parser(
        prog=f"fastalign {command}",
        usage=f"fastalign {command} [--config FILE.yaml] [--flag value ...]",
        description=catalogue.COMMANDS[command],
        epilog=_epilog(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--config", metavar="FILE", help="YAML of flag: value; flags on the command line override it")
    for section in COMMANDS[command]:
        group = result.add_argument_group((section.__doc__ or "").partition(".")[0])
        texts, kinds, defaults = flag_help(section), get_type_hints(section), section()
        for f in fields(section):
            _add_flag(group, f.name, kinds[f.name], getattr(defaults, f.name), texts[f.name])
    return result


def _add_flag(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    if default not in ("", None, []):
        text += f" (default: {str(default).lower() if kind is bool else default})"
    options: dict[str, Any] = {"metavar": _metavar(kind), "help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if get_origin(kind) is list or list[str] in get_args(kind):
        options |= {"nargs": "+", "action": "extend"}
    elif bool in (kind, *get_args(kind)):
        options |= {"nargs": "?", "const": True}
    group.add_argument(f"--{name}", **options)


def _metavar(kind: Any) -> str:
    inner = kind if get_origin(kind) is Literal else next((arg for arg in get_args(kind) if arg is not NoneType), kind)
    if get_origin(inner) is Literal:
        return "{" + ",".join(get_args(inner)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "BOOL"}[inner]


def _epilog(command: str) -> str:
    tables = catalogue.ROWS.get(command)
    if not tables:
        return ""
    rows = "\n".join(f"  --{flag:10} {', '.join(table)}" for flag, table in tables.items())
    own = ", ".join(f"--{flag}.NAME VALUE" for flag, table in tables.items() if any(entry.options for entry in table.values()))
    return f"rows (fastalign algorithms says more):\n{rows}" + (f"\n  a row's own arguments: {own}" if own else "")


def _is_row_option(command: str, name: str) -> bool:
    """Whether --NAME is an argument of rows: of a table of the command in which some row has arguments."""
    table = catalogue.ROWS.get(command, {}).get(name.partition(".")[0], {})
    return bool(_ROW_OPTION.fullmatch(name)) and any(entry.options for entry in table.values())


def _names(command: str) -> list[str]:
    return [*flag_types(command), "config", "help"]


def _split_row_options(command: str, argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --loss.NAME VALUE and --advantage.NAME VALUE out; dashes in the other flags' names become underscores."""
    rest: list[str] = []
    options: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or " " in flag:
            rest.append(word)
        elif _is_row_option(command, name):
            text = value if equals else next(words, None)
            if text is None:
                raise ValueError(f"{flag}: expected a value")
            options[name] = _literal(text)
        else:
            rest.append(f"--{name}{equals}{value}")
    return rest, options


def _literal(text: str) -> Any:
    """A row's argument: its type is known only to the row, so numbers, booleans and none are read as such."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    words = {"true": True, "false": False, "none": None, "null": None}
    return words.get(text.lower(), text)


def _read_config(command: str, path: Path) -> dict[str, Any]:
    return checked(command, read_yaml(path, "--config"), f"--config {path}")


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """A YAML file of key: value lines.

    Raises:
        FileNotFoundError: there is none. ValueError: it is something else.
    """
    import yaml  # deferred: only --config and pipelines need it

    if not path.is_file():
        raise FileNotFoundError(f"{what}: there is no file {path}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{what} {path}: expected flag: value lines, got {type(loaded).__name__}")
    return loaded


def checked(command: str, given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Values by flag name, from a file's.

    Raises:
        ValueError: an unknown key (the nearest are named), a value of the wrong type, an unknown choice.
    """
    kinds, values = flag_types(command), {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if _is_row_option(command, name):
            values[name] = _literal(value) if isinstance(value, str) else value
        elif name in kinds:
            values[name] = convert(name, kinds[name], value, f"{where}: {key}", command)
        else:
            raise ValueError(f"{where}: {nearest(name, kinds, prefix='key ')}")
    return values


def _scalar(kind: type, value: Any) -> Any:
    """None where the value is not of the type. YAML reads 1e-5 as text, so text is looked into."""
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS.get(str(value).lower())
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if kind is str:
        return str(value)
    try:
        if kind is int and isinstance(value, str | int):
            return int(value)
        number = float(value)
    except ValueError:
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number if math.isfinite(number) else None


def _choice(value: Any, valid: Iterable[str], where: str) -> str:
    if value not in tuple(valid):
        raise ValueError(f"{where}: {nearest(str(value), valid)}")
    return value
