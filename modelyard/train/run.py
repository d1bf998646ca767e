"""`modelyard train`: the run from its first line to its last."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

from modelyard.config.architecture import Architecture
from modelyard.config.disk import disk_problem
from modelyard.config.loader import Loaded
from modelyard.errors import RunFailed, UserError
from modelyard.files import only_one
from modelyard.launch.process import keep_output
from modelyard.parallel.world import World, connected
from modelyard.train.announce import announce, farewell, say_end, say_start
from modelyard.train.checkpoint import Checkpoint, newest_usable
from modelyard.train.console import Console
from modelyard.train.experiment import refuse_foreign_folder, write_description
from modelyard.train.failure import Watch, lost_contact, on_its_own
from modelyard.train.forecast import Forecast
from modelyard.train.metrics import (
    IntervalMeter,
    MetricsLog,
    NoMetrics,
    peak_flops,
    peak_memory,
    training_line,
    training_record,
)
from modelyard.train.state import Run
from modelyard.train.wandb_run import WandbRun, require_wandb

LEASE = 180.0
"""Seconds that a shared disk may take to let go of what a dead machine held."""


def train(loaded: Loaded, *, force: bool = False) -> int:
    """Train as the config says, from where the experiment stands. Returns the exit status.

    Under torchrun every process of the job calls this.
    """
    distributed, folder = loaded.train.model.distributed, loaded.train.run.experiment_dir
    traces = folder / "logs"
    with connected(backend=distributed.backend, timeout=distributed.timeout, traces=traces) as world:
        console, where = Console(speaks=world.is_main), [lambda: "the start"]
        with closing(console), on_its_own(world, console, lambda: where[-1]()):
            with world.together():
                architecture = _check(loaded, force=force) if world.is_main else None
            architecture = world.tell(architecture)
            assert architecture is not None
            with _own_folder(folder, world) as start:
                with start():
                    run = Run(loaded.train, architecture, force=force, console=console, world=world)
                where.append(run.where)
                with world.together():
                    _open_log(console, folder, world)
                    run.keep_tokenizer()
                remarks = [f"note: {line}" for line in [*loaded.notices, *loaded.remarks]]
                remarks += [f"warning: {line}" for line in loaded.warnings]
                with _watch(run):
                    return _train(run, remarks)


def _check(loaded: Loaded, *, force: bool) -> Architecture:
    """Raise UserError where the run cannot begin, before anything is made; returns the shape of the model."""
    config, architecture = loaded.train, loaded.architecture
    if architecture is None:
        # The pretrained folder is gone. It is read once: a run that has a checkpoint does not need it.
        usable, _ = newest_usable(config.run.experiment_dir / "checkpoint")
        if usable is None:
            raise UserError(*loaded.warnings)
        architecture = Checkpoint(usable, verify=False).architecture
    if problem := disk_problem(config, architecture):
        raise UserError(problem)
    pretrained = config.pretrained
    if config.training.export.interval and pretrained is not None and not pretrained.path.exists():
        # Found now, and not at the first export, which may be at the end.
        raise UserError(
            f"pretrained.path: {pretrained.path} is gone, and training.export takes from its config.json what is not known "
            "here: put it back, or set training.export.interval=null"
        )
    require_wandb(config)
    if not force:
        refuse_foreign_folder(config.run.experiment_dir)
    return architecture


@contextmanager
def _own_folder(folder: Path, world: World) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Make the experiment's folder, if need be, and hold its lock; the others wait for the main process to have it.

    Gives what is to be entered around the start: where that is refused, nothing stays behind that was made for it.
    """
    with ExitStack() as stack:
        start: Callable[[], AbstractContextManager[None]] = nullcontext
        with world.together():
            if world.is_main:
                start = stack.enter_context(_locked(folder))
        yield start


@contextmanager
def _locked(folder: Path) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    made = [place for place in (folder / ".lock", folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"run.experiment_dir: {folder} cannot be written to: {error.strerror}") from None

    @contextmanager
    def start() -> Iterator[None]:
        try:
            yield
        except BaseException:
            if folder in made and not (folder / "checkpoint").exists():
                shutil.rmtree(folder, ignore_errors=True)
            elif made:
                made[0].unlink(missing_ok=True)
            for place in made[2:]:
                with suppress(OSError):  # another run may have begun in it
                    place.rmdir()
            raise

    # After a restart without the machine that held the lock: NFS lets go of it when its lease is over, some 90 s.
    patience = LEASE if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" else 0.0
    with only_one(
        folder / ".lock", f"another process is training in {folder} at this moment", patience=patience
    ):
        for pattern in ("checkpoint/*.tmp", "export/*/*.tmp", "profile/*.tmp"):
            for unfinished in folder.glob(pattern):
                shutil.rmtree(unfinished, ignore_errors=True)  # left over by a run that was killed
        yield start


def _open_log(console: Console, folder: Path, world: World) -> None:
    if world.is_main:
        console.open_log(folder / "log.txt")
        return
    path = folder / "logs" / f"rank-{world.rank}.txt"
    console.open_log(path)
    keep_output(path)  # and what libraries say


def _watch(run: Run) -> Watch:
    begin = run.progress.iteration
    return Watch(
        run.clock,
        run.world,
        timeout=run.config.model.distributed.timeout,
        where=run.where,
        settled=lambda: run.progress.iteration > begin,
        log=run.console.path,
    )


def _train(run: Run, remarks: list[str]) -> int:
    config, training, console, events, world = (
        run.config,
        run.config.training,
        run.console,
        run.events,
        run.world,
    )
    with world.together():
        events.open(run.folder / "events.jsonl")
        announce(run, remarks)
        if world.is_main:
            write_description(
                run.folder,
                config,
                run.architecture,
                device=run.device,
                layout=run.mesh.layout,
                data_fingerprint=run.stream.fingerprint,
            )
        log = _open_metrics(run)
    log.evaluated = world.tell(log.evaluated)
    with ExitStack() as stack:
        for thing in (events, log):
            stack.enter_context(closing(thing))
        stack.enter_context(run.stop)
        wandb_run = None
        if isinstance(log, MetricsLog) and training.wandb.entity_name is not None:
            wandb_run = WandbRun(config, run.folder / "config.json", console.line)
            log.listeners.append(wandb_run.record)
            events.listeners.append(wandb_run.event)
        status = 1
        try:
            say_start(run)
            status = _loop(run, log)
            return status
        except BaseException as error:
            if world.is_alone and isinstance(error, UserError) and run.progress.iteration and run.is_whole:
                with suppress(RunFailed):  # data that cannot be read: what was trained until here is kept
                    run.save(wait=True)
            lost = lost_contact(error)
            text = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
            text = text if lost is None else f"lost contact: {lost}"
            events.add("failed", run.progress.iteration, text, say=False)
            raise
        finally:
            run.saver.wait()  # whatever happened here, what was copied is whole
            if wandb_run is not None:
                wandb_run.finish(status)


def _open_metrics(run: Run) -> MetricsLog | NoMetrics:
    if not run.world.is_main:
        return NoMetrics()
    return MetricsLog(
        run.folder,
        resumed_at=run.progress.iteration,
        tensorboard=run.config.training.logs.tensorboard,
        complain=run.console.line,
    )


def _loop(run: Run, log: MetricsLog | NoMetrics) -> int:
    """Train, with all that happens between the steps, to the end or to where something ends it."""
    config, training, progress, console = run.config, run.config.training, run.progress, run.console
    begin_iteration = progress.iteration
    console.start_bar(training.train_iters, done=begin_iteration)
    peak = peak_flops(run.device, run.dtype)
    meter, total = IntervalMeter(), IntervalMeter()
    forecast = Forecast(run)
    run.clock.read()  # what was before belongs to no interval

    if begin_iteration or run.finished:
        # What a kill or a signal cut off after this iteration's checkpoint was written.
        done = log.evaluated if training.train_iters else ()
        _side_work(run, log, resumed=True, done=done)
    else:
        _evaluate(
            run, log, [n for n, e in training.evaluators.items() if e.at_start and n not in log.evaluated]
        )
        run.clock("other")

    begin, steps = time.perf_counter(), 0
    for result, rate, data_wait in run.steps():
        seconds, steps = time.perf_counter() - begin, steps + 1
        for sums in (meter, total):
            sums.add(seconds, data_wait, config.batch.tokens)
        run.health.check(seconds, data_wait)
        forecast.look(seconds - data_wait, peak_memory(run.device))
        console.advance(progress.iteration, result.loss)
        if run.went_back:
            with run.world.together():
                log.rewind(progress.iteration)
        else:
            if training.logs.due(progress.iteration) or (run.finished and training.logs.interval):
                record = training_record(run, result, rate, meter, peak) | forecast.record()
                log.write(record, prefix="training")
                seconds_left = total.seconds / steps * (training.train_iters - progress.iteration)
                console.line(training_line(record, training.train_iters, seconds_left))
                meter.reset()
                progress.loss_sum, progress.loss_count = 0.0, 0
            _side_work(run, log)
        if run.stop:
            break
        if training.shutdown.due(progress.iteration) and not run.finished and not run.went_back:
            if not run.saved:
                raise RunFailed(
                    f"iteration {progress.iteration}, at which training.shutdown leaves, is not saved"
                )
            say_end(
                run, "shutdown", f"shutdown after iteration {progress.iteration}, as training.shutdown says"
            )
            return 0
        begin = time.perf_counter()
    if run.stop:
        return _stopped(run)

    tested = progress.iteration == begin_iteration and "test" in log.evaluated
    if training.test_iters and not tested:
        run.clock("evaluation")
        test = run.evaluators.test(run.parallel, progress.iteration)
        run.clock("other")
        if test is None:
            return _stopped(run)
        log.write(test, prefix="test")
    if progress.iteration and not run.saved:
        raise RunFailed(
            f"the last iteration, {progress.iteration}, is not saved; see {run.folder / 'events.jsonl'}"
        )
    farewell(run)
    return 0


def _stopped(run: Run) -> int:
    """Save and leave, as a signal asked for; the exit status."""
    if run.stop.word:
        run.console.line(run.stop.word)
    if run.progress.iteration:
        run.clock("checkpoint")
        run.save(wait=True)
        text = f"stopped after iteration {run.progress.iteration}"
        text += "; the same command goes on from there" if run.saved else ", which is not saved"
    else:
        text = "stopped before the first iteration"
    say_end(run, "stopped", text, signal=run.stop.signum)
    lost = run.progress.iteration and not run.saved  # no reason to be started again
    return 1 if lost else 128 + (run.stop.signum or 0)


def _side_work(
    run: Run, log: MetricsLog | NoMetrics, *, resumed: bool = False, done: Collection[str] = ()
) -> None:
    """What is due beside training after this iteration: checkpoint, evaluators (those `done` left out), export.

    The checkpoint comes first, so that nothing that goes wrong in the others costs it.
    """
    training, iteration, clock = run.config.training, run.progress.iteration, run.clock
    leaving = run.finished or training.shutdown.due(iteration)
    if iteration and (training.checkpoint.wanted(iteration) or run.finished):
        clock("checkpoint")
        run.save(wait=leaving)
    due = {n: e.due(iteration) or (run.finished and e.interval) for n, e in training.evaluators.items()}
    _evaluate(run, log, [name for name, now in due.items() if now and name not in done])
    export_due = training.export.due(iteration) or (run.finished and training.export.interval)
    if iteration and export_due and not run.stop:
        clock("export")
        run.export(replace=not resumed)
    clock("other")


def _evaluate(run: Run, log: MetricsLog | NoMetrics, names: Sequence[str]) -> None:
    for name in names:
        run.clock("evaluation")
        entry = run.config.training.evaluators[name]
        evaluation = run.evaluators.run(name, entry, run.parallel, run.progress.iteration)
        if evaluation is not None:
            log.write(evaluation, prefix=name)
