"""The reference's log-probs of given sequences: each computed once, before training, and kept on disk.

Scoring comes before the first update, so the model that is about to be trained is its own reference and no copy of it is held.
The file belongs to the reference's weights (a digest names it) and holds each sequence by a digest of its tokens: another run
with the same reference finds whatever sequences they share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.adapters import is_adapted, reference_disabled
from ..models.backbone import causal_lm, head_of
from ..models.load import load_causal_lm
from ..packing import Segment, pack, split_by_tokens
from ..training.files import TEMPORARY_SUFFIX, disk_errors, fsync_directory, fsync_file
from ..training.step import score
from .arguments import Arguments
from .setup import Loaded

log = logging.getLogger("fastalign")

_DIGEST_BYTES = 16
_WINDOW = 512  # sequences that are cut into micro-batches together, and saved together


@dataclass(frozen=True)
class ReferenceCache:
    """The log-probs that one folder keeps.

    Attributes:
        folder: where; None: nothing is kept.
        max_tokens: tokens forwarded at once.
    """

    folder: Path | None
    max_tokens: int

    def logps(self, model: nn.Module, trees: Sequence[Segment]) -> list[Tensor]:
        """The log-probs [N] fp32 (nats) of each tree's scored tokens, in the order in which `pack` scores them.

        Args:
            model: the reference; of one with an adapter, the model with the adapter off.

        Raises:
            ValueError: a token is over the reference's vocabulary. OSError: the disk is full.
        """
        keys = [tree_digest(tree) for tree in trees]
        path = None if self.folder is None else self.folder / f"{weights_digest(model)}.safetensors"
        known = {} if path is None else _read(path)
        missing = list({key: tree for key, tree in zip(keys, trees, strict=True) if key not in known}.items())
        if missing:
            check_vocabulary(model, [tree for _, tree in missing])
            self._fill(model, missing, known, path)
        return [known[key] for key in keys]

    def _fill(self, model: nn.Module, missing: list[tuple[bytes, Segment]], known: dict[bytes, Tensor], path: Path | None) -> None:
        began = time.perf_counter()
        device = head_of(model).weight.device
        with reference_disabled(model) if is_adapted(model) else nullcontext():
            for start in range(0, len(missing), _WINDOW):
                window = missing[start : start + _WINDOW]
                for members in split_by_tokens([tree for _, tree in window], self.max_tokens):
                    packs = [pack(window[i][1]).num_targets for i in members]
                    logp = score(model, pack([window[i][1] for i in members]).to(device)).cpu()
                    known |= {window[i][0]: part.clone() for i, part in zip(members, logp.split(packs), strict=True)}
        if path is not None:
            _write(path, known)
        seconds = time.perf_counter() - began
        log.info("reference: %d sequences scored in %.1f s%s", len(missing), seconds, f", kept in {path}" if path else "")


def reference_logps(args: Arguments, loaded: Loaded, *groups: Sequence[Segment]) -> list[list[Tensor]]:
    """The log-probs of each group's trees under the reference that the flags name; call it once, before the first update."""
    named, device = args.reference.ref_model_name_or_path, loaded.device
    model = load_causal_lm(named, dtype=args.model.dtype, device=device) if named else loaded.model
    logps = iter(cache_of(args).logps(model, [tree for group in groups for tree in group]))
    return [list(islice(logps, len(group))) for group in groups]


def cache_of(args: Arguments) -> ReferenceCache:
    """The cache that the flags name."""
    where = args.reference.reference_cache
    folder = Path(args.run.output_dir) / "reference" if not where else Path(where)
    return ReferenceCache(None if where == "none" else folder, args.batch.max_tokens_per_micro_batch)


def check_vocabulary(model: nn.Module, trees: Sequence[Segment]) -> None:
    """Raises ValueError where a token has no row in the reference's head."""
    rows = head_of(model).weight.shape[0]
    highest = max(max(part.ids, default=0) for tree in trees for part in (tree, *tree.children))
    if highest >= rows:
        raise ValueError(
            f"the reference knows {rows} tokens, and the data have token {highest}; give a --ref_model_name_or_path of the same tokenizer"
        )


def tree_digest(tree: Segment) -> bytes:
    """16 bytes that stand for a tree's tokens, its shape, and which tokens are scored."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (tree, *tree.children):
        flags = part.scored if isinstance(part.scored, bool) else bytes(part.scored)
        digest.update(f"{len(part.ids)} {flags!r} {len(part.children)};".encode())
        digest.update(array("q", part.ids).tobytes())
    return digest.digest()


def weights_digest(model: nn.Module) -> str:
    """32 hexadecimal digits that stand for a model: its configuration and weights, of one with an adapter those of its base."""
    config = causal_lm(model).config.to_dict()
    own = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest = hashlib.blake2b(json.dumps(own, sort_keys=True, default=str).encode(), digest_size=_DIGEST_BYTES)
    tensors = [(name, p) for name, p in model.named_parameters() if not (is_adapted(model) and p.requires_grad)]
    for name, tensor in [*tensors, *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _read(path: Path) -> dict[bytes, Tensor]:
    """What the file holds; nothing where there is none, or where it is no such file."""
    if not path.is_file():
        return {}
    try:
        found = load_file(path)
        lengths = found["lengths"].tolist()
        keys = [bytes(key) for key in found["keys"].tolist()]
        return dict(zip(keys, found["logp"].split(lengths), strict=True))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        log.warning("reference: %s cannot be read (%s); its log-probs are computed again", path, error)
        return {}


def _write(path: Path, known: dict[bytes, Tensor]) -> None:
    """Replaces the file: a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
    lengths = torch.tensor([len(logp) for logp in known.values()], dtype=torch.int64)
    with disk_errors(path):
        try:
            save_file({"keys": keys, "lengths": lengths, "logp": torch.cat(list(known.values()))}, temporary)
            fsync_file(temporary)
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
