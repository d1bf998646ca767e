"""One experiment in memory and on disk: model, optimizer and data, its steps, checkpoints and exports."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import modelyard
from modelyard.config.architecture import Architecture
from modelyard.config.disk import checkpoint_bytes, export_bytes
from modelyard.config.layout import layout_of
from modelyard.config.scales import rate_scales
from modelyard.config.train import TrainConfig
from modelyard.data.stream import ids_outside_vocabulary, prefetched
from modelyard.errors import RunFailed, UserError
from modelyard.files import (
    complete_or_absent,
    numbered_folders,
    prune,
    set_aside,
    sync,
)
from modelyard.model.decoder import Decoder
from modelyard.model.formats.tokenizer_files import copy_tokenizer
from modelyard.parallel.apply import Fill, Write, parallelize
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.world import World
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.build import (
    compiles,
    compute_device,
    first_weights,
    loss_options,
    open_stream,
    tokenizer_folder,
)
from modelyard.train.checkpoint import Checkpoint, marked_retention, newest_usable, save_checkpoint
from modelyard.train.console import Console
from modelyard.train.data_check import damaged_data, foreign_tokenizers, stores_read
from modelyard.train.evaluators import Evaluators
from modelyard.train.events import EventLog
from modelyard.train.experiment import another_run
from modelyard.train.folders import NumberedFolders, refuse_without_room
from modelyard.train.optimizer import MOMENTS, Optimizer
from modelyard.train.phases import PhaseClock
from modelyard.train.profiling import Profiler
from modelyard.train.resume import refuse_changes
from modelyard.train.saving import Saver, host_copies
from modelyard.train.schedule import learning_rate
from modelyard.train.signals import StopSignal
from modelyard.train.step import StepResult, train_step
from modelyard.train.weights import DTYPES


@dataclass
class Progress:
    """How far the run is; everything that a checkpoint holds beside tensors and configuration."""

    iteration: int = 0
    tokens: int = 0
    """Positions consumed, padding included."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    """Checkpoints that could not be written, since the beginning."""
    loss_sum: float = 0.0
    """Of the steps since the last training record that were not skipped; with `loss_count` the record's `loss_mean`."""
    loss_count: int = 0


@dataclass
class Save:
    """A checkpoint on its way."""

    iteration: int
    seconds: float = 0.0
    """From the beginning until it was durable."""
    waited: float = 0.0
    """Of these training stood still."""


class Run:
    """Model, optimizer, data and place of one experiment, and the things that happen between steps.

    Of several processes each has one, with its part of the model, and all do the same; the main one writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        architecture: Architecture,
        *,
        force: bool,
        console: Console,
        world: World | None = None,
    ):
        self.config, self.architecture, self.console = config, architecture, console
        self.world = world or World()
        self.folder = config.run.experiment_dir
        self.device = compute_device()
        self.dtype = DTYPES[config.model.distributed.training_dtype]
        self.loss_options = loss_options(config.model.base_model)
        self.progress = Progress()
        self.stop = StopSignal(self.world)
        self.events = EventLog(console, kept=self.world.is_main)
        self.clock = PhaseClock(self.device)
        self.profiler = Profiler(config, self.device, console.line, self.world)
        self.folders = NumberedFolders(self.folder, self.world, self.events)
        self.forced: list[str] = []
        """What was gone on from all the same, because of --force."""
        found = None
        with self.world.together():
            layout = layout_of(config, self.world.size)
            self._open_data()
            self._check_data(force=force)
        settings = config.training.checkpoint
        usable, damaged = newest_usable(
            self.folder / "checkpoint", checksums=settings.checksums, world=self.world
        )
        with self.world.together():
            if self.world.is_main:
                found = self._starting_point(usable, damaged, force=force)
        # The main process alone judges what is on the disk; the others take what it takes.
        found, self.forced = self.world.tell((found, self.forced))
        checkpoint: Checkpoint | None = None
        fill: Fill = _nothing_yet
        with self.world.together():
            compiled = compiles(config, self.device)
            if found is None:
                fill, origin = first_weights(architecture, config)
                console.line(origin)
            else:
                checkpoint = Checkpoint(found, verify=False)

        keep_freed_memory()
        default = config.optimizer.default_learning_rate_scale
        scales = rate_scales(config.model.base_model, architecture, 1.0 if default is None else default)
        self.mesh = alone(self.device) if self.world.is_alone else Mesh(layout, self.device)
        self.parallel = parallelize(
            architecture,
            self.mesh,
            compute_dtype=self.dtype,
            recompute=config.model.multi_stage.recompute,
            compile=compiled,
            sequence_length=config.batch.sequence_length,
            fill=fill,
            frozen=frozenset(name for name, scale in scales.items() if scale == 0),
        )
        self.model, self.weights = self.parallel.model, self.parallel.weights
        optimizer = config.optimizer
        self.optimizer = Optimizer(
            self.weights.master,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.beta_1, optimizer.beta_2),
            epsilon=optimizer.epsilon,
            scales=scales,
        )
        self.saver = Saver(self.world, asynchronous=settings.asynchronous)
        self._saved: int | None = None
        self._saving: Save | None = None
        if checkpoint is not None:
            with self.world.together():
                self._restore(checkpoint)
        self.weights.publish()

    def _open_data(self) -> None:
        config, console = self.config, self.console
        self.stream = open_stream(config, "training", self.architecture)
        self.tokenizer_folder = tokenizer_folder(config, self.stream)
        self.evaluators = Evaluators(
            config,
            self.architecture,
            tokenizer_folder=self.tokenizer_folder,
            say=console.line,
            stop=self.stop.agree,
            world=self.world,
        )

    def _check_data(self, *, force: bool) -> None:
        if not self.world.is_main:
            return
        streams = [self.stream, *self.evaluators.streams]
        read = stores_read(streams)
        if problems := damaged_data(read) + ids_outside_vocabulary(streams):
            raise UserError(*problems)
        for stream in streams:
            stream.describe()  # says what the first block shows: that no document fits in a row
        self.forced = foreign_tokenizers(self.config, read)
        if self.forced and not force:
            raise UserError(*self.forced, "with --force it is trained all the same")

    def _starting_point(self, usable: Path | None, damaged: dict[Path, str], *, force: bool) -> Path | None:
        """The folder of the checkpoint to go on from; None: from the beginning. Raises UserError where neither may be."""
        config, architecture = self.config, self.architecture
        checkpoint = None if usable is None else Checkpoint(usable, verify=False)
        if damaged and checkpoint is None and not force:
            raise UserError(
                *damaged.values(),
                f"every checkpoint in {self.folder / 'checkpoint'} is damaged; --force sets them aside and starts anew",
            )
        foreign = self.forced
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
            self.console.line(f"forced: {line}")
        return None if checkpoint is None else checkpoint.folder

    @property
    def finished(self) -> bool:
        return self.progress.iteration >= self.config.training.train_iters

    def where(self) -> str:
        """What the run is doing, in words."""
        return f"{self.clock.phase} of iteration {self.progress.iteration + 1}"

    # Checkpoints and exports

    def _restore(self, checkpoint: Checkpoint) -> None:
        moments = self.optimizer.moments()
        master = {name: parameter.detach() for name, parameter in self.weights.master.items()}
        parameters, parts = self._parts(master, moments, list(master))
        checkpoint.load_into(
            {f"model.{name}": p for name, p in parameters.items()}
            | {f"optimizer.{name}": moment for name, moment in parts.items()}
        )
        state = checkpoint.state
        self.optimizer.load_moments(moments, state["optimizer_steps"])
        self.progress = Progress(**state["progress"])
        self.stream.load_state_dict(state["data"])
        self._saved = self.progress.iteration

    def _parts(
        self, master: Mapping[str, Tensor], moments: Mapping[str, Tensor], names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and moments of these names as a checkpoint takes them: this process's parts of whole tensors."""
        parts = self.parallel.parts
        stored: dict[str, Tensor] = {}
        for moment in MOMENTS:
            found = parts({name: moments[f"{name}.{moment}"] for name in names})
            stored |= {f"{name}.{moment}": tensor for name, tensor in found.items()}
        return parts({name: master[name] for name in names}), stored

    @property
    def saved(self) -> bool:
        """Whether this iteration has its checkpoint."""
        return self._saved == self.progress.iteration

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint of this iteration, unless it is there, and remove the ones that it makes superfluous.

        Unless it is to `wait`, or `training.checkpoint.asynchronous` is off, only the copy in memory is done when this
        returns, and `land` has the rest. One is on its way at a time.
        """
        settings, directory = self.config.training.checkpoint, self.folder / "checkpoint"
        if self._saving is None or self._saving.iteration != self.progress.iteration:
            self.land()
            if self.saved:
                self.folders.prune(directory, settings, marked_retention)
            else:
                self._begin_save(wait=wait or not settings.asynchronous)
        if wait or not settings.asynchronous:
            self.land()

    def _begin_save(self, *, wait: bool) -> None:
        directory, settings = self.folder / "checkpoint", self.config.training.checkpoint
        begin, iteration = time.perf_counter(), self.progress.iteration
        moments, names = self.optimizer.moments(), self.parallel.own
        master = {name: self.weights.master[name].detach() for name in names}
        if not wait:
            master = host_copies(master)
            keys = [f"{name}.{moment}" for name in names for moment in MOMENTS]
            moments = host_copies({key: moments[key] for key in keys})
        parameters, parts = self._parts(master, moments, names)
        retention = settings.retention(iteration)
        state = {
            "modelyard_version": modelyard.__version__,
            "torch_version": torch.__version__,
            "initialized_on": self.device.type,
            "processes": self.mesh.layout.world,
            "layout": dataclasses.asdict(self.mesh.layout),
            "micro_batch_size": self.config.batch.micro_rows(self.mesh.layout.data),
            "progress": dataclasses.asdict(self.progress),
            "optimizer_steps": self.optimizer.steps,
            "architecture": dataclasses.asdict(self.architecture),
            "seed": self.config.model.distributed.seed,
            "data_fingerprint": self.stream.fingerprint,
            "data": self.stream.state_dict(),
        }

        def write(world: World) -> None:
            with world.together():
                if world.is_main:
                    refuse_without_room(directory, checkpoint_bytes(self.config, self.architecture))
                    # What was logged before this checkpoint is not logged again after it: it must be as durable.
                    if (metrics := self.folder / "metrics.jsonl").exists():
                        sync(metrics)
            save_checkpoint(
                directory / str(iteration),
                parameters=parameters,
                moments=parts,
                state=state,
                config=self.config.model_dump(mode="json"),
                retention=retention,
                world=world,
            )
            save.seconds = time.perf_counter() - begin
            with (
                world.together()
            ):  # the others wait here, where they may wait long, and not in their next step
                if world.is_main:
                    prune(directory, keep=settings.keep, retention=marked_retention)

        self._saving = save = Save(iteration)
        self.saver.start(write, wait=wait)
        save.waited = time.perf_counter() - begin

    def land(self) -> None:
        """Wait for the checkpoint that is on its way, if there is one, and say how it went; all processes alike.

        Where it failed, the ones before stay; `training.checkpoint.on_error` says whether the run goes on.
        """
        if (save := self._saving) is None:
            return
        begin = time.perf_counter()
        directory, on_error = self.folder / "checkpoint", self.config.training.checkpoint.on_error
        self._saving = None
        try:
            self.saver.finish()
        except (UserError, OSError) as error:
            self.progress.failed_saves += 1
            before = numbered_folders(directory)
            stays = f"checkpoint {before[-1]} stays" if before else "there is no earlier checkpoint"
            if (count := self.progress.failed_saves) > 1:
                stays += f"; {count} could not be saved so far"
            needed = checkpoint_bytes(self.config, self.architecture)
            destination = directory / str(save.iteration)
            self.folders.failed("saved", destination, error, needed=needed, on_error=on_error, stays=stays)
            return
        self._saved = save.iteration
        waited = save.waited + time.perf_counter() - begin
        self.folders.written("saved", directory / str(save.iteration), save.seconds, waited)

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
        if replace or not self.world.tell(destination.exists()):
            needed = export_bytes(self.config, self.architecture)
            begin = time.perf_counter()
            try:
                with self.world.together():
                    if self.world.is_main:
                        refuse_without_room(directory, needed)
                export_weights(
                    self.parallel,
                    destination,
                    config=self.config,
                    tokenizer_folder=self.tokenizer_folder,
                    world=self.world,
                )
            except (UserError, OSError) as error:
                stays = "checkpoints and earlier exports stay"
                self.folders.failed(
                    "exported", destination, error, needed=needed, on_error=settings.on_error, stays=stays
                )
                return
            seconds = time.perf_counter() - begin
            self.folders.written("exported", destination, seconds, seconds)
        if settings.keep is not None:
            self.folders.prune(directory, settings, lambda path: settings.retention(int(path.name)))

    def keep_tokenizer(self) -> None:
        """Copy the data's tokenizer into the experiment, so that its checkpoints can be used without the data."""
        destination = self.folder / "tokenizer"
        if self.world.is_main and self.tokenizer_folder is not None and not destination.exists():
            with complete_or_absent(destination) as temporary:
                copy_tokenizer(self.tokenizer_folder, temporary)

    # Steps

    def steps(self) -> Iterator[tuple[StepResult, float, float]]:
        """Train to the last iteration; yields (result, learning rate, seconds waited for data) after each step."""
        training, batch_config, mesh = self.config.training, self.config.batch, self.mesh
        clock, data = self.clock, mesh.layout.data
        ready = prefetched(self.stream, self.progress.iteration, training.train_iters, (mesh.share, data))
        with closing(ready) as batches:
            clock("data")
            for batch, data_wait in batches:
                clock("other")
                rate = learning_rate(self.config.optimizer.learning_rate, self.optimizer.steps + 1)
                with self.profiler.around(self.progress.iteration + 1, clock):
                    result = train_step(
                        self.model,
                        self.weights,
                        self.optimizer,
                        self.parallel.local(batch),
                        learning_rate=rate,
                        micro_batch_size=batch_config.micro_rows(data),
                        max_norm=self.config.optimizer.gradient_norm_clipping,
                        loss_options=self.loss_options,
                        device=self.device,
                        mesh=mesh,
                        phase=clock,
                        notice=lambda: self.stop.heard is not None or self.saver.ended,
                    )
                    clock("other")
                self.progress.iteration += 1
                self.progress.tokens += batch_config.tokens
                if result.notice:
                    self.stop.agree()
                    self.land()
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
            self.land()
            before = numbered_folders(self.folder / "checkpoint")
            kept = f"checkpoint {before[-1]} is untouched" if before else "there is no checkpoint yet"
            raise RunFailed(
                f"{limit} steps in a row were skipped (last: {reason}); lower optimizer.learning_rate.base, look at "
                f"the data around iteration {self.progress.iteration}, or raise training.max_skipped_steps; {kept}"
            )


def _nothing_yet(model: Decoder, write: Write) -> None:
    """In place of first values, where a checkpoint is loaded later."""
