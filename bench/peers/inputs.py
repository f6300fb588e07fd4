"""What both sides read: a model folder, its tokenizer and a data file, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}
GSM8K = Path("..") / "shared" / "data" / "gsm8k" / "train.jsonl"

# The 40M-parameter Qwen2 shape of the measurements; the head is tied to the embedding.
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# The same architecture, small enough to try the scripts in seconds.
TINY = SHAPE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def word_tokenizer(vocab_size: int) -> Any:
    """One token a word ("w2" … ), so that a prompt has exactly as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL.values(), *(f"w{i}" for i in range(len(SPECIAL), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def text_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def write_model(folder: Path, tokenizer: Any, shape: dict[str, Any], seed: int = 0) -> dict[str, str]:
    """A randomly initialized Qwen2 and its tokenizer, saved in Hugging Face format; returns the two folders.

    Two, because transformers loads a tokenizer that lies beside a qwen2 configuration with Qwen2's own splitting rules,
    whatever the files say.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(**shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    where = {"model": str(folder / "model"), "tokenizer": str(folder / "tokenizer")}
    Qwen2ForCausalLM(config).save_pretrained(where["model"])
    tokenizer.save_pretrained(where["tokenizer"])
    return where


def random_prompts(tokenizer: Any, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Prompts of random words, each as many tokens long as asked for (one or two more where words are several tokens)."""
    draw = random.Random(seed)
    words = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    words = [word for word in words if word.isalnum() and word.isascii()]
    if not words:
        raise ValueError("the tokenizer has no token that is a plain word; random prompts cannot be made from it")
    prompts = []
    for length in lengths:
        chosen: list[str] = []
        while len(tokenizer(" ".join(chosen))["input_ids"]) < length:
            missing = length - len(tokenizer(" ".join(chosen))["input_ids"])
            chosen += draw.choices(words, k=max(1, missing // 3))
        prompts.append(" ".join(chosen))
    return prompts


def supervised_records(count: int, source: Path = GSM8K, seed: int = 0) -> list[dict[str, str]]:
    """`count` prompt and completion pairs: GSM8K where it is found, else random words of about its lengths."""
    if source.exists():
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        records = [json.loads(line) for line in lines]
        return [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in records]
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(4000)]

    def text(mean: float) -> str:
        return " ".join(draw.choices(words, k=max(8, min(180, round(draw.lognormvariate(mean, 0.4))))))

    return [{"prompt": text(3.75) + "\n", "completion": text(3.9)} for _ in range(count)]  # medians of 43 and 49 words


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_records(path: str) -> list[dict[str, Any]]:
    """The records of a file that `write_records` wrote."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
