"""Checkpoints: bit-exact restoration, and what is left when a write is killed or the disk is full."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastalign.training import checkpoint as module
from fastalign.training.checkpoint import latest_checkpoint, load_checkpoint, restore_rng, rng_state, save_checkpoint
from fastalign.training.weights import restore_weights, save_model

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(seed=0, *, tie=True, dtype=torch.float32):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tie)).to(dtype)


def mixtral(seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def optimizer_state():
    return {
        "lr": 1e-5,
        "step": 7,
        "names": ["a", "b"],
        "state": {0: {"exp_avg": torch.randn(3, 4), "tail": torch.randint(-(2**15), 2**15, (3, 4), dtype=torch.int16)}},
        "bf16": torch.randn(5).bfloat16(),
    }


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_restores_bitwise(tmp_path, tie, dtype):
    model, state = llama(tie=tie, dtype=dtype), optimizer_state()
    path = save_checkpoint(
        tmp_path,
        3,
        model=model,
        optimizer_state=state,
        scheduler_state={"last_epoch": 3},
        data_state={"order": {"position": 5}},
        extra={"metrics": {"x": 0.1}},
    )
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.scheduler_state, loaded.data_state) == (3, {"last_epoch": 3}, {"order": {"position": 5}})
    assert loaded.extra == {"metrics": {"x": 0.1}}
    saved = loaded.optimizer_state
    assert (saved["lr"], saved["step"], saved["names"]) == (1e-5, 7, ["a", "b"])
    assert torch.equal(saved["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert torch.equal(saved["state"][0]["tail"], state["state"][0]["tail"])
    assert torch.equal(saved["bf16"], state["bf16"])
    other = llama(1, tie=tie, dtype=dtype)
    restore_weights(other, path)
    assert equal(model, other)
    assert (other.lm_head.weight.data_ptr() == other.model.embed_tokens.weight.data_ptr()) is tie


def test_checkpoint_keeps_mixed_dtypes(tmp_path):
    model, other = (llama(seed, tie=False, dtype=torch.bfloat16) for seed in (0, 1))
    model.lm_head.float()
    other.lm_head.float()
    restore_weights(other, save_checkpoint(tmp_path, 1, model=model))
    assert equal(model, other)


def test_checkpoint_of_a_mixture_of_experts_restores_bitwise(tmp_path):
    model, other = mixtral(0), mixtral(1)
    restore_weights(other, save_checkpoint(tmp_path, 1, model=model))
    assert equal(model, other)


def test_checkpoint_of_an_adapter_is_the_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tmp_path / "base"
    llama().save_pretrained(base)
    models = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        models.append(peft.get_peft_model(model, config))
    path = save_checkpoint(tmp_path / "run", 1, model=models[0])
    names = {file.name for file in path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not equal(*models)
    restore_weights(models[1], path)
    assert equal(*models)


def test_checkpoint_random_states_continue(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]

    np.random.normal()  # leaves a cached gaussian in numpy's state
    path = save_checkpoint(tmp_path, 1, model=llama(), rng=rng_state())
    expected = draw()
    draw()
    restore_rng(load_checkpoint(path).rng)
    assert draw() == expected


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, model=llama())
    wide = LlamaForCausalLM(LlamaConfig(**(SMALL | {"hidden_size": 32}), tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"\(48, 16\) torch.float32, the model has \(48, 32\)"):
        restore_weights(wide, path)
    with pytest.raises(ValueError, match=r"the model has .*bfloat16"):
        restore_weights(llama(dtype=torch.bfloat16), path)
    with pytest.raises(ValueError, match=r"1 weights of the model are not in it, lm_head\.weight first"):
        restore_weights(llama(tie=False), path)


def test_checkpoint_rotation_keeps_the_newest(tmp_path):
    model = llama()
    for step in (2, 10, 9, 11):
        save_checkpoint(tmp_path, step, model=model, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"
    save_checkpoint(tmp_path, 11, model=model, extra={"again": True}, save_total_limit=2)
    assert load_checkpoint(tmp_path / "checkpoint-11").extra == {"again": True}
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_checkpoint_left_by_a_killed_write_is_ignored_and_removed(tmp_path):
    code = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_checkpoint import llama
from fastalign.training import checkpoint
checkpoint.save_checkpoint(sys.argv[1], 1, model=llama())
checkpoint._seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint(sys.argv[1], 2, model=llama())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-2.partial" / "model.safetensors").exists()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    save_checkpoint(tmp_path, 2, model=llama())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_checkpoint_that_is_cut_short_names_the_file_and_a_remedy(tmp_path, name):
    save_checkpoint(tmp_path, 1, model=llama())
    path = save_checkpoint(tmp_path, 2, model=llama())
    with open(path / name, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=rf"damaged: {name} should have \d+ bytes, it has 100; resume from .*checkpoint-1 instead"):
        load_checkpoint(path)


def test_checkpoint_with_other_damage_says_so(tmp_path):
    path = save_checkpoint(tmp_path, 2, model=llama())
    size = (path / "training_state.pt").stat().st_size
    (path / "training_state.pt").write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=r"training_state.pt cannot be read .*no other checkpoint"):
        load_checkpoint(path)
    (path / "training_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"training_state\.json cannot be read"):
        load_checkpoint(path)
    (path / "training_state.json").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "checkpoint-9")


def test_checkpoint_never_unpickles_code(tmp_path):
    path = save_checkpoint(tmp_path, 1, model=llama())
    torch.save({"optimizer": SMALL.get, "rng": {}}, path / "training_state.pt")
    state = json.loads((path / "training_state.json").read_text())
    state["files"]["training_state.pt"] = (path / "training_state.pt").stat().st_size
    (path / "training_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)


@contextmanager
def file_size_limit(size):
    """A write past the limit fails in the middle of a file, inside the libraries, as it does on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("limit", [4096, 100_000])  # the weights' file fails; the optimizer's does
def test_checkpoint_on_a_full_disk_leaves_the_earlier_one_intact(tmp_path, limit):
    model = llama()
    save_checkpoint(tmp_path, 1, model=model)
    with file_size_limit(limit), pytest.raises(OSError, match=r"no space left.*checkpoint-2"):
        save_checkpoint(tmp_path, 2, model=model, optimizer_state={"x": torch.zeros(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    load_checkpoint(tmp_path / "checkpoint-1")


def test_save_model_on_a_full_disk_leaves_the_earlier_model_intact(tmp_path):
    save_model(tmp_path, llama(7))
    with file_size_limit(4096), pytest.raises(OSError, match="no space left"):
        save_model(tmp_path, llama(8))
    assert not list(tmp_path.glob("*.partial"))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path), llama(7))


def test_save_model_loads_with_plain_transformers(tmp_path):
    AttentionInterface.register("fastalign", sdpa_attention_forward)
    (tmp_path / "metrics.jsonl").write_text("kept")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("a stale shard")
    model = llama()
    model.set_attn_implementation("fastalign")
    save_model(tmp_path, model)
    assert "fastalign" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("model-*"))
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"
    assert not list(tmp_path.glob("*.partial"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert equal(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_checkpoint_folder_moves(tmp_path):
    path = save_checkpoint(tmp_path / "a", 4, model=llama())
    shutil.move(path, tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere").step == 4
    assert module.FORMAT == 1
