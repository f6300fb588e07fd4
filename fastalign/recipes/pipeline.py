"""`fastalign run pipeline.yaml`: commands in turn, each from the model that the one before has left; a broken-off pipeline goes on.

torch-free until a stage runs, so that a wrong key in the last stage is told before the first begins.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..catalogue import nearest
from ..training.files import write_atomic
from .flags import checked, flag_types, read_yaml

TRAINING = ("sft", "reward", "dpo", "kto", "rft", "distill", "grpo", "ppo")  # commands that leave a model
STAGES = (*TRAINING, "generate", "critique", "eval", "search")
NOTE = "stage.json"  # in a stage's folder: the flags that it began with, and the seconds it took once it is finished
_NAME, _REFERENCE = re.compile(r"[A-Za-z][\w-]*"), re.compile(r"\{([A-Za-z][\w-]*)\}")
_KEYS = ("output_dir", "defaults", "stages")
FIXED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir")  # a stage's, given by the pipeline
_OF_COMMANDS = ("file", "record")  # what the reward command:run=… fills in

Start = Callable[[str, dict[str, Any]], None]
Check = Callable[[str, dict[str, Any], Sequence[Path]], None]


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
        name: what other stages call it.
        command: a name of `STAGES`.
        values: its flags, checked, with paths in place of references.
        folder: where its outputs go.
    """

    name: str
    command: str
    values: dict[str, Any]
    folder: Path

    @property
    def plain(self) -> dict[str, Any]:
        """The flags as JSON has them."""
        return json.loads(json.dumps(self.values))

    def finished(self) -> bool:
        """Whether it ran to its end.

        Raises:
            ValueError: it did, with other flags than it has now.
        """
        if self.note().get("seconds") is None:
            return False
        if other := self.changed():
            raise ValueError(
                f"stage {self.name}: it was run with other {', '.join(other)}; add --restart {self.name} to run it and what follows again"
            )
        return True

    def note(self) -> dict[str, Any]:
        """What an earlier run noted in the folder; empty where it never began."""
        path = self.folder / NOTE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def changed(self) -> list[str]:
        """The flags that differ from those it began with; none where it never began."""
        known = self.note().get("flags", self.plain)
        return sorted(name for name in {*known, *self.plain} if known.get(name) != self.plain.get(name))

    def write_note(self, seconds: float | None) -> None:
        """Notes the flags; seconds: None while it is not finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / NOTE, json.dumps({"flags": self.plain, "seconds": seconds}, indent=1) + "\n")


def read(path: Path) -> list[Stage]:
    """The stages of a pipeline, every flag checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no stages, an unknown key, command or reference, a name that is taken, a value of the wrong type.
    """
    given, where = read_yaml(path, "run"), str(path)
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"{where}: {nearest(str(key), _KEYS, prefix='key ')}")
    listed, defaults = given.get("stages"), given.get("defaults") or {}
    if not isinstance(listed, list) or not listed or not all(isinstance(each, dict) for each in listed):
        raise ValueError(f"{where}: expected stages, a list of flags each, with a name and a command")
    if not isinstance(defaults, dict):
        raise ValueError(f"{where}: expected defaults as flag: value lines, got {type(defaults).__name__}")
    _check_defaults(defaults, where)
    root, stages = Path(str(given.get("output_dir") or f"runs/{path.stem}")), list[Stage]()
    for number, each in enumerate(listed, 1):
        stages.append(_stage(number, dict(each), defaults, root, stages, where))
    return stages


def _check_defaults(defaults: Mapping[Any, Any], where: str) -> None:
    """A default that no command reads is misspelt."""
    known = {name for command in STAGES for name in flag_types(command)}
    for key in defaults:
        if str(key).replace("-", "_") in FIXED:
            raise ValueError(f"{where}: defaults: {key} is the pipeline's own to give; leave it out")
        if str(key).replace("-", "_") not in known:
            raise ValueError(f"{where}: defaults: {nearest(str(key), known, prefix='key ')}")


def _fits(command: str, key: str, value: Any) -> bool:
    """Whether the command has a default's flag; search's --save_steps is a file, that of the trainers a number."""
    kind = flag_types(command).get(key.replace("-", "_"))
    return kind is not None and not (kind is str and isinstance(value, (int, float)))


def _stage(number: int, given: dict[str, Any], defaults: Mapping[Any, Any], root: Path, before: list[Stage], where: str) -> Stage:
    name, command = str(given.pop("name", "")), str(given.pop("command", ""))
    here = f"{where}: stage {number}" + (f" ({name})" if name else "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{here}: expected a name of letters, digits, - and _, got {name!r}")
    if name in {stage.name for stage in before}:
        raise ValueError(f"{here}: the name is taken by an earlier stage")
    if command not in STAGES:
        raise ValueError(f"{here}: {nearest(command, STAGES, prefix='command ')}")
    folder = root / f"{number}-{name}"
    for fixed in FIXED:
        if fixed in given:
            raise ValueError(f"{here}: {fixed} is the pipeline's own to give; leave it out")
    flags = {key: value for key, value in defaults.items() if _fits(command, str(key), value)} | given
    known = {stage.name: stage.folder for stage in before}
    values = checked(command, {key: _resolved(value, known, here) for key, value in flags.items()}, here)
    models = [stage for stage in before if stage.command in TRAINING and stage.command != "reward"]
    if not values.get("model_name_or_path"):
        if not models:
            raise ValueError(f"{here}: the first model is named nowhere; give model_name_or_path")
        values["model_name_or_path"] = str(models[-1].folder)
    if command == "generate":
        values.setdefault("output_file", str(folder / "completions.jsonl"))
    else:
        values["output_dir"] = str(folder)
    return Stage(name, command, values, folder)


def _resolved(value: Any, folders: Mapping[str, Path], where: str) -> Any:
    """The value with {name} replaced by that stage's folder, in text and lists of it."""
    if isinstance(value, list):
        return [_resolved(item, folders, where) for item in value]
    if not isinstance(value, str):
        return value
    filled_in = _OF_COMMANDS if value.startswith("command:") else ()  # later, by the reward
    for name in _REFERENCE.findall(value):
        if name not in folders and name not in filled_in:
            raise ValueError(f"{where}: {{{name}}} is no earlier stage; there are {', '.join(folders) or 'none'}")
    return _REFERENCE.sub(lambda match: str(folders.get(match[1], match[0])), value)


def run(path: Path, start: Start, check: Check = lambda command, values, made: None, *, restart: str = "", dry_run: bool = False) -> None:
    """Runs the stages that are not finished, in order.

    Args:
        start: runs a command with its flags (`cli.start`).
        check: raises ValueError or OSError where a command cannot be run with its flags, and the folders that earlier stages will have
            made; asked of every stage before the first begins.
        restart: from this stage on everything is run anew.
        dry_run: tells what would run, and runs nothing.

    Raises:
        ValueError: as `read`; a finished stage has other flags now; `restart` names no stage.
    """
    stages = read(path)
    for number, stage in enumerate(stages):
        try:
            check(stage.command, stage.values, [earlier.folder for earlier in stages[:number]])
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {stage.name}: {error}") from None
    names = [stage.name for stage in stages]
    if restart and restart not in names:
        raise ValueError(f"--restart: {nearest(restart, names, prefix='stage ')}")
    first = names.index(restart) if restart else len(stages)
    todo = [number >= first or not stage.finished() for number, stage in enumerate(stages)]
    if True in todo:  # what follows a stage that runs is out of date
        todo = [wanted or number > todo.index(True) for number, wanted in enumerate(todo)]
    for number, (stage, wanted) in enumerate(zip(stages, todo, strict=True)):
        title = f"stage {number + 1}/{len(stages)} {stage.name}: fastalign {stage.command}"
        if not wanted:
            print(f"{title}: finished, in {stage.folder}", flush=True)
        elif dry_run:
            print(f"{title} → {stage.folder}\n" + "".join(f"  {name}: {value}\n" for name, value in stage.values.items()), end="")
        else:
            print(title, flush=True)
            anew = number >= first or stage.note().get("seconds") is not None
            if not anew and (other := stage.changed()):
                raise ValueError(
                    f"stage {stage.name}: it was broken off with other {', '.join(other)}; put them back to go on, or add"
                    f" --restart {stage.name} to run it and what follows anew"
                )
            _run_stage(stage, start, anew=anew)


def _run_stage(stage: Stage, start: Start, *, anew: bool) -> None:
    """Runs one stage: anew, or from its last checkpoint."""
    if anew and stage.command in TRAINING:  # before the note has its flags: an early end must not leave another run's checkpoints
        for checkpoint in stage.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    stage.write_note(None)
    values, began = dict(stage.values), time.perf_counter()
    if stage.command == "generate":
        if anew:
            Path(values["output_file"]).unlink(missing_ok=True)
    elif anew:
        values["overwrite_output_dir"] = True
    elif stage.command in TRAINING:
        values["resume_from_checkpoint"] = "latest"
    try:
        start(stage.command, values)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped in stage {stage.name}; the same fastalign run goes on from there") from None
    stage.write_note(time.perf_counter() - began)
