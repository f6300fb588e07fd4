"""A data set that is never all in memory: read as it is needed, shuffled in a window, tokenized in chunks, resumable to the record."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from ..packing import Segment
from .dialects import normalize_all
from .encoders import Scored, SupervisedEncoder, supervised_format
from .examples import Limits, supervised_segments
from .load import read_records
from .records import BadRecord, DataError, Record, Skips, columns_of, rename

CHUNK = 256  # records tokenized together; tokenizers are several times faster on a list than on one text
HEAD = 1024  # records that the format and the renames are checked on

Read = Callable[[], Iterator[Record]]
Encode = Callable[[Sequence[Record]], list[Segment]]


class SegmentStream:
    """Token trees of a data set that is read again in every epoch.

    Records are read `window` at a time; each window is shuffled by the seed, the epoch and its number, and encoded in chunks in
    that order. So at most a window of records and a chunk of trees are held, and a resume reads up to the window it stood in,
    which it shuffles again, without having to save it.

    Args:
        read: starts reading from the beginning; the same records in the same order every time.
        encode: the trees of a chunk of records, in order; bad records are left out or raised there.
        window: records that are shuffled together.
        seed: chooses the order.
        shuffle: shuffle each window; otherwise the order of reading is kept.
    """

    def __init__(self, read: Read, encode: Encode, *, window: int = 10_000, seed: int = 0, shuffle: bool = True) -> None:
        if window < 1:
            raise DataError(f"--stream_window: expected at least 1 record, got {window}")
        self.read, self.encode, self.window, self.seed, self.shuffle = read, encode, window, seed, shuffle
        self.epoch, self.window_number, self.chunk_number = 0, -1, 0  # of the chunk at hand; -1: nothing is read yet
        self.position = 0  # trees of the chunk that are given out
        self.num_records = 0  # of the whole data set; 0 until an epoch is over
        self._begin()

    def _begin(self) -> None:
        """Before the first record of an epoch."""
        self.window_number, self.chunk_number, self.position, self.given = -1, 0, 0, 0
        self._records: Iterator[Record] | None = None
        self._window: list[Record] = []
        self._chunk: list[Segment] = []

    @property
    def progress(self) -> float:
        """Epochs done; within the first one, whose length is not known yet, 0."""
        done = max(self.window_number, 0) * self.window + self.chunk_number * CHUNK
        return self.epoch + (min(done / self.num_records, 1.0) if self.num_records else 0.0)

    def next_batch(self, batch_size: int) -> list[Segment]:
        """The next `batch_size` trees, going over into the next epoch where this one ends.

        Raises:
            DataError: a whole epoch has not one good record.
        """
        batch: list[Segment] = []
        while len(batch) < batch_size:
            if self.position == len(self._chunk):
                self._next_chunk()
            found = self._chunk[self.position : self.position + batch_size - len(batch)]
            batch += found
            self.position += len(found)
            self.given += len(found)
        return batch

    def _next_chunk(self) -> None:
        """Goes on to the chunk behind the one at hand, if need be to the next window or epoch."""
        self.chunk_number += 1
        if self.chunk_number * CHUNK >= len(self._window):
            read = max(self.window_number, 0) * self.window + len(self._window)
            self.window_number, self.chunk_number = self.window_number + 1, 0
            self._read_window()
            if not self._window:
                if not self.given:
                    raise DataError(f"no record is left: a pass over the {read} records of the streamed data set gave none")
                self.num_records = read
                self.epoch += 1
                self._begin()
                return self._next_chunk()
        self._encode_chunk()

    def _read_window(self) -> None:
        if self._records is None:
            self._records = islice(self.read(), self.window_number * self.window, None)
        self._window = list(islice(self._records, self.window))
        if self.shuffle:
            random.Random(f"fastalign stream {self.seed} {self.epoch} {self.window_number}").shuffle(self._window)

    def _encode_chunk(self) -> None:
        begin = self.chunk_number * CHUNK
        self._chunk, self.position = self.encode(self._window[begin : begin + CHUNK]), 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it belongs to."""
        names = ("epoch", "window_number", "chunk_number", "position", "given", "num_records", "window", "seed", "shuffle")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; reads up to there. Raises DataError when window, seed or data are not the same."""
        for name in ("window", "seed", "shuffle"):
            if state.get(name) != getattr(self, name):
                raise DataError(
                    f"the checkpoint's stream has {name}={state.get(name)}, this run has {getattr(self, name)}; "
                    "resume with the data, seed, --shuffle and --stream_window that it was made with"
                )
        self._begin()
        self.epoch, self.num_records = state["epoch"], state["num_records"]
        if state["window_number"] < 0:
            return
        self.window_number, self.chunk_number = state["window_number"], state["chunk_number"]
        self._read_window()
        self._encode_chunk()
        self.position, self.given = state["position"], state["given"]
        if self.position > len(self._chunk):
            raise DataError("the checkpoint's stream stands behind what there is now; resume with the data that it was made with")


class Reader:
    """Reads data sets one behind the other, record by record, from the beginning at each call.

    Args:
        names, split, columns, max_samples: as for `load.load_parts`.

    Attributes:
        head: the first records of each, `HEAD` in all.

    Raises:
        DataError: a .json file, of which all would be read at once; a rename that no record of the head has.
    """

    def __init__(self, names: Sequence[str], *, split: str = "train", columns: dict[str, str] | None = None, max_samples: int = 0) -> None:
        whole = [name for name in names if name.lower().endswith(".json")]
        if whole:
            raise DataError(f"--streaming: {whole[0]} can only be read as a whole; write it as .jsonl, one record a line, or as .parquet")
        self.names, self.split, self.columns, self.max_samples = names, split, columns or {}, max_samples
        each = min(HEAD // len(names) or 1, max_samples or HEAD)
        head = [record for name in names for record in islice(read_records(name, split=split), each)]
        missing = {theirs: ours for theirs, ours in self.columns.items() if theirs not in columns_of(head)}
        if missing:
            rename(head, missing)  # raises, naming the nearest columns
        self.head = [self._renamed(record) for record in head]

    def __call__(self) -> Iterator[Record]:
        for name in self.names:
            for record in islice(read_records(name, split=self.split), self.max_samples or None):
                yield self._renamed(record)

    def _renamed(self, record: Record) -> Record:
        have = {theirs: ours for theirs, ours in self.columns.items() if theirs in record}
        return rename([record], have)[0] if have else record


class _EncoderBySource:
    """Encodes each record in the format that most of the first records of its source have."""

    def __init__(self, head: Sequence[Record], tokenizer: Any, system_prompt: str) -> None:
        self._encoders = {
            source: SupervisedEncoder(tokenizer, supervised_format([record for record in head if record.source == source]), system_prompt)
            for source in {record.source for record in head}
        }

    def __call__(self, records: Sequence[Record]) -> list[Scored | BadRecord]:
        found: dict[int, Scored | BadRecord] = {}
        for source in {record.source for record in records}:
            own = [i for i, record in enumerate(records) if record.source == source]
            found |= dict(zip(own, self._encoders[source]([records[i] for i in own]), strict=True))
        return [found[i] for i in range(len(records))]


def supervised_encoding(head: Sequence[Record], tokenizer: Any, limits: Limits, *, on_bad_record: str, system_prompt: str = "") -> Encode:
    """How a stream of supervised records that begins like this is encoded; each data set has its own format."""
    encode, skips = _EncoderBySource(normalize_all(head), tokenizer, system_prompt), Skips(on_bad_record)
    return lambda records: [segment for _, segment in supervised_segments(normalize_all(records), encode, limits, skips)]
