"""`training`: how long, what is logged, evaluated, saved and exported on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from modelyard.config.base import DataType, Section
from modelyard.files import Retention

ExportFormat = Literal["llama", "qwen2", "mistral", "starcoder2", "peft"]
OnError = Literal["stop", "continue"]


class IntervalConfig(Section):
    """Something that happens every so many iterations."""

    interval: int | None = Field(default=None, gt=0)
    """Every how many iterations; null: never."""
    offset: int = Field(default=0, ge=0)
    """Shift: it happens where (iteration - offset) is a multiple of the interval, in iterations."""

    def due(self, iteration: int) -> bool:
        """Whether it happens after `iteration` (counted from 1)."""
        return self.ordinal(iteration) is not None

    def ordinal(self, iteration: int) -> int | None:
        """How many times it has happened after `iteration`, this time included; None where it does not happen then."""
        if self.interval is None or (iteration - self.offset) % self.interval:
            return None
        return (iteration - self.offset % self.interval) // self.interval + bool(self.offset % self.interval)


class KeptConfig(IntervalConfig):
    """Numbered folders that are written at intervals, of which some stay."""

    keep: int | None = Field(default=None, gt=0)
    """How many of the newest on the interval stay; null: all."""
    keep_every: int | None = Field(default=None, gt=0)
    """Those whose number is a multiple of this stay for ever (every n-th save); null: none."""

    def retention(self, iteration: int) -> Retention:
        """How long the folder of this iteration stays."""
        number = self.ordinal(iteration)
        if number is None:
            return "ephemeral"
        return "permanent" if self.keep_every and number % self.keep_every == 0 else "regular"


class LogsConfig(IntervalConfig):
    """The console line, `metrics.jsonl` and TensorBoard."""

    interval: int | None = Field(default=100, gt=0)
    """Every how many iterations a line is written; null: never."""
    tensorboard: bool = True
    """Whether TensorBoard event files are written beside metrics.jsonl."""


class WandbAlertConfig(IntervalConfig):
    """Messages that Weights & Biases sends on (mail, Slack)."""

    interval: int | None = Field(default=None, gt=0)
    """Every how many iterations a message with the latest numbers is sent; a multiple of logs.interval; null: never."""
    status_updates: bool | None = None
    """Whether starts, ends, failures and saves that failed are messages too; null: yes where there is an interval."""


class WandbConfig(Section):
    """Weights & Biases, beside metrics.jsonl; needs `pip install modelyard[wandb]`. Off while entity_name is null."""

    entity_name: str | None = None
    """User or team that the run belongs to; null: nothing is sent."""
    project_name: str = "modelyard"
    """Project of that entity."""
    group_name: str = "default"
    """Group of runs in the project."""
    alert: WandbAlertConfig = Field(default_factory=WandbAlertConfig)
    """Messages."""


class ProfilingConfig(Section):
    """Traces of named iterations, in EXPERIMENT_DIR/profile/<iteration>/."""

    iterations: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list)
    """Iterations that are traced, counted from 1; such a step is slower, its numbers are the same."""
    memory: bool = False
    """Whether memory is followed too: a snapshot for pytorch.org/memory_viz on a GPU, a timeline in bytes on a CPU."""


class GuideProfilingConfig(Section):
    """The guides' way to say which iterations are traced, beside `training.profiling.iterations`: skip `skip` once, then
    again and again: leave out `wait` and `warmup`, trace `cycles`."""

    cpu: bool = False
    """Whether operations on the host are traced."""
    cuda: bool = False
    """Whether operations on the GPU are traced."""
    skip: int = Field(default=1, ge=0)
    """Left out at the beginning, in iterations."""
    wait: int = Field(default=0, ge=0)
    """Left out before each cycle, in iterations."""
    warmup: int = Field(default=1, ge=0)
    """Left out before each cycle like `wait`, in iterations."""
    cycles: int = Field(default=1, gt=0)
    """Traced in each cycle, in iterations."""
    averages: bool = False
    """Whether the table of operations is wanted (operators.txt)."""
    trace: bool = False
    """Whether every operation in its order is wanted (trace.json.gz)."""
    export: bool = False
    """Whether the chrome trace is wanted (trace.json.gz)."""

    def due(self, iteration: int) -> bool:
        """Whether `iteration` (counted from 1) is traced; never without a device or without a product."""
        if not (self.cpu or self.cuda) or not (self.averages or self.trace or self.export):
            return False
        left_out = self.wait + self.warmup
        return iteration > self.skip and (iteration - self.skip - 1) % (left_out + self.cycles) >= left_out


class LossEvaluatorConfig(Section):
    """Mean loss over a fixed beginning of a dataset: every evaluation sees the same samples."""

    type: Literal["loss"] = "loss"
    """Kind of evaluator."""
    iterations: int | None = Field(default=None, gt=0)
    """How many batches of `batch.batch_size` samples are read, in batches; null: one pass over the dataset."""
    dataset_name: str | None = None
    """Entry of data.datasets that is read; default: the evaluator's name."""


class SamplesEvaluatorConfig(Section):
    """Text written by the model from fixed prompts, to watch it learn."""

    type: Literal["samples"]
    """Kind of evaluator."""
    prompts: list[str] = Field(min_length=1)
    """Beginnings to go on from; an empty one starts from begin-of-sequence."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Length of each continuation, in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = Field(default=None, gt=0)
    """Draw from the k likeliest tokens only; null: from all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this probability; null: from all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; the same at every evaluation."""


class ChatEvaluatorConfig(Section):
    """Answers of the model to conversations, to see whether they end where they should and call tools as these are defined."""

    type: Literal["chat"]
    """Kind of evaluator."""
    path: Path | None = None
    """A file of JSON lines (.jsonl, .gz, .zst), a conversation a line in any format that `prepare` knows. Its last answer is
    left out and shown beside the model's."""
    conversations: list[list[dict[str, Any]]] | None = Field(default=None, min_length=1)
    """Instead of a file: conversations here, each a list of messages (`role`, `content`)."""
    limit: int | None = Field(default=8, gt=0)
    """How many of the file's are answered, its first ones, in conversations; null: all."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = Field(default=None, gt=0)
    """Draw from the k likeliest tokens only; null: from all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this probability; null: from all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; the same at every evaluation."""

    @model_validator(mode="after")
    def _one_source(self) -> ChatEvaluatorConfig:
        if (self.path is None) == (self.conversations is None):
            raise ValueError("give either path or conversations")
        if self.conversations is not None and "limit" in self.model_fields_set:
            raise ValueError("limit: only with path; all of conversations are answered")
        return self


class EvaluatorConfig(IntervalConfig):
    """One named evaluation, at its own interval and once more at the end of training."""

    at_start: bool = False
    """Whether it also runs before the first iteration, as iteration 0."""
    evaluator: Annotated[
        LossEvaluatorConfig | SamplesEvaluatorConfig | ChatEvaluatorConfig, Field(discriminator="type")
    ]
    """What is evaluated."""

    @field_validator("evaluator", mode="before")
    @classmethod
    def _loss_by_default(cls, value: Any) -> Any:
        return {"type": "loss", **value} if isinstance(value, dict) else value


class CheckpointConfig(KeptConfig):
    """What a stopped run goes on from: weights, optimizer state, position in the data. Saved once more at the end."""

    interval: int | None = Field(default=None, gt=0)
    """Every how many iterations; null: only at the end."""
    keep: int | None = Field(default=5, gt=0)
    """How many of the newest checkpoints on the interval stay, in checkpoints; null: all. One off the interval (the last of
    a run that was stopped or has ended) goes once there is a newer one."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints whose number is a multiple of this stay for ever, in checkpoints (every n-th save); null: none."""
    ephemeral_interval: int | None = Field(default=None, gt=0)
    """Every how many iterations a short-lived checkpoint is saved beside those of `interval`, so that less is lost when a
    run is killed: it goes once there is a newer one of any kind. null: none."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, and waits for its copy in memory alone. The copy
    takes as much of the host's memory as weights and optimizer state, from the first such save on."""
    checksums: Literal["auto"] | bool = "auto"
    """Whether the files of a checkpoint that a run goes on from are compared with their checksums, by all processes
    together, or only their sizes. auto: up to 4 GiB."""
    on_error: OnError = "stop"
    """What a save that fails (a full disk) does: stop the run, or continue and save at the next interval. The checkpoint
    before stays in both; a run whose last save fails ends with a non-zero exit status."""

    def wanted(self, iteration: int) -> bool:
        """Whether a checkpoint of either kind is saved after `iteration`."""
        ephemeral = self.ephemeral_interval
        return self.due(iteration) or bool(ephemeral and iteration % ephemeral == 0)


class ExportConfig(KeptConfig):
    """A Hugging Face folder in EXPERIMENT_DIR/export/<format>/<iteration>/, also once at the end."""

    keep: int | None = Field(default=None, gt=0)
    """How many of the newest exports on the interval stay, in exports; null: all."""
    keep_every: int | None = Field(default=None, gt=0)
    """Exports whose number is a multiple of this stay for ever, in exports (every n-th save); null: none."""
    on_error: OnError = "stop"
    """What an export that fails (a full disk) does: stop the run, or continue without it."""
    format: ExportFormat | None = None
    """Family of the folder: which of transformers' models reads it; an adapter is merged into its base. Or peft: of an adapter
    nothing but itself, as PEFT reads it. Required with an interval."""
    data_type: DataType = "bfloat16"
    """Type of the exported weights; of format peft float32 where nothing is said, as adapters are trained."""

    @model_validator(mode="before")
    @classmethod
    def _adapters_as_trained(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") == "peft":
            return {"data_type": "float32", **values}
        return values

    @model_validator(mode="after")
    def _format_given(self) -> ExportConfig:
        if self.interval is not None and self.format is None:
            raise ValueError(
                "export.interval is given without export.format; write format: llama (or qwen2, mistral, starcoder2)"
            )
        return self


class SpikesConfig(Section):
    """Steps whose loss or gradient norm stands far above those before: what is one, and what is done about it."""

    policy: Literal["ignore", "warn", "skip", "rollback"] = "warn"
    """ignore: nothing is judged. warn: say so, with the documents of the batch. skip: leave the weights untouched by that
    step, as well. rollback: go back to a checkpoint from before the last `batches` batches, and train on without these."""
    window: int = Field(default=128, ge=8)
    """How many steps are compared with, in iterations; nothing is judged before there is half of them. They are kept in
    checkpoints."""
    threshold: float = Field(default=6.0, gt=0)
    """How far above their mean is a spike, in standard deviations (of the loss, and of the logarithm of the gradient norm)."""
    batches: int = Field(default=2, gt=0)
    """With rollback: how many batches are left out from there on, the one of the spike and those before it, in batches."""
    max_rollbacks: int = Field(default=3, ge=0)
    """With rollback: how often in the whole run; the spike after that stops it. Skipped steps have
    training.max_skipped_steps for a limit."""


class HealthConfig(IntervalConfig):
    """Comparing the processes of a run; one alone has nothing to compare."""

    interval: int | None = Field(default=100, gt=0)
    """Every how many iterations, and before each checkpoint, it is seen to that all processes which hold the same weights
    have the same bits, and all count alike; a run in which they do not ends. null: never."""
    slow_rank_factor: float | None = Field(default=1.5, gt=1)
    """How many times slower than the others (their median) a process must be for a warning that names it, at these
    iterations; null: never."""


class TrainingConfig(Section):
    """The run: its length and everything that happens at intervals."""

    train_iters: int = Field(ge=0)
    """Length of the run, in optimizer steps (iterations), skipped ones included; 0 only evaluates."""
    logs: LogsConfig = Field(default_factory=LogsConfig)
    """Console, metrics.jsonl and TensorBoard."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""
    profiling: ProfilingConfig = Field(default_factory=ProfilingConfig)
    """Traces and memory of named iterations."""
    evaluators: dict[str, EvaluatorConfig] = Field(default_factory=dict)
    """Evaluations during training, by name."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving what a stopped run goes on from."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """Writing Hugging Face folders."""
    shutdown: IntervalConfig = Field(default_factory=IntervalConfig)
    """Leaving after a checkpoint, for schedulers with short jobs; must fall on checkpoints."""
    test_iters: int = Field(default=0, ge=0)
    """Batches of the dataset `test` evaluated once at the end, in batches; 0: none."""
    compile: Literal["auto"] | bool = "auto"
    """Whether each block's norms, rotations and activations are fused by torch.compile, for half a minute at the start:
    on a CPU 10 to 17% faster steps in bfloat16 and next to nothing in float32 (docs/speed.md). auto: on a GPU. On a CPU
    it needs a C++ compiler."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes norms, rotations, activations, the loss's softmax and AdamW on a GPU: torch, or this program's kernels in
    Triton (docs/kernels.md), which agree with torch to rounding. With `compile` they are operators of the compiled blocks.
    auto: torch, until the kernels have been measured on a GPU. triton needs a CUDA device and the package triton."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """How the matrix products of the blocks are scaled into fp8, in training (docs/fp8.md): by one scale a tensor, or by one
    for each row. none: they are computed in training_dtype. Needs training_dtype: bfloat16, and sizes that are multiples of
    16; on a GPU compute capability 8.9. On a CPU it is emulated: slower, the same rounding."""
    max_skipped_steps: int = Field(default=10, gt=0)
    """Consecutive steps skipped, for a loss or gradient that is not finite or a spike, before the run stops, in iterations."""

    spikes: SpikesConfig = Field(default_factory=SpikesConfig)
    """Loss and gradient spikes."""
    health: HealthConfig = Field(default_factory=HealthConfig)
    """Copies of the weights that differ, and processes that are slow."""

    @field_validator("wandb", "profiling", mode="before")
    @classmethod
    def _left_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("evaluators", mode="before")
    @classmethod
    def _dataset_named_like_the_evaluator(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: _with_dataset_name(name, entry) for name, entry in value.items()}

    @model_validator(mode="after")
    def _test_is_taken(self) -> TrainingConfig:
        if self.test_iters and "test" in self.evaluators:
            raise ValueError(
                "an evaluator cannot be called 'test' beside test_iters, which is called so; rename it"
            )
        return self

    @model_validator(mode="after")
    def _alerts_at_logs(self) -> TrainingConfig:
        alert, logs = self.wandb.alert, self.logs
        if alert.interval is not None and (
            logs.interval is None
            or alert.interval % logs.interval
            or (alert.offset - logs.offset) % logs.interval
        ):
            raise ValueError(
                f"wandb.alert.interval {alert.interval} (offset {alert.offset}) must fall on log lines: a multiple of "
                f"logs.interval {logs.interval} (offset {logs.offset})"
            )
        return self

    @model_validator(mode="after")
    def _shutdown_at_checkpoints(self) -> TrainingConfig:
        shutdown, checkpoint = self.shutdown, self.checkpoint
        if shutdown.interval is None:
            return self
        if checkpoint.interval is None or shutdown.interval % checkpoint.interval:
            raise ValueError(
                f"shutdown.interval {shutdown.interval} must be a multiple of checkpoint.interval {checkpoint.interval}"
            )
        if (shutdown.offset - checkpoint.offset) % checkpoint.interval:
            raise ValueError(
                f"shutdown.offset {shutdown.offset} must fall on a checkpoint (offset {checkpoint.offset})"
            )
        return self


def _with_dataset_name(name: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    evaluator = entry.get("evaluator", {})
    if (
        not isinstance(evaluator, dict)
        or evaluator.get("type", "loss") != "loss"
        or evaluator.get("dataset_name")
    ):
        return entry
    return {**entry, "evaluator": {**evaluator, "dataset_name": name}}
