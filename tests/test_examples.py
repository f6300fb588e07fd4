"""Every examples/*.yaml runs for two steps on a tiny model made on the spot; its name begins with its command."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign import catalogue, cli
from fastalign.recipes import arithmetic
from fastalign.recipes.arguments import COMMANDS

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
SUMS = [(n, n + 1) for n in range(10, 26)]

# records that each command can read; `question` and `answer` are there for the files that rename them
RECORDS = {
    "sft": [{"question": f"{a}+{b}=", "answer": f"{a + b}", "prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS],
    "dpo": [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}", "margin": 1.0} for a, b in SUMS],
    "kto": [{"prompt": f"{a}+{b}=", "completion": f"{a + b + a % 2}", "label": a % 2 == 0} for a, b in SUMS],
    "grpo": [{"question": f"{a}+{b}=", "prompt": f"{a}+{b}=", "answer": f"{a + b}", "solution": f"{a + b}"} for a, b in SUMS],
}
RECORDS |= {"reward": RECORDS["dpo"], "rft": RECORDS["grpo"], "ppo": RECORDS["grpo"], "distill": RECORDS["sft"]}
SMALL = {
    "max_steps": 2,
    "num_rounds": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_length": 48,
    "max_completion_length": 4,
    "min_reward": "none",
    "save_steps": 0,
    "eval_steps": 0,
    "critic_warmup": 1,
    "dtype": "float32",
    "device": "cpu",
}


def command_of(path: Path) -> str:
    return path.stem.partition("-")[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    tokenizer = arithmetic.build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overrides(values: dict, command: str, model: Path, tmp_path: Path) -> dict[str, object]:
    """What takes the place of the file's model, data and sizes; everything else is the file's."""
    renamed = dict(pair.split("=") for pair in str(values.get("dataset_map", "")).replace(" ", "").split(",") if pair)
    rows = [{k: v for k, v in row.items() if k not in renamed.values() or k in renamed} for row in RECORDS[command]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = values.get("dataset_name", "")
    names = [str(path)] * (len(given) if isinstance(given, list) else 1)
    known = {name for section in COMMANDS[command] for name in section.__dataclass_fields__}
    changes: dict[str, object] = {name: value for name, value in SMALL.items() if name in known}
    changes |= {"model_name_or_path": str(model), "dataset_name": names, "output_dir": str(tmp_path / "out")}
    for flag in ("tokenizer_name_or_path", "ref_model_name_or_path", "teacher_model_name_or_path"):
        changes |= {flag: str(model)} if values.get(flag) else {}
    return changes | ({"eval_dataset_name": str(path)} if values.get("eval_dataset_name") else {})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_two_steps(path, model, tmp_path, capsys):
    values, command = yaml.safe_load(path.read_text()), command_of(path)
    assert command in RECORDS, f"{path.name}: a file is named after its command, as in {command}-what.yaml"
    argv = [command, "--config", str(path)]
    for name, value in overrides(values, command, model, tmp_path).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    status = cli.main(argv)
    shown = capsys.readouterr()
    assert status == 0, shown.err
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2
    assert (tmp_path / "out/model.safetensors").exists() or (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_how_it_is_run_and_is_listed(path):
    first = path.read_text().splitlines()[0]
    assert first == f"# fastalign {command_of(path)} --config examples/{path.name}"
    assert command_of(path) in catalogue.COMMANDS
    assert f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text()
