"""The commands' arguments, torch-free so that -h is fast. Names are TRL's where TRL has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .feedback_arguments import CritiqueArguments, PairArguments, WinRateArguments
from .generation_arguments import EvalArguments, GenerateArguments
from .offline_arguments import (
    DistillArguments,
    PreferenceArguments,
    ReferenceArguments,
    RejectionArguments,
    RewardArguments,
    SupervisedArguments,
    UnpairedArguments,
)
from .online_arguments import (
    EnvironmentArguments,
    OnlineArguments,
    OpponentArguments,
    PPOArguments,
    ProcessArguments,
    SamplingArguments,
)
from .search_arguments import SearchArguments
from .serve_arguments import ServeArguments


@dataclass
class ModelArguments:
    """The model.

    Args:
        model_name_or_path: a local folder in Hugging Face format, or a Hub name.
        dtype: float32, bfloat16 (fp32 masters kept as a 16-bit tail), or auto (what the checkpoint says).
        tokenizer_name_or_path: the tokenizer, when it is not beside the model.
        chat_template: a Jinja file that replaces the tokenizer's chat template.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        head_dtype: the dtype of the LM head's GEMMs: auto (the model's) or float32; give it again to each later command.
        use_peft: train an adapter instead of the weights; the reference is then the model with the adapter off.
        peft_method: the adapter: lora, rslora, dora, qlora, ia3, bitfit (biases alone); given, it implies use_peft; empty: lora.
        lora_r: rank of the LoRA matrices.
        lora_alpha: LoRA scaling numerator (scaling = lora_alpha / lora_r).
        lora_target_modules: names of the modules that get adapters; empty: every linear layer but the head (ia3: keys, values, MLP).
        merge_adapter: save the final model with the adapter folded into its weights, as a plain model; checkpoints keep the adapter.
        load_in_4bit: hold the frozen base as 4-bit NF4 weights, beside an adapter of a LoRA kind; qlora implies it.
        device: cpu, cuda, or auto.
    """

    model_name_or_path: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tokenizer_name_or_path: str = ""
    chat_template: str = ""
    gradient_checkpointing: bool = False
    head_dtype: Literal["auto", "float32"] = "auto"
    use_peft: bool = False
    peft_method: str = ""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] = field(default_factory=list)
    merge_adapter: bool = False
    load_in_4bit: bool = False
    device: str = "auto"


@dataclass
class DataArguments:
    """The data.

    Args:
        dataset_name: a .jsonl, .json, .csv or .parquet file, a `datasets` directory, or a Hub name; or several of them.
        dataset_weights: how often each data set is drawn from, relative to the others; empty: by its records, each once an epoch.
        dataset_split: the split of a Hub data set or a `datasets` directory.
        dataset_map: column renames, theirs=ours, comma-separated (GSM8K: question=prompt,answer=completion).
        eval_dataset_name: held-out data, same formats; empty: none.
        eval_max_samples: how many held-out records to use; 0: all.
        max_samples: how many training records to use of each data set; 0: all.
        max_length: longest sequence in tokens, prompt and completion together.
        max_prompt_length: longest prompt in tokens; 0: no limit of its own.
        system_prompt: a system message put before every conversational prompt.
        on_bad_record: error (stop, naming the line) or skip (drop it, counted at the end).
        shuffle: draw the records in a new seeded order every epoch.
        streaming: read, shuffle and tokenize the training records while training, for data larger than memory; needs max_steps.
        stream_window: how many records a stream shuffles together.
    """

    dataset_name: str | list[str] = ""
    dataset_weights: list[float] = field(default_factory=list)
    dataset_split: str = "train"
    dataset_map: str = ""
    eval_dataset_name: str = ""
    eval_max_samples: int = 0
    max_samples: int = 0
    max_length: int = 1024
    max_prompt_length: int = 0
    system_prompt: str = ""
    on_bad_record: Literal["error", "skip"] = "error"
    shuffle: bool = True
    streaming: bool = False
    stream_window: int = 10_000


@dataclass
class OptimArguments:
    """The optimizer and its schedule.

    Args:
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: a transformers schedule: constant, linear, cosine, constant_with_warmup, …
        warmup_steps: optimizer steps of linear warm-up; a value below 1 is a fraction of all steps.
        weight_decay: decoupled weight decay of the matrices (norms and biases get none).
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: the term added to the root of the second moment.
        max_grad_norm: gradients are scaled down to this global norm; 0: no clipping.
        max_steps: optimizer steps (grpo: rollouts, each with num_iterations updates); -1: given by num_train_epochs.
        num_train_epochs: passes over the data when max_steps is -1.
    """

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_steps: int = -1
    num_train_epochs: float = 1.0


@dataclass
class BatchArguments:
    """The batch. Its cut into micro-batches changes memory and speed, never the loss.

    Args:
        per_device_train_batch_size: sequences (grpo: completions) of one accumulation step.
        gradient_accumulation_steps: multiplies the batch; sequences an optimizer step = this x per_device_train_batch_size.
        max_tokens_per_micro_batch: tokens forwarded at once, shared prompts counted once.
        max_chunk_bytes: logits held at once, in bytes; 0: chosen from the caches.
    """

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_tokens_per_micro_batch: int = 4096
    max_chunk_bytes: int = 0


@dataclass
class RunArguments:
    """The run: outputs, logging, checkpoints.

    Args:
        output_dir: where the model, metrics.jsonl, summary.json, report.html and checkpoints go.
        overwrite_output_dir: allow an output_dir that already holds a finished or broken-off run.
        run_name: the run's name in the trackers; empty: output_dir's last part.
        seed: seeds data order, sampling and initialization.
        report_to: trackers besides metrics.jsonl: tensorboard, wandb, trackio (comma-separated), or none.
        logging_steps: optimizer steps between logged metrics.
        save_steps: optimizer steps between checkpoints; 0: only when interrupted. The final model is always saved.
        save_total_limit: how many checkpoints to keep; 0: all.
        eval_steps: optimizer steps between held-out evaluations; 0: only before and after.
        stop_at: end the run early at a held-out evaluation, as in eval/loss<0.5 or eval/reward>=0.9; empty: never.
        resume_from_checkpoint: a checkpoint folder, or "latest" in output_dir.
        dry_run: check everything, print the plan, train nothing.
    """

    output_dir: str = "runs/out"
    overwrite_output_dir: bool = False
    run_name: str = ""
    seed: int = 0
    report_to: str = "none"
    logging_steps: int = 1
    save_steps: int = 0
    save_total_limit: int = 2
    eval_steps: int = 0
    stop_at: str = ""
    resume_from_checkpoint: str = ""
    dry_run: bool = False


@dataclass
class DemoArguments:
    """The demonstration.

    Args:
        output_dir: where its models, report.html and summary.json go.
        seed: seeds the model, the problems, data order and sampling.
        quick: a run of seconds that shows every stage and learns nothing.
    """

    output_dir: str = "runs/demo"
    seed: int = 0
    quick: bool = False


TRAINING: tuple[type, ...] = (ModelArguments, DataArguments, OptimArguments, BatchArguments, RunArguments)
COMMANDS: dict[str, tuple[type, ...]] = {
    "sft": (*TRAINING, SupervisedArguments),
    "reward": (*TRAINING, RewardArguments),
    "dpo": (*TRAINING, PreferenceArguments, ReferenceArguments),
    "kto": (*TRAINING, UnpairedArguments, ReferenceArguments),
    "rft": (*TRAINING, SamplingArguments, RejectionArguments, EnvironmentArguments),
    "distill": (*TRAINING, SamplingArguments, DistillArguments),
    "grpo": (*TRAINING, SamplingArguments, OnlineArguments, EnvironmentArguments, ProcessArguments, OpponentArguments),
    "ppo": (*TRAINING, SamplingArguments, OnlineArguments, EnvironmentArguments, PPOArguments),
    "generate": (ModelArguments, DataArguments, SamplingArguments, GenerateArguments, EnvironmentArguments, PairArguments),
    "critique": (ModelArguments, DataArguments, SamplingArguments, CritiqueArguments),
    "eval": (ModelArguments, DataArguments, SamplingArguments, EvalArguments, EnvironmentArguments, WinRateArguments),
    "search": (ModelArguments, DataArguments, SamplingArguments, SearchArguments),
    "serve": (ModelArguments, ServeArguments),
    "demo": (DemoArguments,),
}


@dataclass(frozen=True)
class Arguments:
    """All arguments of one command; sections that the command does not have keep their defaults.

    Attributes:
        command: a key of `COMMANDS`.
        loss_options, advantage_options: the rows' own arguments, given as --loss.NAME and --advantage.NAME.
    """

    command: str = "grpo"
    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    optim: OptimArguments = field(default_factory=OptimArguments)
    batch: BatchArguments = field(default_factory=BatchArguments)
    run: RunArguments = field(default_factory=RunArguments)
    sampling: SamplingArguments = field(default_factory=SamplingArguments)
    online: OnlineArguments = field(default_factory=OnlineArguments)
    process: ProcessArguments = field(default_factory=ProcessArguments)
    opponent: OpponentArguments = field(default_factory=OpponentArguments)
    environment: EnvironmentArguments = field(default_factory=EnvironmentArguments)
    ppo: PPOArguments = field(default_factory=PPOArguments)
    generate: GenerateArguments = field(default_factory=GenerateArguments)
    pairs: PairArguments = field(default_factory=PairArguments)
    critique: CritiqueArguments = field(default_factory=CritiqueArguments)
    evaluate: EvalArguments = field(default_factory=EvalArguments)
    search: SearchArguments = field(default_factory=SearchArguments)
    win_rate: WinRateArguments = field(default_factory=WinRateArguments)
    serve: ServeArguments = field(default_factory=ServeArguments)
    supervised: SupervisedArguments = field(default_factory=SupervisedArguments)
    reference: ReferenceArguments = field(default_factory=ReferenceArguments)
    preference: PreferenceArguments = field(default_factory=PreferenceArguments)
    unpaired: UnpairedArguments = field(default_factory=UnpairedArguments)
    reward: RewardArguments = field(default_factory=RewardArguments)
    rejection: RejectionArguments = field(default_factory=RejectionArguments)
    distill: DistillArguments = field(default_factory=DistillArguments)
    loss_options: dict[str, Any] = field(default_factory=dict)
    advantage_options: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Every argument of the command by flag name, as config.yaml holds them: `--config` reads it back."""
        flat: dict[str, Any] = {}
        for section in vars(self).values():
            if isinstance(section, COMMANDS[self.command]):
                flat |= vars(section)
        flat |= {f"loss.{name}": value for name, value in self.loss_options.items()}
        return flat | {f"advantage.{name}": value for name, value in self.advantage_options.items()}
