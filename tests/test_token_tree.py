"""A model run over a token tree gives what plain transformers gives for its sequences one by one, gradients included."""

import pytest
import torch
import transformers as hf

from fastalign.models.attention import UnsupportedModelError, disable_dropout, use_fastalign_attention
from fastalign.models.backbone import head_of, hidden_states
from fastalign.models.probe import probe
from fastalign.packing import Segment, group, pack, sequences

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
NEOX = {**SMALL, "max_position_embeddings": 128, "hidden_dropout": 0.1}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15}

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "llama tied, biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen2 window": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 3}, sliding_window_pattern=2)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, sliding_window=9, pad_token_id=0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NEOX)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**GROUPED, sliding_window=6, logit_scale=0.5, pad_token_id=0)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED, logits_scaling=4.0)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, pad_token_id=1
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**GROUPED)),
}


def ids(count):
    return torch.randint(3, 97, (count,)).tolist()


def tree():
    """Two groups and a tree of depth 3; 21 is longer than every window above."""
    deep = Segment(ids(6), children=(Segment(ids(5), True, (Segment(ids(4), True), Segment(ids(3), True))), Segment(ids(7), True)))
    return pack([group(ids(21), [ids(3), ids(9), ids(1)]), deep, group(ids(1), [ids(2)])])


def head_logits(model, hidden):
    head = head_of(model)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.logit_softcap is not None:
        logits = torch.tanh(logits / head.logit_softcap) * head.logit_softcap
    return logits / head.temperature()


def paths_of_targets(packed):
    """For every scored token: (sequence, index in it), found by walking each root-to-leaf path once."""
    bounds, parent = packed.cu_seqlens.tolist(), packed.parent.tolist()
    place = {}
    for n, leaf in enumerate(sorted(set(range(len(parent))) - set(parent))):
        chain, s = [], leaf
        while s >= 0:
            chain.insert(0, s)
            s = parent[s]
        rows = [r for s in chain for r in range(bounds[s], bounds[s + 1])]
        for i, row in enumerate(rows):
            place.setdefault(row, (n, i))
    return place


def separate_logp(model, packed):
    """The same scored tokens through plain transformers, one sequence a call: no packing, no layout."""
    paths, place = sequences(packed), paths_of_targets(packed)
    logp = [torch.log_softmax(model(input_ids=torch.tensor([path]), use_cache=False).logits[0].float(), -1) for path in paths]
    return torch.stack([logp[place[r][0]][place[r][1], t] for r, t in zip(packed.rows.tolist(), packed.targets.tolist(), strict=True)])


def parameter_gradients(model, logp):
    model.zero_grad()
    (logp * torch.linspace(-1, 1, logp.numel())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_token_tree_equals_separate_sequences(family):
    model = FAMILIES[family]()
    disable_dropout(model)
    model.train()
    packed = tree()
    model.set_attn_implementation("eager")
    expected = separate_logp(model, packed)
    expected_gradients = parameter_gradients(model, expected)
    use_fastalign_attention(model)
    probe(model)
    logits = head_logits(model, hidden_states(model, packed)[packed.rows])
    logp = torch.log_softmax(logits.float(), -1).gather(1, packed.targets[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    gradients = parameter_gradients(model, logp)
    assert gradients.keys() == expected_gradients.keys()
    for name, grad in gradients.items():
        whole = expected_gradients[name].norm().clamp_min(1e-3)
        assert ((grad - expected_gradients[name]).norm() / whole).item() < 1e-5, name


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_without_a_layout_the_model_is_plain(family):
    model = FAMILIES[family]().eval()
    batch = torch.randint(3, 97, (2, 23))
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    model.set_attn_implementation("eager")
    expected = model(input_ids=batch, attention_mask=mask).logits
    use_fastalign_attention(model)
    torch.testing.assert_close(model(input_ids=batch, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


REFUSED = {
    "stablelm": (lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)), "never reaches the attention function"),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)), "own attention code"),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
        r"attention sinks \(s_aux\)",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_read_a_tree_is_refused_with_the_reason(family):
    build, reason = REFUSED[family]
    with pytest.raises(UnsupportedModelError, match=f"^{family}: .*{reason}"):
        switch_and_probe(build())


def switch_and_probe(model):
    use_fastalign_attention(model)
    probe(model)
