"""Loading records: files line by line, tables row by row, the Hub through `datasets`."""

from __future__ import annotations

import csv
import difflib
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .records import DataError, Record, columns_of, rename

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def load_records(
    name: str | Sequence[str], *, split: str = "train", columns: dict[str, str] | None = None, max_samples: int = 0
) -> list[Record]:
    """The records of a data set, or of several, one behind the other.

    Args:
        name: a .jsonl, .json (a list of objects, or objects one after another), .csv or .parquet file, a folder that
            `datasets` saved or that holds such files, or a Hub name ("openai/gsm8k:main" chooses a configuration).
        split: the split of a folder or Hub data set; files have none.
        columns: renames, theirs to ours, as `parse_dataset_map` gives them.
        max_samples: how many records to take from the front of each; 0: all.

    Raises:
        DataError: when there is no such data set, split or column. An unreadable line is no error here: see `Record`.
    """
    parts = load_parts([name] if isinstance(name, str) else name, split=split, columns=columns, max_samples=max_samples)
    return [record for part in parts for record in part]


def load_parts(
    names: Sequence[str], *, split: str = "train", columns: dict[str, str] | None = None, max_samples: int = 0
) -> list[list[Record]]:
    """The records of several data sets, each on its own; a rename is for those that have the column. See `load_records`."""
    if max_samples < 0:
        raise DataError(f"--max_samples: expected a count >= 0 (0: all), got {max_samples}")
    parts = []
    for name in names or [""]:
        parts.append(list(islice(read_records(name, split=split), max_samples or None)))
        if not parts[-1]:
            raise DataError(f"{name}: expected at least one record, got none")
    existing = [columns_of(part) for part in parts]
    for theirs, ours in (columns or {}).items():
        if not any(theirs in have for have in existing):
            rename([record for part in parts for record in part], {theirs: ours})  # raises, naming the nearest columns of all
    return [
        rename(part, {theirs: ours for theirs, ours in (columns or {}).items() if theirs in have})
        for part, have in zip(parts, existing, strict=True)
    ]


def read_records(name: str, *, split: str = "train") -> Iterator[Record]:
    """One data set's records, read as they are asked for (a file's are; of a .json file and a Hub data set all is read at once)."""
    if not name:
        raise DataError("expected a data set, got none; give --dataset_name a file, a folder or a Hub name")
    path = Path(name)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _rows(_load_folder(path, split), path.name)
    _refuse_missing_file(path)
    return _rows(_load_hub(name, split), name)


def _read_file(path: Path) -> Iterator[Record]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}, got {path.suffix or 'no suffix'!r}")
    return readers[path.suffix.lower()](path)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                if text:
                    yield _as_record(json.loads(text), path.name, line)
            except UnicodeDecodeError as error:
                yield Record({}, path.name, line, f"invalid UTF-8: {error.reason} at byte {error.start}")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Record({}, path.name, line, _invalid_json(error))


def _read_json(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, got {error.reason} at byte {error.start}") from error
    decoder, position, line, counted = json.JSONDecoder(), 0, 1, 0
    while True:
        # between objects stand white space, and in a list brackets and commas
        while position < len(text) and (text[position].isspace() or text[position] in "[],"):
            position += 1
        if position >= len(text):
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:  # where the next object begins cannot be known
            yield Record({}, path.name, line, _invalid_json(error) + "; nothing after it can be read")
            return
        yield _as_record(value, path.name, line)


def _invalid_json(error: Exception) -> str:
    return (
        f"invalid JSON: {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "invalid JSON: nested too deep"
    )


def _as_record(value: Any, source: str, line: int) -> Record:
    if isinstance(value, dict):
        return Record(value, source, line)
    return Record({}, source, line, f"invalid JSON: expected an object with columns, got {type(value).__name__}")


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(1 << 30)  # a story is longer than the default of 128 KiB
        reader = csv.DictReader(file, strict=True)
        while True:
            line = reader.line_num + 1 if reader.line_num else 2
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                yield Record({}, path.name, line, f"invalid CSV: {error}; nothing after it can be read")
                return
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                got = expected + len(row.get(None) or ()) - sum(value is None for value in row.values())  # type: ignore[call-overload]
                yield Record({}, path.name, line, f"invalid CSV: expected {expected} fields, got {got}")
            else:
                yield Record(row, path.name, line)


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = _require("pyarrow.parquet", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"{path}: expected a parquet file, got one that cannot be read: {error}") from error
    batches = (row for batch in file.iter_batches() for row in batch.to_pylist())
    return _rows(batches, path.name)


def _rows(rows: Iterable[dict[str, Any]], source: str) -> Iterator[Record]:
    return (Record(row, source, number) for number, row in enumerate(rows, 1))


def _load_folder(path: Path, split: str) -> Iterable[dict[str, Any]]:
    datasets = _require("datasets", "datasets")
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _load_hub(str(path), split)
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path}: expected a split of {list(found)}, got {split!r}{_nearest(split, list(found))}; give --dataset_split")
        return found[split]
    return found


def _load_hub(name: str, split: str) -> Iterable[dict[str, Any]]:
    datasets = _require("datasets", "datasets")
    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the library raises a dozen kinds: no such name, split or configuration, no network
        raise DataError(f"{name}: cannot load split {split!r} of this data set: {type(error).__name__}: {error}") from error


def _refuse_missing_file(path: Path) -> None:
    looks_local = path.suffix.lower() in _SUFFIXES or path.is_absolute() or str(path).startswith(".") or len(path.parts) > 2
    if looks_local:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{_nearest(path.name, siblings)}")


def _nearest(wanted: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"reading this data set needs the package {package!r}: pip install {package}") from error
