"""Every command and the engine as on a GPU, on the stand-in of one: nothing is left on the host, results are the CPU's to rounding."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
import torch
from stand_in_cuda import CUDA, stand_in_cuda, waits
from tiny_models import llama, ready, write_arithmetic_model

from fastalign.cli import main
from fastalign.generation import AsyncEngine, Engine, SamplingParams
from fastalign.ops import backend
from fastalign.training.step import Updater

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")

REWARD = """
def ends_well(prompts, completions, **columns):
    return [float(c[-1:] in "13579") for c in completions]

def steps(prompts, completions, **columns):
    return [0.5 * len(c) for c in completions]
"""
PROBLEMS = [(a, b) for a in range(4) for b in range(4)]

# what every run of a command is given
COMMANDS = {
    "sft": "--dataset_name {data}/sft.jsonl --eval_dataset_name {data}/sft.jsonl --eval_steps 1",
    "reward": "--dataset_name {data}/pairs.jsonl --eval_dataset_name {data}/pairs.jsonl",
    "dpo": "--dataset_name {data}/pairs.jsonl --eval_dataset_name {data}/pairs.jsonl",
    "kto": "--dataset_name {data}/labels.jsonl --eval_dataset_name {data}/labels.jsonl",
    "distill": "--dataset_name {data}/sft.jsonl --teacher_model_name_or_path {data}/teacher",
    "rft": "--dataset_name {data}/sft.jsonl --reward {data}/reward.py:ends_well --num_generations 4",
    "grpo": "--dataset_name {data}/sft.jsonl --reward {data}/reward.py:ends_well --num_generations 4",
    "ppo": "--dataset_name {data}/sft.jsonl --reward {data}/reward.py:ends_well",
}
SAMPLING = ("rft", "grpo", "ppo")
QUICK = [
    ("sft", ""),
    ("sft", "--lora_r 2"),
    ("reward", ""),
    ("dpo", ""),
    ("kto", ""),
    ("distill", ""),
    ("rft", ""),
    ("grpo", "--beta 0.04"),
    ("grpo", "--max_staleness 1"),
    ("grpo", "--algorithm prime"),
    ("ppo", ""),
]
OTHERS = [
    ("sft", "--loss dft"),
    ("dpo", "--loss simpo --lora_r 2"),
    ("dpo", "--loss bco_pair"),
    ("grpo", "--algorithm dapo --lora_r 2"),
    ("grpo", "--algorithm gspo --num_iterations 2"),
    ("grpo", "--algorithm remax"),
    ("grpo", "--algorithm process_grpo --step_reward {data}/reward.py:steps"),
    ("grpo", "--algorithm online_dpo"),
    ("grpo", "--algorithm xpo"),
    ("grpo", "--algorithm nash_md"),
    ("ppo", "--algorithm vapo --critic_warmup 1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("model", "teacher")):
        write_arithmetic_model(folder / name, seed=seed)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))  # short previews
    rows = {
        "sft": [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a, b in PROBLEMS],
        "pairs": [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in PROBLEMS],
        "labels": [{"prompt": f"{a}+{b}=", "completion": str(a + b), "label": bool(a % 2)} for a, b in PROBLEMS],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "reward.py").write_text(REWARD)
    return folder


def run(data, output, command, flags, device):
    """The metrics of two steps."""
    text = f"{command} --model_name_or_path {data}/model --output_dir {output} --device {device} --max_steps 2 --learning_rate 1e-3"
    text += f" --per_device_train_batch_size 8 {COMMANDS[command]} {flags}"
    text += " --max_completion_length 4" if command in SAMPLING else ""
    assert main(text.format(data=data).split()) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "command, flags", [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)], ids=lambda value: value or "plain"
)
def test_command_trains_on_the_device_what_it_trains_on_the_cpu(data, tmp_path, monkeypatch, command, flags):
    """With torch's operations for our kernels: the twins and Triton's interpreter are slow, and tested by themselves."""
    monkeypatch.setattr(backend, "has_triton", lambda op: False)
    want = run(data, tmp_path / "cpu", command, flags, "cpu")
    with stand_in_cuda():
        got = run(data, tmp_path / "cuda", command, flags, "cuda")
    assert_near(got, want)


def test_command_trains_through_the_cuda_kernels(data, tmp_path, monkeypatch, cuda_twin):
    monkeypatch.setattr(backend, "has_triton", lambda op: False)
    want = run(data, tmp_path / "cpu", "grpo", "--beta 0.04", "cpu")
    with stand_in_cuda(cuda_twin):
        got = run(data, tmp_path / "cuda", "grpo", "--beta 0.04", "cuda")
    assert_near(got, want)


def assert_near(got, want):
    compared = 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "reward", "eval/loss", "entropy", "loss/value_avg"):
            if isinstance(theirs.get(name), float) and math.isfinite(theirs[name]):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
                compared += name in ("loss", "grad_norm")
    assert compared >= 2


def test_stand_in_holds_the_rules_of_a_device():
    host = torch.randn(3, 4)
    with stand_in_cuda():
        x = torch.ones(3, 4, device="cuda", requires_grad=True)
        assert x.device == x.sum().device == x.cpu().to("cuda").device == torch.nn.Linear(2, 2).to("cuda").weight.device == CUDA
        assert (x.is_cuda, x.is_cpu, host.is_cuda, host.is_cpu) == (True, False, False, True)
        assert x.detach()[0].view(-1)[1:].is_cuda
        assert torch.zeros_like(x).is_cuda
        assert x.new_zeros(2).is_cuda
        assert not torch.zeros_like(x, device="cpu").is_cuda
        assert not torch.zeros(2).is_cuda
        assert torch.empty(5).isnan().all()
        for mixed in (lambda: x + host, lambda: torch.cat([x, host]), lambda: x.gather(1, torch.zeros(3, 1, dtype=torch.long))):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            x.detach().numpy()
        assert (x * torch.tensor(2.0))[torch.tensor([0, 1])].is_cuda  # numbers and indices may come from the host
        (x[1:] * 2).sum().backward()
        assert x.grad.is_cuda
        before = waits.total()
        assert x.sum().item() == 12
        assert waits.total() == before + 1
    assert not torch.ones(2).is_cuda
    assert not torch.cuda.is_available()


def test_engine_generates_on_the_device_what_it_generates_on_the_cpu(cuda_twin, monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda op: False)
    prompts, params = [[1, 2, 3, 4, 5], list(range(30)), [7]], SamplingParams(n=2, max_tokens=12, seed=0, logprobs=True)

    def generated(device, **options):
        torch.manual_seed(0)
        model = ready(llama()).to(device)
        engine = Engine(model, block_size=8, **options)
        outputs = engine.generate(prompts, params)
        return engine, [(sample.token_ids, sample.logprobs) for output in outputs for sample in output.outputs]

    _, want = generated("cpu")
    with stand_in_cuda(cuda_twin):
        engine, got = generated("cuda")
        graphs = engine._memory.cache.graphs
        assert graphs.replayed > 0, graphs.reason
        _, plain = generated("cuda", cuda_graphs=False)
    for other in (got, plain):
        assert [ids for ids, _ in other] == [ids for ids, _ in want]
        for (_, ours), (_, theirs) in zip(other, want, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_engine_behind_a_thread_serves_the_device(monkeypatch):
    """Streams and scores of two clients, also through a change of the weights."""
    monkeypatch.setattr(backend, "has_triton", lambda op: False)
    params = SamplingParams(n=2, max_tokens=8, seed=1, logprobs=True)

    def served(device):
        engine = Engine(ready(llama()).to(device), block_size=8)

        async def client(live, prompt):
            ids = [[], []]
            async for delta in live.stream(prompt, params):
                ids[delta.index] += delta.token_ids
            return ids

        async def serve():
            async with AsyncEngine(engine) as live:
                answers = await asyncio.gather(client(live, [1, 2, 3]), client(live, list(range(20))))
                return answers, await live.score([[4, 5, 6, 7]])

        first, scores = asyncio.run(serve())
        with engine.updating_weights(), torch.no_grad():
            engine.model.get_output_embeddings().weight.mul_(1.5)
        return first, asyncio.run(serve())[0], scores[0].logprobs

    want = served("cpu")
    with stand_in_cuda():
        got = served("cuda")
    assert got[:2] == want[:2]
    assert got[2][1:] == pytest.approx(want[2][1:], abs=1e-4)


@pytest.mark.parametrize("command, flags", [("sft", ""), ("grpo", "--beta 0.04")])
def test_update_waits_three_times_a_micro_batch(data, tmp_path, monkeypatch, command, flags):
    """For the check of the targets, the rows that have a gradient, and the scale of the loss: not for copies, loss and metrics."""
    monkeypatch.setattr(backend, "has_triton", lambda op: False)
    plain, found, passes = Updater.accumulate, [], []

    def accumulate(self, batches):
        before, batches = waits.total(), list(batches)
        passes.append(len(batches))
        result = plain(self, batches)
        found.append(waits.total() - before)
        return result

    monkeypatch.setattr(Updater, "accumulate", accumulate)
    with stand_in_cuda():
        run(data, tmp_path, command, f"{flags} --max_tokens_per_micro_batch 40", "cuda")
    assert max(passes) > 1
    at_the_end = 2  # gradient norm, and what was summed up
    assert all(waited <= 3 * count + at_the_end for waited, count in zip(found, passes, strict=True)), (found, passes, waits)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}


@pytest.mark.parametrize("rope", [None, {**LONGROPE, "original_max_position_embeddings": 64}], ids=["default", "longrope"])
def test_engine_waits_for_nothing_but_the_tokens_of_the_step_before(cuda_twin, rope):
    """Whose copy is not counted: the device has the next step to do meanwhile. Neither plan nor sampler waits, nor a copy to the device."""
    with stand_in_cuda(cuda_twin):
        model = llama(num_hidden_layers=1, **({} if rope is None else {"rope_parameters": rope, "max_position_embeddings": 128}))
        engine = Engine(ready(model).to("cuda"), block_size=8, prefix_caching=False)
        found = []
        for steps in (1, 2, 5):
            waits.clear()
            engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=steps, top_p=0.9, seed=0, ignore_eos=True, logprobs=True))
            found.append(waits.total())
    assert found[1:] == [0, 0], waits  # transformers moves the long frequencies at its first pass
