"""One experiment in memory and on disk: model, optimizer and data, its steps, checkpoints and exports."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import modelyard
from modelyard.config.architecture import Architecture
from modelyard.config.disk import export_bytes, size
from modelyard.config.scales import rate_scales
from modelyard.config.train import TrainConfig
from modelyard.config.training import OnError
from modelyard.data.stream import ids_outside_vocabulary, prefetched
from modelyard.errors import RunFailed, UserError
from modelyard.files import (
    DISK_FULL,
    complete_or_absent,
    numbered_folders,
    prune,
    set_aside,
    sync,
)
from modelyard.model.compile import compile_blocks
from modelyard.model.formats.tokenizer_files import copy_tokenizer
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.build import (
    build_model,
    compiles,
    compute_device,
    initial_weights,
    loss_options,
    open_stream,
    tokenizer_folder,
)
from modelyard.train.checkpoint import Checkpoint, newest_usable, save_checkpoint
from modelyard.train.console import Console
from modelyard.train.data_check import damaged_data, foreign_tokenizers, stores_read
from modelyard.train.evaluators import Evaluators
from modelyard.train.events import EventLog
from modelyard.train.experiment import another_run
from modelyard.train.optimizer import Optimizer
from modelyard.train.phases import PhaseClock
from modelyard.train.profiling import Profiler
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
    loss_sum: float = 0.0
    """Of the steps since the last training record that were not skipped; with `loss_count` the record's `loss_mean`."""
    loss_count: int = 0


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
        self.events = EventLog(console)
        self.clock = PhaseClock(self.device)
        self.profiler = Profiler(config, self.device, console.line)

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

        read = stores_read([self.stream, *self.evaluators.streams])
        if problems := damaged_data(read) + ids_outside_vocabulary([self.stream, *self.evaluators.streams]):
            raise UserError(*problems)
        for stream in (self.stream, *self.evaluators.streams):
            stream.describe()  # says what the first block shows: that no document fits in a row
        foreign = foreign_tokenizers(config, read)
        if foreign and not force:
            raise UserError(*foreign, "with --force it is trained all the same")

        checkpoint, damaged = newest_usable(self.folder / "checkpoint")
        if damaged and checkpoint is None and not force:
            raise UserError(
                *damaged.values(),
                f"every checkpoint in {self.folder / 'checkpoint'} is damaged; --force sets them aside and starts anew",
            )
        self.forced: list[str] = []
        """What was gone on from all the same, because of --force."""
        if checkpoint is not None:
            self.forced = refuse_changes(
                checkpoint, config, architecture, self.stream.fingerprint, force=force
            )
        elif other := another_run(self.folder, config, architecture, self.stream.fingerprint):
            if not force:
                raise UserError(f"{other}; choose another folder, or start over in this one with --force")
            self.forced = [other]
        for path, problem in damaged.items():
            warning = f"warning: checkpoint {path} is damaged ({problem}); set aside as {set_aside(path)}"
            self.events.add("checkpoint_damaged", int(path.name), warning)
        self.forced += foreign
        for line in self.forced:
            console.line(f"forced: {line}")

        keep_freed_memory()
        self.model = build_model(architecture, self.device)
        if compiles(config, self.device):
            compile_blocks(self.model)
        if checkpoint is None:
            console.line(initial_weights(self.model, architecture, config))
        self.weights = Weights(self.model, self.dtype)
        optimizer, default = config.optimizer, config.optimizer.default_learning_rate_scale
        scales = rate_scales(config.model.base_model, architecture, 1.0 if default is None else default)
        self.weights.freeze(name for name, scale in scales.items() if scale == 0)
        self.optimizer = Optimizer(
            self.weights.master,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.beta_1, optimizer.beta_2),
            epsilon=optimizer.epsilon,
            scales=scales,
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

    @property
    def saved(self) -> bool:
        """Whether this iteration has its checkpoint."""
        return (self.folder / "checkpoint" / str(self.progress.iteration)).exists()

    def save(self) -> None:
        """Save a checkpoint of this iteration, unless it is there, then remove the ones it makes superfluous.

        Where that fails, the ones before stay; `training.checkpoint.on_error` says whether the run goes on.
        """
        directory = self.folder / "checkpoint"
        settings = self.config.training.checkpoint
        destination = directory / str(self.progress.iteration)
        if not destination.exists():
            moments = self.optimizer.moments()
            tensors = [*self.weights.master.values(), *moments.values()]
            needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            begin = time.perf_counter()
            try:
                _refuse_without_room(directory, needed)
                # What was logged before this checkpoint is not logged again after it: it must be as durable.
                if (metrics := self.folder / "metrics.jsonl").exists():
                    sync(metrics)
                save_checkpoint(
                    destination,
                    parameters=self.weights.master,
                    moments=moments,
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
            except (UserError, OSError) as error:
                before = numbered_folders(directory)
                stays = f"checkpoint {before[-1]} stays" if before else "there is no earlier checkpoint"
                self._failed_write("saved", error, directory, needed, settings.on_error, stays)
                return
            self._written("saved", destination, begin)
        prune(directory, keep=settings.keep, keep_every=settings.keep_every, ordinal=settings.ordinal)

    def _written(self, event: Literal["saved", "exported"], destination: Path, begin: float) -> None:
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in destination.iterdir())
        text = f"{event} {destination} in {seconds:.1f} s"
        self.events.add(event, self.progress.iteration, text, seconds=round(seconds, 3), bytes=size)

    def _failed_write(
        self, verb: str, error: Exception, directory: Path, needed: int, on_error: OnError, stays: str
    ) -> None:
        """Say and keep that a checkpoint or export could not be written; raises RunFailed where that stops the run."""
        cause = error if isinstance(error, OSError) else error.__cause__
        free = shutil.disk_usage(self.folder).free
        reason = str(error)
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            reason = f"no space left in {directory} ({size(free)} free, {size(needed)} needed)"
        text = f"iteration {self.progress.iteration} is not {verb}: {reason}; {stays}"
        facts = {"free_bytes": free, "needed_bytes": needed, "folder": str(directory)}
        self.events.add(
            "save_failed", self.progress.iteration, f"warning: {text}", say=on_error == "continue", **facts
        )
        if on_error == "stop":
            raise RunFailed(text)

    @property
    def export_folder(self) -> Path | None:
        """Where this iteration's Hugging Face folder is or would be; None where none is asked for."""
        family = self.config.training.export.format
        return None if family is None else self.folder / "export" / family / str(self.progress.iteration)

    def export(self, *, replace: bool) -> None:
        """Write the Hugging Face folder of this iteration; with `replace` also where there is one of other weights."""
        from modelyard.train.export import export_weights

        settings, destination = self.config.training.export, self.export_folder
        assert destination is not None
        directory = destination.parent
        # Where it is replaced, it is from before this run went back to an earlier checkpoint, perhaps with other settings.
        if replace or not destination.exists():
            needed = export_bytes(self.config, self.architecture)
            begin = time.perf_counter()
            try:
                _refuse_without_room(directory, needed)
                export_weights(
                    self.weights.master,
                    destination,
                    architecture=self.architecture,
                    config=self.config,
                    tokenizer_folder=self.tokenizer_folder,
                )
            except (UserError, OSError) as error:
                stays = "checkpoints and earlier exports stay"
                self._failed_write("exported", error, directory, needed, settings.on_error, stays)
                return
            self._written("exported", destination, begin)
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
        clock = self.clock
        with closing(prefetched(self.stream, self.progress.iteration, training.train_iters)) as batches:
            clock("data")
            for batch, data_wait in batches:
                clock("other")
                rate = learning_rate(self.config.optimizer.learning_rate, self.optimizer.steps + 1)
                with self.profiler.around(self.progress.iteration + 1, clock):
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
                        phase=clock,
                    )
                    clock("other")
                self.progress.iteration += 1
                self.progress.tokens += batch.input_ids.numel()
                if result.skipped:
                    self._count_skip(result.skipped)
                else:
                    self.progress.skipped_in_a_row = 0
                    self.progress.loss_sum += result.loss
                    self.progress.loss_count += 1
                yield result, rate, data_wait
                clock("data")

    def _count_skip(self, reason: str) -> None:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        limit = self.config.training.max_skipped_steps
        self.events.add(
            "skipped",
            self.progress.iteration,
            f"iteration {self.progress.iteration}: {reason}; the step is skipped, weights untouched "
            f"({self.progress.skipped_in_a_row} in a row, the run stops at {limit})",
        )
        if self.progress.skipped_in_a_row >= limit:
            before = numbered_folders(self.folder / "checkpoint")
            kept = f"checkpoint {before[-1]} is untouched" if before else "there is no checkpoint yet"
            raise RunFailed(
                f"{limit} steps in a row were skipped (last: {reason}); lower optimizer.learning_rate.base, look at "
                f"the data around iteration {self.progress.iteration}, or raise training.max_skipped_steps; {kept}"
            )


def _refuse_without_room(directory: Path, needed: int) -> None:
    """Raise OSError before the disk is filled in vain."""
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
