"""One experiment in memory and on disk: model, optimizer and data, its steps, checkpoints and exports."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

import modelyard
from modelyard import kernels
from modelyard.config.adapter import adapter_to_dict, is_adapter_parameter
from modelyard.config.architecture import Architecture
from modelyard.config.disk import checkpoint_bytes, export_bytes
from modelyard.config.layout import layout_of
from modelyard.config.peft import adapter_of
from modelyard.config.scales import rate_scales
from modelyard.config.train import TrainConfig
from modelyard.data.batch import Batch
from modelyard.data.stream import prefetched
from modelyard.errors import RunFailed, UserError
from modelyard.files import (
    complete_or_absent,
    numbered_folders,
    prune,
    sync,
)
from modelyard.model.decoder import Decoder
from modelyard.model.dropout import token_numbers
from modelyard.model.formats.tokenizer_files import copy_tokenizer
from modelyard.parallel.apply import Fill, Write, parallelize
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.world import World
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.build import (
    adapted_base,
    agreed_base,
    chosen_kernels,
    compiles,
    compute_device,
    first_weights,
    fp8_scaling,
    loss_options,
    open_stream,
    tokenizer_folder,
)
from modelyard.train.checkpoint import Checkpoint, marked_retention, newest_usable, save_checkpoint
from modelyard.train.console import Console
from modelyard.train.evaluators import Evaluators
from modelyard.train.events import EventLog
from modelyard.train.folders import NumberedFolders, folder_bytes, refuse_without_room
from modelyard.train.health import Health
from modelyard.train.metrics import peak_memory
from modelyard.train.optimizer import MOMENTS, Optimizer
from modelyard.train.phases import PhaseClock
from modelyard.train.profiling import Profiler
from modelyard.train.progress import Progress, Save
from modelyard.train.rollback import roll_back, say_spike
from modelyard.train.saving import HostCopies, Saver
from modelyard.train.scaler import GradientScaler
from modelyard.train.schedule import learning_rate
from modelyard.train.signals import StopSignal
from modelyard.train.spikes import SpikeWatch, batch_number
from modelyard.train.start import check_data, starting_point
from modelyard.train.step import LossOptions, StepResult, train_step
from modelyard.train.weights import DTYPES


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
        self.adapter = adapter_of(config.model.base_model.transformer.peft)
        self.progress = Progress()
        self.scaler = (
            GradientScaler(config.optimizer.gradient_scaler, self.progress)
            if self.dtype == torch.float16
            else None
        )
        self.spikes = SpikeWatch(config.training.spikes)
        self.stop = StopSignal(self.world)
        self.events = EventLog(console, kept=self.world.is_main)
        self.clock = PhaseClock(self.device)
        self.profiler = Profiler(config, self.device, console.line, self.world)
        self.folders = NumberedFolders(self.folder, self.world, self.events)
        self.forced: list[str] = []
        """What was gone on from all the same, because of --force."""
        found = base = None
        with self.world.together():
            layout = layout_of(config, self.world.size)
            self._open_data()
            if self.world.is_main:
                self.forced = check_data(config, [self.stream, *self.evaluators.streams], force=force)
        settings = config.training.checkpoint
        usable, damaged = newest_usable(
            self.folder / "checkpoint", checksums=settings.checksums, world=self.world
        )
        with self.world.together():
            if self.world.is_main:
                found, forced = starting_point(
                    config,
                    architecture,
                    self.stream.fingerprint,
                    usable=usable,
                    damaged=damaged,
                    events=self.events,
                    force=force,
                )
                self.forced = forced + self.forced
                for line in self.forced:
                    console.line(f"forced: {line}")
        # The main process alone judges what is on the disk; the others take what it takes.
        found, self.forced = self.world.tell((found, self.forced))
        checkpoint: Checkpoint | None = None
        fill: Fill = _nothing_yet
        with self.world.together():
            compiled = compiles(config, self.device)
            kernels.choose(chosen_kernels(config))
            fp8 = fp8_scaling(config, self.device)
            if found is not None:
                checkpoint = Checkpoint(found, verify=False)
            if checkpoint is None or self.saves_adapter_alone:
                fill, origin = first_weights(architecture, config, goes_on=checkpoint is not None)
                console.line(origin)
            if self.saves_adapter_alone:
                base = adapted_base(config, checkpoint)
        self.base = agreed_base(base, self.world)
        """Where the base is that checkpoints do not have, and what tells it from others."""

        keep_freed_memory()
        self.memory_before = peak_memory(self.device)
        """Bytes, before there was a model."""
        default = config.optimizer.default_learning_rate_scale
        scales = rate_scales(config.model.base_model, architecture, 1.0 if default is None else default)
        self.mesh = alone(self.device) if self.world.is_alone else Mesh(layout, self.device)
        self.parallel = parallelize(
            architecture,
            self.mesh,
            compute_dtype=self.dtype,
            recompute=config.model.multi_stage.recompute,
            offload_activations=config.model.multi_stage.offload_activations,
            compile=compiled,
            sequence_length=config.batch.sequence_length,
            fill=fill,
            frozen=frozenset(name for name, scale in scales.items() if scale == 0),
            adapter=self.adapter,
            fp8=fp8,
        )
        self.model, self.weights = self.parallel.model, self.parallel.weights
        optimizer = config.optimizer
        self.optimizer = Optimizer(
            self.weights.master,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.beta_1, optimizer.beta_2),
            epsilon=optimizer.epsilon,
            state=optimizer.state,
            scales=scales | {n: 0.0 for n, p in self.weights.master.items() if not p.requires_grad},
        )
        self.saver, self.copies = Saver(self.world, asynchronous=settings.asynchronous), HostCopies()
        self.is_whole = True
        """Whether what is in memory is one state of the run, and may be saved."""
        self.went_back = False
        """Whether the last step made the run go back to a checkpoint."""
        self._stands_still = False
        """Whether it was said that nothing is learned."""
        self._saved: int | None = None
        self._saving: Save | None = None
        if checkpoint is not None:
            with self.world.together():
                self.restore(checkpoint)
        self.weights.publish()
        self.health = Health(self)

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

    @property
    def saves_adapter_alone(self) -> bool:
        """Whether checkpoints have the adapter and its optimizer state, and the base stays where it was read from."""
        return self.adapter is not None and self.adapter.freeze_others

    def _saved_names(self, names: Iterable[str]) -> list[str]:
        """Those of the parameters that a checkpoint has."""
        return [name for name in names if not self.saves_adapter_alone or is_adapter_parameter(name)]

    @property
    def finished(self) -> bool:
        return self.progress.iteration >= self.config.training.train_iters

    def where(self) -> str:
        """What the run is doing, in words."""
        return f"{self.clock.phase} of iteration {self.progress.iteration + 1}"

    # Checkpoints and exports

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take weights, moments, progress and statistics from a checkpoint; nothing is as it should be where that fails."""
        self.is_whole = False
        moments = self.optimizer.moments()
        master = {name: parameter.detach() for name, parameter in self.weights.master.items()}
        parameters, parts = self._parts(master, moments, self._saved_names(master))
        if self.forced:  # what was frozen then has no moments there: they begin at 0
            there = checkpoint.tensors()
            parts = {name: part for name, part in parts.items() if f"optimizer.{name}" in there}
        checkpoint.load_into(
            {f"model.{name}": p for name, p in parameters.items()}
            | {f"optimizer.{name}": moment for name, moment in parts.items()}
        )
        state = checkpoint.state
        self.optimizer.load_moments(moments, state["optimizer_steps"])
        vars(self.progress).update(state["progress"])  # others look at this very object
        self.spikes.load_state_dict(state.get("spikes", {}))
        self.stream.load_state_dict(state["data"])
        self._saved = self.progress.iteration
        self.is_whole = True

    def _parts(
        self, master: Mapping[str, Tensor], moments: Mapping[str, Tensor], names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters of these names, and their moments where they have any, as a checkpoint takes them: this process's parts
        of whole tensors."""
        parts = self.parallel.parts
        stored: dict[str, Tensor] = {}
        for moment in MOMENTS:
            found = parts({name: moments[key] for name in names if (key := f"{name}.{moment}") in moments})
            stored |= {f"{name}.{moment}": tensor for name, tensor in found.items()}
        return parts({name: master[name] for name in names}), stored

    @property
    def saved(self) -> bool:
        """Whether this iteration has its checkpoint."""
        return self._saved == self.progress.iteration

    def save_again(self) -> None:
        """Save this iteration although it has its checkpoint, because more is known now."""
        self._saved = None
        self.save(wait=True)

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
        self.health.compare()
        begin, iteration = time.perf_counter(), self.progress.iteration
        moments, names = self.optimizer.moments(), self._saved_names(self.parallel.own)
        master = {name: self.weights.master[name].detach() for name in names}
        if not wait:
            master = self.copies.of(master)
            keys = (f"{name}.{moment}" for name in names for moment in MOMENTS)
            moments = self.copies.of({key: moments[key] for key in keys if key in moments})
        parameters, parts = self._parts(master, moments, names)
        destination = directory / str(iteration)
        # One that is written anew (after going back) stays as long as it was to.
        there = self.world.tell(marked_retention(destination) if destination.exists() else None)
        retention = there or settings.retention(iteration)
        state = {
            "modelyard_version": modelyard.__version__,
            "torch_version": torch.__version__,
            "initialized_on": self.device.type,
            "processes": self.mesh.layout.world,
            "layout": dataclasses.asdict(self.mesh.layout),
            "micro_batch_size": self.config.batch.micro_rows(self.mesh.layout.data),
            "progress": dataclasses.asdict(self.progress),
            "spikes": self.spikes.state_dict(),
            "optimizer_steps": self.optimizer.steps,
            "architecture": dataclasses.asdict(self.architecture),
            "adapter": None if self.adapter is None else adapter_to_dict(self.adapter),
            "base": self.base,
            "seed": self.config.model.distributed.seed,
            "data_fingerprint": self.stream.fingerprint,
            "data": self.stream.state_dict(),
        }

        def write(world: World) -> None:
            with world.together():
                if world.is_main:
                    needed = checkpoint_bytes(self.config, self.architecture)
                    refuse_without_room(self.folder, directory, needed)
                    # What was logged before this checkpoint is not logged again after it: it must be as durable.
                    if (metrics := self.folder / "metrics.jsonl").exists():
                        sync(metrics)
            save_checkpoint(
                destination,
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
                    save.bytes = folder_bytes(destination)
                    try:
                        prune(
                            directory, keep=settings.keep, retention=marked_retention, newest=destination.name
                        )
                    except OSError as error:
                        save.left = f"{error.filename}: {error.strerror}"

        self._saving = save = Save(iteration)
        self.saver.start(write, wait=wait)
        save.waited = time.perf_counter() - begin

    def land(self) -> None:
        """Wait for the checkpoint that is on its way, if there is one, and say how it went; all processes alike.

        Where it failed, the ones before stay; `training.checkpoint.on_error` says whether the run goes on.
        """
        if (save := self._saving) is None:
            return
        begin, phase = time.perf_counter(), self.clock.phase
        self.clock("checkpoint")  # one may wait long here, and others for this one
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
        finally:
            self.clock(phase)
        self._saved = save.iteration
        waited = save.waited + time.perf_counter() - begin
        destination = directory / str(save.iteration)
        self.folders.written("saved", destination, save.bytes, save.seconds, waited)
        if save.left:
            self.console.line(
                f"warning: what {destination} makes superfluous cannot be removed ({save.left})"
            )

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
        self.health.compare()
        directory = destination.parent
        # Where it is replaced, it is from before this run went back to an earlier checkpoint, perhaps with other settings.
        if replace or not self.world.tell(destination.exists()):
            needed = export_bytes(self.config, self.architecture)
            begin = time.perf_counter()
            try:
                with self.world.together():
                    if self.world.is_main:
                        refuse_without_room(self.folder, directory, needed)
                export_weights(
                    self.parallel,
                    destination,
                    config=self.config,
                    tokenizer_folder=self.tokenizer_folder,
                    base=self.base,
                    world=self.world,
                )
            except (UserError, OSError) as error:
                stays = "checkpoints and earlier exports stay"
                self.folders.failed(
                    "exported", destination, error, needed=needed, on_error=settings.on_error, stays=stays
                )
                return
            seconds = time.perf_counter() - begin
            size = folder_bytes(destination) if self.world.is_main else 0
            self.folders.written("exported", destination, size, seconds, seconds)
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
        """Train to the last iteration, or until asked to stop; yields (result, learning rate, seconds waited for data)
        after each step. After one that made the run go back, `went_back` is set until the next."""
        batch_config, mesh = self.config.batch, self.mesh
        clock, rows = self.clock, batch_config.batch_size // mesh.layout.data
        while not self.finished:
            with closing(self._batches()) as batches:
                clock("data")
                for batch, data_wait in batches:
                    if batch is None and self.world.is_alone:
                        return
                    if not mesh.all_have(batch is not None):
                        batch = None
                    clock("other")
                    self.went_back, spike = False, None

                    def judge(loss: float, grad_norm: float) -> str | None:
                        nonlocal spike
                        spike = self.spikes.judge(loss, grad_norm)
                        return None if self.config.training.spikes.policy == "warn" else spike

                    rate = learning_rate(self.config.optimizer.learning_rate, self.optimizer.steps + 1)
                    with self.profiler.around(self.progress.iteration + 1, clock):
                        result = train_step(
                            self.model,
                            self.weights,
                            self.optimizer,
                            self._own_part(batch or Batch.empty(rows, batch_config.sequence_length)),
                            learning_rate=rate,
                            micro_batch_size=batch_config.micro_rows(mesh.layout.data),
                            max_norm=self.config.optimizer.gradient_norm_clipping,
                            loss_options=self._training_options(),
                            device=self.device,
                            mesh=mesh,
                            phase=clock,
                            notice=lambda: self.stop.heard is not None or self.saver.ended,
                            judge=judge,
                            abandon=batch is None,
                        )
                        clock("other")
                    if result.notice or result.abandoned:
                        self.stop.agree()
                        self.land()
                    if result.abandoned:
                        return
                    self.progress.iteration += 1
                    self.progress.tokens += batch_config.tokens
                    self._after(result, spike)
                    yield result, rate, data_wait
                    if self.went_back:
                        break  # the batches that are being made are not those that come now
                    clock("data")

    def _batches(self) -> Generator[tuple[Batch | None, float], None, None]:
        left_out = self.progress.left_out
        iterations = range(self.progress.iteration, self.config.training.train_iters)
        return prefetched(
            self.stream,
            [batch_number(iteration, left_out) for iteration in iterations] if left_out else iterations,
            (self.mesh.share, self.mesh.layout.data),
            give_up=self.stop.asked,
        )

    def _own_part(self, batch: Batch) -> Batch:
        """What this process computes of its share of rows; their tokens have numbers where a dropout asks for them."""
        if self.adapter is not None and self.adapter.dropout:
            rows, length = batch.input_ids.shape
            number = batch_number(self.progress.iteration, self.progress.left_out)
            first = number * self.config.batch.batch_size + self.mesh.share * rows
            numbers = token_numbers(self.config.model.distributed.seed, first, rows, length)
            batch = dataclasses.replace(batch, numbers=numbers)
        return self.parallel.local(batch)

    def _training_options(self) -> LossOptions:
        if self.scaler is None:
            return self.loss_options
        return dataclasses.replace(self.loss_options, gradient_scale=self.scaler.scale)

    def _after(self, result: StepResult, spike: str | None) -> None:
        """Count the step, and do what is to be done about a spike, or about a gradient that overflowed."""
        if self.scaler is not None:
            scale = self.scaler.scale
            if (done := self.scaler.after(result)) is not None:
                self.progress.skipped_steps += 1
                iteration = self.progress.iteration
                text = f"iteration {iteration}: the gradient overflows at loss scale {scale:g}; the step is skipped, {done}"
                self.events.add("overflow", iteration, text, loss_scale=scale)
                return
        if result.skipped is None:
            self.progress.skipped_in_a_row = 0
            self.progress.loss_sum += result.loss
            self.progress.loss_count += 1
            if result.grad_norm == 0 and not self._stands_still:
                self._stands_still = True
                self.events.add(
                    "zero_gradient",
                    self.progress.iteration,
                    f"warning: iteration {self.progress.iteration}: the gradient is exactly 0 although {result.targets:,} tokens "
                    "are trained on: nothing is learned",
                )
        if spike is not None:
            say_spike(self, spike)
            if self.config.training.spikes.policy == "rollback" and roll_back(self, spike):
                return
        if result.skipped is not None:
            self._count_skip(result.skipped)

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
