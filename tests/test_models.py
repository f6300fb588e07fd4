"""Loading, heads, adapters and the parity of the training forward with paged generation."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from fastalign.models.adapters import attach_lora, load_adapter, reference_disabled, save_adapter
from fastalign.models.attention import UnsupportedModelError, disable_dropout, observe_calls, use_fastalign_attention
from fastalign.models.backbone import causal_lm, head_of, hidden_states, paged_hidden_states
from fastalign.models.linear import RowLinear
from fastalign.models.load import load_causal_lm, load_tokenizer
from fastalign.models.probe import probe
from fastalign.models.row_counts import row_counts
from fastalign.ops.attention import PagedLayout
from fastalign.ops.backend import load_native
from fastalign.packing import group, pack

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")
SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES |= {"max_position_embeddings": 256, "initializer_range": 0.1}


def llama(intermediate_size=172, **changes):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | changes), intermediate_size=intermediate_size))
    use_fastalign_attention(model)
    return model


def qwen2():
    model = hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, intermediate_size=128, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    )
    use_fastalign_attention(model)
    return model


def ids(*counts):
    return [torch.randint(3, 97, (count,)).tolist() for count in counts]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def folder(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    return str(tmp_path)


def test_load_causal_lm_dtypes_and_attention(folder):
    assert load_causal_lm(folder).dtype == torch.bfloat16
    model = load_causal_lm(folder, dtype="float32")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "fastalign"
    model.save_pretrained(folder + "/again")  # what is saved loads anywhere
    assert "fastalign" not in Path(folder, "again", "config.json").read_text()


def test_load_causal_lm_errors_name_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder ../nowhere"):
        load_causal_lm("./nowhere")
    with pytest.raises(ValueError, match=r"has no config.json; is it a Hugging Face folder"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, got 'fp8'"):
        load_causal_lm(str(tmp_path), dtype="fp8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no causal language model at"):
        load_causal_lm(str(tmp_path))


@needs_stories
def test_load_tokenizer_and_chat_template(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    for source in (str(template), template.read_text()):
        tokenizer = load_tokenizer(str(STORIES), source)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    with pytest.raises(ValueError, match=r"there is no file 'no.jinja'"):
        load_tokenizer(str(STORIES), "no.jinja")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


@needs_stories
def test_generate_is_what_transformers_generates():
    plain = hf.AutoModelForCausalLM.from_pretrained(STORIES, local_files_only=True)
    ours, tokenizer = load_causal_lm(str(STORIES)), load_tokenizer(str(STORIES))
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
    expected = plain.generate(**batch, max_new_tokens=30, do_sample=False)
    assert torch.equal(ours.generate(**batch, max_new_tokens=30, do_sample=False), expected)


def test_probe_runs_once_a_model_and_leaves_it_as_it_was():
    model = llama().train()
    probe(model)
    assert model.training
    with observe_calls() as calls:
        probe(model)
    assert not calls
    with pytest.raises(UnsupportedModelError, match='the attention is "sdpa"'):
        probe(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)))


def test_hidden_states_refuses_dropout_and_batches():
    model = llama(attention_dropout=0.1).train()
    packed = pack(group(*ids(3), ids(2)))
    with pytest.raises(ValueError, match=r"expected dropout 0, got 0.1"):
        hidden_states(model, packed)
    disable_dropout(model)
    assert hidden_states(model, packed).shape == (5, 64)


def test_hidden_states_refuses_a_rope_that_depends_on_the_batch():
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=16)
    assert hidden_states(model, pack(group(*ids(10), ids(6)))).shape == (16, 64)
    with pytest.raises(UnsupportedModelError, match="changes for the whole batch past position 16, got 16"):
        hidden_states(model, pack(group(*ids(10), ids(7))))


def test_head_of_names_what_it_cannot_read():
    head = head_of(llama())
    assert (head.bias, head.logit_softcap, head.logit_scale) == (None, None, 1.0)
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel"):
        head_of(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="keep adapters off the head"):
        attach_lora(llama(), target_modules=["lm_head"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = llama().train()
    packed = pack(group(*ids(30), ids(9, 20)))
    hidden_states(model, packed).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    hidden_states(model, packed).square().sum().backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name


def test_lora_trains_is_switched_off_and_comes_back_from_disk(tmp_path):
    model = llama()
    packed = pack(group(*ids(12), ids(4, 5)))
    base = hidden_states(model, packed).detach()
    adapted = attach_lora(model, r=4)
    assert isinstance(causal_lm(adapted), hf.LlamaForCausalLM)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and "lm_head" not in name for name in trainable)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.normal_(std=0.1)
    changed = hidden_states(adapted, packed)
    changed.sum().backward()
    assert all(p.grad is not None for p in trainable.values())
    assert not torch.allclose(changed, base, atol=1e-2)
    with reference_disabled(adapted):
        assert torch.equal(hidden_states(adapted, packed), base)
    save_adapter(adapted, str(tmp_path))
    again = load_adapter(causal_lm(adapted.unload()), str(tmp_path))
    assert torch.equal(hidden_states(again, packed), changed)
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load_adapter(llama(), str(tmp_path / "missing"))
    with pytest.raises(TypeError, match="expected a PEFT model"), reference_disabled(llama()):
        pass


class Paged:
    """A cache and the steps of a handful of sequences, each in blocks of its own."""

    def __init__(self, model, block_size=16, blocks=64):
        self.model, self.block_size, config = model, block_size, model.config
        shape = (blocks, config.num_key_value_heads, block_size, config.hidden_size // config.num_attention_heads)
        self.caches = [[torch.full(shape, float("nan"), dtype=model.dtype) for _ in range(config.num_hidden_layers)] for _ in "kv"]

    def step(self, sequences, fresh):
        """sequences: {slot: ids so far}; the last fresh[slot] ids are new. Returns the new rows, slot after slot."""
        a_slot = 8  # blocks
        tables = torch.tensor([[slot * a_slot + i for i in range(a_slot)] for slot in sequences], dtype=torch.int32)
        new = [(slot, p) for slot, seq in sequences.items() for p in range(len(seq) - fresh[slot], len(seq))]
        layout = PagedLayout(
            cu_seqlens=torch.tensor([0, *torch.tensor([fresh[s] for s in sequences]).cumsum(0).tolist()], dtype=torch.int32),
            context_lens=torch.tensor([len(seq) for seq in sequences.values()], dtype=torch.int32),
            block_tables=tables,
            slots=torch.tensor([(slot * a_slot + p // self.block_size) * self.block_size + p % self.block_size for slot, p in new]),
            k_cache=self.caches[0],
            v_cache=self.caches[1],
        )
        input_ids = torch.tensor([sequences[slot][p] for slot, p in new])
        with torch.no_grad():
            return paged_hidden_states(self.model, input_ids, torch.tensor([p for _, p in new]), layout)


def paged_rows(model, prompt, completions):
    """[hidden rows of each completion's path], the prompt prefilled a sequence in chunks, then decoded together."""
    paged = Paged(model)
    rows = {s: [] for s in range(len(completions))}
    for s in rows:
        cut = 7 + s
        rows[s] += [paged.step({s: prompt[:cut]}, {s: cut}), paged.step({s: prompt}, {s: len(prompt) - cut})]
    for t in range(max(map(len, completions))):
        live = {s: prompt + c[: t + 1] for s, c in enumerate(completions) if t < len(c)}
        for s, row in zip(live, paged.step(live, dict.fromkeys(live, 1)), strict=True):
            rows[s].append(row[None])
    return [torch.cat(parts) for parts in rows.values()]


def assert_parity(model):
    prompt, *completions = ids(37, 20, 5, 13)
    model.train()
    packed = pack(group(prompt, completions))
    trained = hidden_states(model, packed)
    assert trained.requires_grad
    model.eval()
    bounds = packed.cu_seqlens.tolist()
    for s, rows in enumerate(paged_rows(model, prompt, completions)):
        assert torch.equal(rows, torch.cat([trained[: len(prompt)], trained[bounds[s + 1] : bounds[s + 2]]]))


@pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")
@pytest.mark.parametrize("build", [llama, qwen2, lambda: llama(173)], ids=["llama 172", "qwen2 window", "llama 173"])
def test_training_forward_equals_paged_generation_to_the_bit(build):
    assert_parity(build())


@needs_stories
@pytest.mark.skipif(load_native()[0] is None, reason="the native module is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stories260k_training_forward_equals_paged_generation_to_the_bit(dtype):
    assert_parity(load_causal_lm(str(STORIES), dtype=dtype))


def test_row_counts_follow_widths_and_products():
    torch.set_num_threads(1)
    onednn = row_counts(llama(128))
    assert (onednn.least, onednn.multiple) == (2, 4)  # sines of heads of 8
    assert [onednn.padding(rows) for rows in (0, 1, 4, 5, 16)] == [0, 3, 0, 3, 0]
    assert row_counts(llama(173)).multiple == 32
    assert row_counts(llama(173).to(torch.bfloat16)).multiple == 64


def test_row_counts_of_linears_outside_the_row_linears():
    """MKL's fp32 product of few rows has other bits: the look finds it, and the padding settles it."""
    model = llama(128)
    for module in model.modules():
        if type(module) is RowLinear:
            module.__class__ = nn.Linear
    least, x = row_counts(model).least, torch.randn(64, 64)
    linear = model.model.layers[0].mlp.gate_proj
    assert all(torch.equal(linear(x[:rows]), linear(x)[:rows]) for rows in range(least, 64))


def test_row_counts_say_what_no_padding_settles():
    class Restless(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-3 * len(x))

    model = llama(128)
    model.model.layers[0].mlp.gate_proj.__class__ = Restless
    with pytest.warns(RuntimeWarning, match="Restless of 64 float32 inputs .* depend on the number of rows"):
        row_counts(model)
    row_counts(model)  # said once


def test_an_adapter_on_a_merged_adapter_names_that_one(tmp_path):
    """With the first one's base it would be loaded without the first."""
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    base, first, second = (str(tmp_path / name) for name in ("base", "first", "second"))
    llama().save_pretrained(base)
    save_adapter(peft.get_peft_model(load_causal_lm(base), peft.LoraConfig(**config)), first)
    merged = load_causal_lm(first)
    assert all(parameter.requires_grad for parameter in merged.parameters()), "so that it may be trained as it is"
    adapted = peft.get_peft_model(merged, peft.LoraConfig(**config))
    save_adapter(adapted, second)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        want = adapted.eval()(ids).logits
        assert torch.equal(load_causal_lm(second).eval()(ids).logits, adapted.merge_and_unload().eval()(ids).logits)
        assert torch.allclose(load_causal_lm(second)(ids).logits, want, atol=1e-5)
    own = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps({**own, "base_model_name_or_path": second}))
    with pytest.raises(ValueError, match="names its own folder as the base model"):
        load_causal_lm(second)
