"""Reward models: a backbone of a causal language model with a linear score (or a grade an attribute), run as a token tree.

On disk it is what `AutoModelForSequenceClassification` loads. transformers reads a sequence's score at its last token that is no
`config.pad_token_id`; `data.places.read_place` says the same of ids, and `settle_padding` sees to it that the padding token ends no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fastalign.models.attention import UnsupportedModelError, disable_dropout, observe_calls, use_fastalign_attention
from fastalign.models.backbone import causal_lm, hidden_states
from fastalign.models.load import DTYPES
from fastalign.models.probe import check_calls, check_config
from fastalign.ops.gemm import linear
from fastalign.packing import Packed, Segment, pack, sequences, split_by_tokens

_ARCHITECTURE = "ForSequenceClassification"
_NOTES = ("step_separator", "step_aggregation", "attribute_names", "attribute_weights")  # of a configuration: how scores are read


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder holds a sequence classifier, or a PEFT adapter of one."""
    for name, says in (
        ("config.json", lambda config: any(a.endswith(_ARCHITECTURE) for a in config.get("architectures") or ())),
        ("adapter_config.json", lambda config: config.get("task_type") == "SEQ_CLS"),
    ):
        path = Path(folder) / name
        if path.is_file():
            return bool(says(json.loads(path.read_text(encoding="utf-8"))))
    return False


def load_reward_model(
    name_or_path: str,
    tokenizer: Any,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    start: bool = False,
    attributes: Mapping[str, float] | None = None,
) -> PreTrainedModel:
    """Loads a reward model, gives it the fastalign attention, sets dropout to 0 and probes it.

    Args:
        name_or_path: a folder or Hub name of a sequence classifier with one label, or one an attribute as `fastalign reward` notes
            them (an adapter of either is merged into its base).
        tokenizer: the model's; its padding token is set to the one that the model skips.
        dtype: "auto" (as saved), "float32" or "bfloat16".
        start: a causal language model is accepted, too, and gets a score head drawn from torch's generator.
        attributes: names and weights of the grades that a head that is begun gives, noted in the configuration; None: one score.

    Raises:
        ValueError: nothing to load there, no score head, labels that are no grades, other attributes than the model's.
        UnsupportedModelError: the family cannot run as a token tree, or has no sequence classifier.
    """
    if dtype not in DTYPES:
        raise ValueError(f"load_reward_model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(name_or_path)
    if _is_adapter(folder) and is_reward_model(folder):
        model = _load_merged(folder, tokenizer, dtype, device)
    else:
        if _is_adapter(folder):
            if not start:
                raise ValueError(f"{folder}: expected a reward model, got the adapter of another model; train one with fastalign reward")
            model = _with_adapter(folder, dtype, device, attributes)
        else:
            model = _load(name_or_path, dtype, start, attributes).to(device)
        settle_padding(model, tokenizer)
        if attributes:
            note(model, tokenizer, attribute_names=list(attributes), attribute_weights=list(attributes.values()))
    use_fastalign_attention(model)
    disable_dropout(model)
    probe_scores(model)
    return model


def _load(name_or_path: str, dtype: str, start: bool, attributes: Mapping[str, float] | None = None) -> PreTrainedModel:
    local = {"local_files_only": True} if Path(name_or_path).is_dir() else {}
    if not local and (name_or_path.count("/") > 1 or name_or_path.startswith(("/", ".", "~")) or not name_or_path):
        raise ValueError(f"load_reward_model: there is no folder {name_or_path!r}")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **local)
    except (OSError, ValueError) as error:
        raise ValueError(f"load_reward_model: no model at {name_or_path!r}: {error}") from error
    fresh = not any(a.endswith(_ARCHITECTURE) for a in config.architectures or ())
    if fresh and not start:
        found = f"{name_or_path}: expected a reward model (a sequence classifier), got {config.architectures}"
        raise ValueError(f"{found}; train one with fastalign reward")
    names = getattr(config, "attribute_names", None)
    if not fresh and config.num_labels != len(names or ("score",)):
        raise ValueError(
            f"{name_or_path}: expected a reward model with one label, got {config.num_labels}: it classifies, it does not score"
        )
    if not fresh and attributes and list(attributes) != names:
        found = f"grades {', '.join(names)}" if names else "gives one score"
        raise ValueError(f"{name_or_path}: expected a model that grades {', '.join(attributes)}, got one that {found}")
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedModelError(f"{config.model_type}: transformers has no {_ARCHITECTURE} of this family")
    if fresh:
        config.id2label = dict(enumerate(attributes or ("LABEL_0",)))
        config.label2id = {name: i for i, name in config.id2label.items()}
    options = {"config": config, "dtype": DTYPES[dtype], "trust_remote_code": False, **local}
    told = transformers_logging.get_verbosity()
    try:
        if fresh:
            transformers_logging.set_verbosity_error()  # that the score head is new is what was asked for
        return AutoModelForSequenceClassification.from_pretrained(name_or_path, **options)
    except OSError as error:
        raise ValueError(f"load_reward_model: no weights at {name_or_path!r}: {error}") from error
    finally:
        transformers_logging.set_verbosity(told)


def _load_merged(folder: Path, tokenizer: Any, dtype: str, device: torch.device | str) -> PreTrainedModel:
    """An adapter with its score head, merged into the base that its configuration names."""
    notes = notes_of(tokenizer)
    attributes = dict(zip(notes.get("attribute_names", ()), notes.get("attribute_weights", ()), strict=True))
    model = _with_adapter(folder, dtype, device, attributes)
    settle_padding(model, tokenizer)
    note(model, tokenizer, **notes)
    return model


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _with_adapter(folder: Path, dtype: str, device: torch.device | str, attributes: Mapping[str, float] | None) -> PreTrainedModel:
    """A sequence classifier of the base that an adapter names, which may be an adapter itself, with the adapter merged into it."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base or Path(base).resolve() == folder.resolve():
        raise ValueError(f"{folder}: the adapter names no base model; merge it into its base with peft first")
    stacked = _is_adapter(Path(base))
    model = _with_adapter(Path(base), dtype, device, attributes) if stacked else _load(base, dtype, True, attributes).to(device)
    if config.task_type != "SEQ_CLS":
        config.task_type = None  # a causal language model's: its layers are those of the classifier
    merged = PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    merged.name_or_path = str(folder)  # what an adapter on top of it names as its base
    return merged.requires_grad_(True)


def note(model: nn.Module, tokenizer: Any, **notes: Any) -> None:
    """Notes in the configuration how a reward model's scores are read (steps, attributes), so that the saved folder says it.

    An adapter is saved without the model's configuration: the tokenizer's, which lies beside either, says it, too.
    """
    for name, value in notes.items():
        assert name in _NOTES, name
        setattr(causal_lm(model).config, name, value)
        tokenizer.init_kwargs[name] = value


def notes_of(tokenizer: Any) -> dict[str, Any]:
    """What `note` has left in a tokenizer."""
    return {name: tokenizer.init_kwargs[name] for name in _NOTES if name in tokenizer.init_kwargs}


def settle_padding(model: PreTrainedModel, tokenizer: Any) -> int:
    """Makes model and tokenizer agree on a padding token, and returns it.

    A classifier that names one keeps it. Otherwise it is the tokenizer's, where that is not EOS (transformers would pass over the EOS
    that ends a text), or else BOS or the unknown token, which end none; a tokenizer without any of them leaves EOS.
    """
    config, eos = model.config.get_text_config(), tokenizer.eos_token_id
    own = config.pad_token_id if any(a.endswith(_ARCHITECTURE) for a in model.config.architectures or ()) else None
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    pad = own if own is not None else next((i for i in candidates if i is not None and i != eos), eos)
    if pad is None:
        raise ValueError("the tokenizer has neither a padding nor an EOS token; set pad_token in tokenizer_config.json")
    for each in {id(c): c for c in (config, model.config)}.values():
        each.pad_token_id = pad
    if 0 <= pad < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return pad


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer of a reward model's score [1, H] or grades [K, H]; under PEFT its trained copy.

    Raises:
        UnsupportedModelError: no linear layer `score`.
    """
    base = causal_lm(model)
    head: Any = getattr(model, "score", None)
    saved = getattr(head, "modules_to_save", None)
    if saved is not None and not head.disable_adapters:
        head = saved[head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapter[0]]
    elif saved is not None:
        head = head.original_module
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"{base.config.model_type}: expected a linear layer 'score', got {type(head).__name__}")
    return head


def scores_at(model: nn.Module, packed: Packed, rows: Tensor) -> Tensor:
    """Scores of a token tree's rows, [N], differentiable; of a model that grades attributes their weighted sum. Else as `grades_at`."""
    grades = grades_at(model, packed, rows)
    weights = getattr(model.config, "attribute_weights", None)
    return grades.squeeze(-1) if weights is None else grades @ grades.new_tensor(weights)


def grades_at(model: nn.Module, packed: Packed, rows: Tensor) -> Tensor:
    """What the score head says at a token tree's rows, differentiable.

    Args:
        model: a reward model with the "fastalign" attention.
        packed: the tree, its ids on the model's device.
        rows: [N] int64, the hidden rows that are read.

    Returns:
        [N, K] of K attributes, else of K = 1; fp32 sums whatever the model's dtype (fp64 for an fp64 model).
    """
    head = score_head(model)
    hidden = hidden_states(model, packed).index_select(0, rows)
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # not torch's: MKL's product of one column has other bits where the memory of an operand begins elsewhere
        return linear(hidden.to(wide), head.weight.to(wide), None if head.bias is None else head.bias.to(wide))


def place_rows(packed: Packed, places: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Hidden rows of places, [N] int64 on the CPU.

    Args:
        packed: trees of one root and its children.
        places: for each tree, (segment, 0 the root; offset in the segment).
    """
    roots = (packed.parent == -1).nonzero().flatten().tolist()
    begins = packed.cu_seqlens.tolist()
    return torch.tensor(
        [begins[root + segment] + offset for root, own in zip(roots, places, strict=True) for segment, offset in own], dtype=torch.int64
    )


@torch.no_grad()
def score_trees(
    model: nn.Module, trees: Sequence[Segment], places: Sequence[Sequence[tuple[int, int]]], *, max_tokens: int = 8192
) -> list[Tensor]:
    """Scores of each tree's places, fp32 on the CPU, no gradient.

    Args:
        trees, places: as in `place_rows`.
        max_tokens: tokens forwarded at once; a larger tree is forwarded alone.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.zeros(0)] * len(trees)
    for members in split_by_tokens(trees, max_tokens):
        packed = pack([trees[i] for i in members])
        rows = place_rows(packed, [places[i] for i in members])
        scores = scores_at(model, packed.to(device), rows.to(device)).cpu()
        for i, own in zip(members, scores.split([len(places[i]) for i in members]), strict=True):
            found[i] = own
    return found


@torch.no_grad()
def probe_scores(model: PreTrainedModel) -> None:
    """Compares the scores of a packed tree of random tokens with those of its sequences, each run alone by transformers.

    Raises:
        UnsupportedModelError: naming the family and what went wrong.
    """
    base, family = causal_lm(model), model.config.model_type
    check_config(base, family)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    pad = base.config.get_text_config().pad_token_id
    drawn = torch.randint(0, vocabulary, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in drawn if i != pad][:17]
    packed = pack([Segment(ids[:5], children=(Segment(ids[5:9]), Segment(ids[9:12]))), Segment(ids[12:])])
    device, training = next(base.parameters()).device, base.training
    base.eval()
    try:
        with observe_calls() as calls:
            tree = grades_at(base, packed.to(device), torch.tensor([8, 11, len(ids) - 1], device=device)).flatten()
        alone = [base(input_ids=torch.tensor([path], device=device), use_cache=False).logits.float() for path in sequences(packed)]
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{family}: the packed forward failed: {error}") from error
    finally:
        base.train(training)
    if not calls:
        raise UnsupportedModelError(f"{family}: the attention layout never reaches the attention function, so packed sequences would mix")
    check_calls(base, family, calls)
    separate = torch.cat([score.flatten() for score in alone])
    tolerance = 2e-3 if next(base.parameters()).dtype == torch.float32 else 0.1
    off = (tree - separate).abs().max().item() / max(1.0, separate.abs().max().item())
    if not off <= tolerance:
        raise UnsupportedModelError(f"{family}: packed scores are off by {off:.2g} of their size from separate ones, over {tolerance}")
