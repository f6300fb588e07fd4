"""The command `fastalign`. torch is imported only when a recipe runs, so that help and errors come at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, catalogue
from .catalogue import nearest
from .recipes.arguments import COMMANDS, Arguments, DemoArguments
from .recipes.flags import build, parse, parser

# command → the module of `recipes` whose `run` trains
RECIPES = {
    "sft": "sft",
    "reward": "reward",
    "dpo": "preference",
    "kto": "unpaired",
    "rft": "rejection",
    "distill": "distill",
    "grpo": "online",
    "ppo": "ppo",
}
WITHOUT_TRAINING = {"critique": "critique", "eval": "evaluate", "search": "search"}  # those whose `run` only samples

MIXING = ("sft",)  # commands that draw from several data sets by weight, or from a stream
WITHOUT_CHUNKS = ("reward", "distill")  # commands that have no logits, or whose op chooses how many it holds


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 for a user's error, 130 when interrupted.

    An error raised by fastalign itself, or by the file system, is one line; FASTALIGN_DEBUG=1 shows the traceback.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:
        print(f"fastalign: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastalign algorithms | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get("FASTALIGN_DEBUG") == "1" or not _is_user_error(error):
            raise
        print(f"fastalign: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_overview())
    elif command == "--version":
        print(f"fastalign {__version__}")
    elif command not in catalogue.COMMANDS:
        raise ValueError(nearest(command, catalogue.COMMANDS, prefix="command "))
    elif command == "run":
        _run_pipeline(rest)
    elif command in COMMANDS and not {"-h", "--help"} & set(rest):
        _start(command, parse(command, rest))
    elif command in COMMANDS:
        print(parser(command).format_help(), end="")
    elif rest and not {"-h", "--help"} & set(rest):
        raise ValueError(f"fastalign {command} takes no arguments, got {' '.join(rest)}")
    elif command == "env" and not rest:
        _print_env()
    else:
        print(_tables() if command == "algorithms" else f"fastalign {command}: {catalogue.COMMANDS[command]}")
    return 0


def _run_pipeline(argv: list[str]) -> None:
    """fastalign run FILE.yaml [--restart STAGE] [--dry_run]."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"fastalign run: {message}; see fastalign run -h")

    p = Parser(prog="fastalign run", description=f"{catalogue.COMMANDS['run']}; docs/pipelines.md says how a file is written.")
    p.add_argument("pipeline", metavar="FILE.yaml", type=Path, help="the stages")
    p.add_argument("--restart", metavar="STAGE", default="", help="run this stage and all that follow anew")
    p.add_argument("--dry_run", action="store_true", help="check everything and print what would run")
    if {"-h", "--help"} & set(argv):
        print(p.format_help(), end="")
        return
    given = p.parse_args(argv)
    from .recipes import pipeline

    def check(command: str, values: dict[str, Any], made: Sequence[Path]) -> None:
        check_required(build(command, values), made)

    pipeline.run(given.pipeline, _start, check, restart=given.restart, dry_run=given.dry_run)


def _start(command: str, values: dict[str, Any]) -> None:
    """Checks what can be checked without torch, then imports the recipe and runs it."""
    import logging

    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("fastalign").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import of kernels that nobody asked for; peft imports it
    if command == "demo":
        options = DemoArguments(**values)
        from .recipes import demo

        try:
            demo.run(options.output_dir, options.seed, quick=options.quick)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the demo begins anew when it is run again") from None
        return
    args = build(command, values)
    check_required(args)
    if command == "generate":
        from .recipes import generate

        generate.run(args.model, args.data, args.sampling, args.generate, args.pairs, args.environment)
        return
    if command in WITHOUT_TRAINING:
        importlib.import_module(f".recipes.{WITHOUT_TRAINING[command]}", __package__).run(args)
        return
    if command == "serve":
        from .recipes import serve

        serve.run(args.model, args.serve)
        return
    outcome = importlib.import_module(f".recipes.{RECIPES[command]}", __package__).run(args)
    if args.run.dry_run:
        _print_values(outcome)  # the plan
    else:
        print(f"done: {Path(args.run.output_dir) / 'report.html'}")


def check_required(args: Arguments, made: Sequence[Path] = ()) -> None:
    """What a command cannot do without, said before torch is imported.

    Args:
        made: folders that will be there when it runs.

    Raises:
        ValueError: a flag is missing, or a reward is none.
        FileNotFoundError: the model or data is a local path, and there is nothing there.
    """
    check_given(args)
    paths = {"--model_name_or_path": args.model.model_name_or_path, "--tokenizer_name_or_path": args.model.tokenizer_name_or_path}
    paths |= {"--ref_model_name_or_path": args.reference.ref_model_name_or_path}
    paths |= {"--teacher_model_name_or_path": args.distill.teacher_model_name_or_path}
    paths |= {"--critic_model_name_or_path": args.ppo.critic_model_name_or_path}
    paths |= {"--eval_dataset_name": args.data.eval_dataset_name}
    names = [args.data.dataset_name] if isinstance(args.data.dataset_name, str) else args.data.dataset_name
    for flag, name in [*paths.items(), *(("--dataset_name", name) for name in names)]:
        later = any(Path(name).is_relative_to(folder) for folder in made)
        if name and _is_local(name) and not later and not Path(name).expanduser().exists():
            raise FileNotFoundError(f"{flag}: there is no {name} (looked in {Path.cwd()})")
    for name in (*args.online.reward, *args.rejection.reward, *args.evaluate.reward):
        if not name.startswith("judge:") and (":" in name or "/" not in name) and not Path(name).is_dir():  # a model's otherwise
            from .rewards.specifications import place_of

            place_of(name)


def check_given(args: Arguments) -> None:
    """Raises ValueError where a flag is missing that the command needs, or given that it does not read."""
    required = {"--model_name_or_path": bool(args.model.model_name_or_path)}
    if args.command != "serve":
        required["--dataset_name"] = bool(args.data.dataset_name or args.generate.prompt)
    if args.command in ("grpo", "ppo", "rft", "eval"):
        rewards = args.online.reward or args.rejection.reward or args.evaluate.reward or args.win_rate.judge
        required["--reward"] = bool(rewards or args.environment.environment)  # which may give one itself
    if args.command == "distill":
        required["--teacher_model_name_or_path"] = bool(args.distill.teacher_model_name_or_path)
    missing = [flag for flag, given in required.items() if not given]
    if missing:
        raise ValueError(f"fastalign {args.command} needs {' and '.join(missing)}; see fastalign {args.command} -h")
    for flag in ("dataset_weights", "streaming"):
        if getattr(args.data, flag) and args.command not in MIXING:
            raise ValueError(f"--{flag} is for {' and '.join(MIXING)}; fastalign {args.command} takes every record once an epoch")
    if args.batch.max_chunk_bytes and args.command in WITHOUT_CHUNKS:
        raise ValueError(f"--max_chunk_bytes: fastalign {args.command} does not read it; leave it out")


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: Hub names are NAME or OWNER/NAME."""
    data_file = name.endswith((".jsonl", ".json", ".csv", ".parquet"))
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or data_file or "\\" in name


def _is_user_error(error: BaseException) -> bool:
    """Whether fastalign raised it on purpose, or the file system did: a library's own ValueError may be a bug of ours."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _overview() -> str:
    commands = "\n".join(f"  {name:12}{text}" for name, text in catalogue.COMMANDS.items())
    return (
        "usage: fastalign COMMAND [--config FILE.yaml] [--flag value ...]\n\n"
        "Post-training of language models that computes everything once.\n\n"
        f"commands:\n{commands}\n\n"
        "  fastalign COMMAND -h lists a command's flags; --version prints the version.\n"
        "  FASTALIGN_DEBUG=1 shows the traceback of an error."
    )


def _tables() -> str:
    blocks = []
    for command, tables in catalogue.ROWS.items():
        for flag, table in tables.items():
            lines = [f"fastalign {command} --{flag}"]
            for name, entry in table.items():
                lines.append(f"  {name:23}{entry.help}{f' [{entry.paper}]' if entry.paper else ''}")
                if entry.options:
                    lines.append(f"  {'':23}{'  '.join(f'--{flag}.{option}' for option in entry.options)}")
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _print_env() -> None:
    from .environment import env

    _print_values(env())


def _print_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:26}{item}")
        else:
            print(f"{name:28}{value}")
