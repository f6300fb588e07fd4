"""Small random models and prompts that the tests of generation share."""

from operator import sub

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastalign.generation import SamplingParams
from fastalign.models.attention import use_fastalign_attention
from fastalign.models.backbone import head_of, hidden_states
from fastalign.ops.backend import native
from fastalign.ops.linear_logp import linear_logp
from fastalign.packing import pack
from fastalign.recipes import arithmetic

VOCAB = 131
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
SMALL |= {
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))


def qwen2():
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))


def gemma2(**changes):
    torch.manual_seed(2)
    special = {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 10.0, "sliding_window": 9, "head_dim": 16}
    return Gemma2ForCausalLM(Gemma2Config(**(SMALL | special | changes), query_pre_attn_scalar=16))


def write_arithmetic_model(folder, *, num_hidden_layers=2, hidden_size=32, initializer_range=0.1, seed=0):
    """A tiny Llama and the demo's tokenizer, saved into a folder for recipes to load."""
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": num_hidden_layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": initializer_range}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_arithmetic_judge(folder, **config):
    """A tiny reward model with the demo's tokenizer; `step_separator` makes it one of steps."""
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, num_labels=1, initializer_range=0.2, **sizes)
    for name, value in config.items():
        setattr(own, name, value)
    LlamaForSequenceClassification(own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


FAMILIES = {"llama": llama, "qwen2": qwen2, "gemma2": gemma2}


def ready(built):
    use_fastalign_attention(built)
    return built.eval()


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def scored(model, rollout, temperature):
    """Log-probs of every sampled token as training computes them: packed tree, one head call."""
    packed = pack(rollout.trees())
    head = head_of(model)
    hidden = hidden_states(model, packed)[packed.rows]
    return linear_logp(
        hidden, head.weight, packed.targets, bias=head.bias, temperature=head.temperature(temperature), logit_softcap=head.logit_softcap
    ).detach()


def sampled_logprobs(rollout, raw=False):
    return torch.tensor([v for s in rollout.flat for v in (s.raw_logprobs if raw else s.logprobs)])


class Floats(tuple):
    """Equal to the bit on the native attention; the reference sums in an order that depends on the batch."""

    __hash__ = tuple.__hash__

    def __eq__(self, other):
        exact = native() is not None
        return tuple.__eq__(self, other) if exact else len(self) == len(other) and max(map(abs, map(sub, self, other)), default=0) < 1e-5

    def __ne__(self, other):
        return not self == other


def values(rollout):
    """Everything of a rollout that must not depend on the schedule."""
    return [
        [(s.ids, Floats(s.logprobs), Floats(s.raw_logprobs), Floats(s.kept_mass or ()), s.finish_reason) for s in group]
        for group in rollout.samples
    ]


PARAMS = SamplingParams(n=3, temperature=1.0, max_tokens=16, seed=11, top_p=0.95)
PROMPTS = prompts_of(2, 21, 9, 30)


CHAT = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def write_chat_model(folder, *, max_position_embeddings=2048, seed=0, chat_template=CHAT):
    """A tiny Llama over bytes with a chat template that closes every turn, saved into a folder for recipes to load."""
    from tiny_server import byte_tokenizer

    torch.manual_seed(seed)
    llama_of_bytes = llama(vocab_size=259, num_hidden_layers=1, hidden_size=32, max_position_embeddings=max_position_embeddings)
    llama_of_bytes.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
