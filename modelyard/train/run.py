"""`modelyard train`: the run from its first line to its last."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

import modelyard
from modelyard.config.architecture import Architecture
from modelyard.config.disk import disk_problem
from modelyard.config.loader import Loaded
from modelyard.config.train import TrainConfig
from modelyard.data.stream import prefetched
from modelyard.errors import RunFailed, UserError
from modelyard.files import complete_or_absent, only_one, prune, remove_folder, set_aside
from modelyard.model.formats.tokenizer_files import copy_tokenizer
from modelyard.train.build import (
    build_model,
    compute_device,
    initial_weights,
    loss_options,
    open_stream,
    tokenizer_folder,
)
from modelyard.train.checkpoint import Checkpoint, newest_usable, save_checkpoint
from modelyard.train.console import Console
from modelyard.train.evaluators import Evaluators
from modelyard.train.metrics import MetricsLog, peak_flops, peak_memory, training_line, utilization
from modelyard.train.optimizer import Optimizer
from modelyard.train.resume import refuse_changes
from modelyard.train.schedule import learning_rate
from modelyard.train.signals import StopSignal
from modelyard.train.step import StepResult, train_step
from modelyard.train.weights import DTYPES, Weights


@dataclass
class Progress:
    """How far the run is; everything that a checkpoint holds beside tensors and configuration."""

    iteration: int = 0
    tokens: int = 0
    """Positions consumed, padding included."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class Run:
    """Model, optimizer, data and place of one experiment, and the things that happen between steps."""

    def __init__(self, config: TrainConfig, architecture: Architecture, *, force: bool, console: Console):
        self.config, self.architecture, self.console = config, architecture, console
        self.folder = config.run.experiment_dir
        self.device = compute_device()
        self.dtype = DTYPES[config.model.distributed.training_dtype]
        self.loss_options = loss_options(config.model.base_model)
        self.progress = Progress()
        self.stop = StopSignal()

        self.stream = open_stream(config, "training", architecture)
        self.tokenizer_folder = tokenizer_folder(config, self.stream)

        self.evaluators = Evaluators(
            config,
            architecture,
            device=self.device,
            tokenizer_folder=self.tokenizer_folder,
            say=console.line,
            stop=lambda: bool(self.stop),
        )

        checkpoint, damaged = newest_usable(self.folder / "checkpoint")
        if damaged and checkpoint is None and not force:
            raise UserError(
                *damaged.values(),
                f"every checkpoint in {self.folder / 'checkpoint'} is damaged; --force sets them aside and starts anew",
            )
        for path, problem in damaged.items():
            console.line(f"warning: checkpoint {path} is damaged ({problem}); set aside as {set_aside(path)}")
        if checkpoint is not None:
            for line in refuse_changes(
                checkpoint, config, architecture, self.stream.fingerprint, force=force
            ):
                console.line(f"forced: {line}")

        self.model = build_model(architecture, self.device)
        if checkpoint is None:
            console.line(initial_weights(self.model, architecture, config))
        self.weights = Weights(self.model, self.dtype)
        optimizer = config.optimizer
        self.optimizer = Optimizer(
            self.weights.master,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.beta_1, optimizer.beta_2),
            epsilon=optimizer.epsilon,
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        self.weights.publish()

    @property
    def finished(self) -> bool:
        return self.progress.iteration >= self.config.training.train_iters

    # Checkpoints and exports

    def _restore(self, checkpoint: Checkpoint) -> None:
        moments = self.optimizer.moments()
        checkpoint.load_into(
            {f"model.{name}": p.data for name, p in self.weights.master.items()}
            | {f"optimizer.{name}": moment for name, moment in moments.items()}
        )
        state = checkpoint.state
        self.optimizer.load_moments(moments, state["optimizer_steps"])
        self.progress = Progress(**state["progress"])
        self.stream.load_state_dict(state["data"])

    def save(self) -> None:
        """Save a checkpoint of this iteration, unless it is there, then remove the ones it makes superfluous."""
        directory = self.folder / "checkpoint"
        settings = self.config.training.checkpoint
        destination = directory / str(self.progress.iteration)
        if not destination.exists():
            begin = time.perf_counter()
            save_checkpoint(
                destination,
                parameters=self.weights.master,
                moments=self.optimizer.moments(),
                state={
                    "modelyard_version": modelyard.__version__,
                    "torch_version": torch.__version__,
                    "initialized_on": self.device.type,
                    "progress": dataclasses.asdict(self.progress),
                    "optimizer_steps": self.optimizer.steps,
                    "architecture": dataclasses.asdict(self.architecture),
                    "seed": self.config.model.distributed.seed,
                    "data_fingerprint": self.stream.fingerprint,
                    "data": self.stream.state_dict(),
                },
                config=self.config.model_dump(mode="json"),
            )
            self.console.line(f"saved {destination} in {time.perf_counter() - begin:.1f} s")
        prune(directory, keep=settings.keep, keep_every=settings.keep_every, ordinal=settings.ordinal)

    def export(self, *, replace: bool) -> None:
        """Write the Hugging Face folder of this iteration; with `replace` also where there is one of other weights."""
        from modelyard.train.export import export_weights

        settings = self.config.training.export
        assert settings.format is not None
        directory = self.folder / "export" / settings.format
        destination = directory / str(self.progress.iteration)
        if replace and destination.exists():
            # From before this run went back to an earlier checkpoint, perhaps with other settings.
            remove_folder(destination)
        if not destination.exists():
            export_weights(
                self.weights.master,
                destination,
                architecture=self.architecture,
                config=self.config,
                tokenizer_folder=self.tokenizer_folder,
            )
            self.console.line(f"exported {destination}")
        prune(directory, keep=settings.keep, keep_every=settings.keep_every, ordinal=settings.ordinal)

    def keep_tokenizer(self) -> None:
        """Copy the data's tokenizer into the experiment, so that its checkpoints can be used without the data."""
        destination = self.folder / "tokenizer"
        if self.tokenizer_folder is not None and not destination.exists():
            with complete_or_absent(destination) as temporary:
                copy_tokenizer(self.tokenizer_folder, temporary)

    # Steps

    def steps(self) -> Iterator[tuple[StepResult, float, float]]:
        """Train to the last iteration; yields (result, learning rate, seconds waited for data) after each step."""
        training, batch_config = self.config.training, self.config.batch
        with closing(prefetched(self.stream, self.progress.iteration, training.train_iters)) as batches:
            for batch, data_wait in batches:
                rate = learning_rate(self.config.optimizer.learning_rate, self.optimizer.steps + 1)
                result = train_step(
                    self.model,
                    self.weights,
                    self.optimizer,
                    batch,
                    learning_rate=rate,
                    micro_batch_size=batch_config.micro_batch_size,
                    max_norm=self.config.optimizer.gradient_norm_clipping,
                    loss_options=self.loss_options,
                    device=self.device,
                )
                self.progress.iteration += 1
                self.progress.tokens += batch.input_ids.numel()
                if result.skipped:
                    self._count_skip(result.skipped)
                else:
                    self.progress.skipped_in_a_row = 0
                yield result, rate, data_wait

    def _count_skip(self, reason: str) -> None:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        limit = self.config.training.max_skipped_steps
        self.console.line(
            f"iteration {self.progress.iteration}: {reason}; the step is skipped, weights untouched "
            f"({self.progress.skipped_in_a_row} in a row, the run stops at {limit})"
        )
        if self.progress.skipped_in_a_row >= limit:
            raise RunFailed(
                f"{limit} steps in a row were skipped (last: {reason}); lower optimizer.learning_rate.base, look at "
                f"the data around iteration {self.progress.iteration}, or raise training.max_skipped_steps; "
                f"the last checkpoint in {self.folder / 'checkpoint'} is untouched"
            )


class IntervalMeter:
    """Means and speed since the last log line, over steps alone (evaluations and saves are not counted)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.losses: list[float] = []
        self.seconds = self.data_wait = 0.0
        self.tokens = 0

    def add(self, result: StepResult, seconds: float, data_wait: float, tokens: int) -> None:
        if not result.skipped:
            self.losses.append(result.loss)
        self.seconds += seconds
        self.data_wait += data_wait
        self.tokens += tokens


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def train(loaded: Loaded, *, force: bool = False) -> int:
    """Train as the config says, from where the experiment stands. Returns the exit status."""
    config, architecture = loaded.train, loaded.architecture
    if architecture is None:
        # The pretrained folder is gone. It is read once: a run that has a checkpoint does not need it.
        checkpoint, _ = newest_usable(config.run.experiment_dir / "checkpoint")
        if checkpoint is None:
            raise UserError(*loaded.warnings)
        architecture = checkpoint.architecture
    if problem := disk_problem(config, architecture):
        raise UserError(problem)
    folder, existed = config.run.experiment_dir, config.run.experiment_dir.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"run.experiment_dir: {folder} cannot be written to: {error.strerror}") from None
    with only_one(folder / ".lock", f"another process is training in {folder} at this moment"):
        for unfinished in (*folder.glob("checkpoint/*.tmp"), *folder.glob("export/*/*.tmp")):
            shutil.rmtree(unfinished, ignore_errors=True)  # left over by a run that was killed
        console = Console()
        try:
            run = Run(config, architecture, force=force, console=console)
        except BaseException:
            # Nothing stays behind when a run is refused.
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        console.open_log(folder / "log.txt")
        run.keep_tokenizer()
        remarks = [f"note: {line}" for line in loaded.notices] + [
            f"warning: {line}" for line in loaded.warnings
        ]
        return _train(run, remarks)


def _train(run: Run, remarks: list[str]) -> int:
    config, training, progress, console = run.config, run.config.training, run.progress, run.console
    begin_iteration = progress.iteration
    _announce(run, remarks)
    log = MetricsLog(run.folder, resumed_at=begin_iteration, tensorboard=training.logs.tensorboard)
    console.start_bar(training.train_iters, done=begin_iteration)
    peak = peak_flops(run.device, run.dtype)
    meter, total = IntervalMeter(), IntervalMeter()

    with run.stop, closing(console), closing(log):
        if begin_iteration or run.finished:
            # What a kill or a signal cut off after this iteration's checkpoint was written.
            done = log.evaluated if training.train_iters else ()
            _side_work(run, log, resumed=True, done=done)

        begin = time.perf_counter()
        for result, rate, data_wait in run.steps():
            seconds = time.perf_counter() - begin
            for sums in (meter, total):
                sums.add(result, seconds, data_wait, config.batch.tokens)
            console.advance(progress.iteration, result.loss)
            if training.logs.due(progress.iteration) or (run.finished and training.logs.interval):
                record = _training_record(run, result, rate, meter, peak)
                log.write(record, prefix="training")
                pace = total.seconds / (progress.iteration - begin_iteration)
                seconds_left = pace * (training.train_iters - progress.iteration)
                console.line(training_line(record, training.train_iters, seconds_left))
                meter.reset()
            _side_work(run, log)
            if run.stop:
                console.line(
                    f"stopped after iteration {progress.iteration}; the same command goes on from there"
                )
                return 128 + (run.stop.signum or 0)
            if training.shutdown.due(progress.iteration) and not run.finished:
                console.line(f"shutdown after iteration {progress.iteration}, as training.shutdown says")
                return 0
            begin = time.perf_counter()

        tested = progress.iteration == begin_iteration and "test" in log.evaluated
        if training.test_iters and not tested:
            test = run.evaluators.test(run.model, progress.iteration)
            if test is not None:
                log.write(test, prefix="test")
        _farewell(run)
    return 0


def _side_work(run: Run, log: MetricsLog, *, resumed: bool = False, done: Collection[str] = ()) -> None:
    """What is due beside training after this iteration: checkpoint, evaluators (those `done` left out), export.

    The checkpoint comes first, so that nothing that goes wrong in the others costs it.
    """
    training, iteration = run.config.training, run.progress.iteration
    if iteration and (training.checkpoint.due(iteration) or run.finished):
        run.save()
    for name, entry in training.evaluators.items():
        if (entry.due(iteration) or (run.finished and entry.interval)) and name not in done:
            evaluation = run.evaluators.run(name, entry, run.model, iteration)
            if evaluation is not None:
                log.write(evaluation, prefix=name)
    if iteration and run.stop:
        run.save()
    elif iteration and (training.export.due(iteration) or (run.finished and training.export.interval)):
        run.export(replace=not resumed)


def _training_record(
    run: Run, result: StepResult, rate: float, meter: IntervalMeter, peak: float | None
) -> dict[str, Any]:
    """The metrics of this iteration; `loss` is its own over its whole batch, `loss_mean` that of the log interval."""
    speed = meter.tokens / meter.seconds
    return {
        "iteration": run.progress.iteration,
        "loss": _finite(result.loss),
        "learning_rate": rate,
        "grad_norm": _finite(result.grad_norm),
        "tokens": run.progress.tokens,
        "tokens_per_second": speed,
        "targets": result.targets,
        "loss_mean": sum(meter.losses) / len(meter.losses) if meter.losses else None,
        "skipped_steps": run.progress.skipped_steps,
        "data_wait_share": meter.data_wait / meter.seconds,
        "memory_bytes": peak_memory(run.device),
        **utilization(run.architecture, run.config.batch.sequence_length, speed, peak),
    }


def _announce(run: Run, remarks: list[str]) -> None:
    config, console = run.config, run.console
    for remark in remarks:
        console.line(remark)
    console.line(
        f"{run.architecture.parameter_count():,} parameters, {config.model.distributed.training_dtype} on "
        f"{run.device.type} ({torch.get_num_threads()} threads), {config.batch.tokens:,} tokens an iteration "
        f"(micro-batches of {config.batch.micro_batch_size})"
    )
    for line in run.stream.describe():
        console.line(line)
    iteration, train_iters = run.progress.iteration, config.training.train_iters
    if iteration:
        console.line(f"resuming from {run.folder / 'checkpoint' / str(iteration)}")
    if iteration >= train_iters > 0:
        console.line(
            f"this run has {iteration} iterations, training.train_iters is {train_iters}: nothing to train"
        )


def _farewell(run: Run) -> None:
    console, folder = run.console, run.folder
    console.stop_bar()
    if run.config.training.train_iters == 0:
        console.line(
            f"evaluated; training.train_iters is 0: nothing is trained or saved ({folder / 'metrics.jsonl'})"
        )
        return
    console.line(f"finished {run.progress.iteration} iterations, {run.progress.tokens:,} tokens")
    console.line(f"  checkpoints  {folder / 'checkpoint'}")
    board = f", tensorboard --logdir {folder / 'tensorboard'}" if run.config.training.logs.tensorboard else ""
    console.line(f"  metrics      {folder / 'metrics.jsonl'}{board}")
    if run.config.training.export.interval:
        console.line(f"  export       {folder / 'export'}")
    console.line(f"  try          modelyard generate {folder} --prompt '…'")
