"""`modelyard train`: the run from its first line to its last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack, closing, suppress

from modelyard.config.disk import disk_problem
from modelyard.config.loader import Loaded
from modelyard.errors import RunFailed, UserError
from modelyard.files import only_one
from modelyard.train.announce import announce, farewell, say_end, say_start
from modelyard.train.checkpoint import newest_usable
from modelyard.train.console import Console
from modelyard.train.experiment import refuse_foreign_folder, write_description
from modelyard.train.metrics import (
    IntervalMeter,
    MetricsLog,
    peak_flops,
    training_line,
    training_record,
)
from modelyard.train.state import Run
from modelyard.train.wandb_run import WandbRun, require_wandb


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
    require_wandb(config)
    folder = config.run.experiment_dir
    if not force:
        refuse_foreign_folder(folder)
    made = [place for place in (folder / ".lock", folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"run.experiment_dir: {folder} cannot be written to: {error.strerror}") from None
    with only_one(folder / ".lock", f"another process is training in {folder} at this moment"):
        for pattern in ("checkpoint/*.tmp", "export/*/*.tmp", "profile/*.tmp"):
            for unfinished in folder.glob(pattern):
                shutil.rmtree(unfinished, ignore_errors=True)  # left over by a run that was killed
        console = Console()
        try:
            run = Run(config, architecture, force=force, console=console)
        except BaseException:
            # Nothing stays behind when a run is refused.
            if folder in made:
                shutil.rmtree(folder, ignore_errors=True)
            elif made:
                made[0].unlink(missing_ok=True)
            for place in made[2:]:
                with suppress(OSError):  # another run may have begun in it
                    place.rmdir()
            raise
        console.open_log(folder / "log.txt")
        run.keep_tokenizer()
        remarks = [f"note: {line}" for line in loaded.notices] + [
            f"warning: {line}" for line in loaded.warnings
        ]
        return _train(run, remarks)


def _train(run: Run, remarks: list[str]) -> int:
    config, training, console, events = run.config, run.config.training, run.console, run.events
    events.open(run.folder / "events.jsonl")
    announce(run, remarks)
    write_description(
        run.folder,
        config,
        run.architecture,
        device=run.device,
        data_fingerprint=run.stream.fingerprint,
    )
    log = MetricsLog(
        run.folder,
        resumed_at=run.progress.iteration,
        tensorboard=training.logs.tensorboard,
        complain=console.line,
    )
    with ExitStack() as stack:
        for thing in (console, events, log):
            stack.enter_context(closing(thing))
        stack.enter_context(run.stop)
        wandb_run = None
        if training.wandb.entity_name is not None:
            wandb_run = WandbRun(config, run.folder / "config.json", console.line)
            log.listeners.append(wandb_run.record)
            events.listeners.append(wandb_run.event)
        status = 1
        try:
            say_start(run)
            status = _loop(run, log)
            return status
        except BaseException as error:
            if isinstance(error, UserError) and run.progress.iteration:
                with suppress(RunFailed):  # data that cannot be read: what was trained until here is kept
                    run.save()
            text = str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"
            events.add("failed", run.progress.iteration, text, say=False)
            raise
        finally:
            if wandb_run is not None:
                wandb_run.finish(status)


def _loop(run: Run, log: MetricsLog) -> int:
    """Train, with all that happens between the steps, to the end or to where something ends it."""
    config, training, progress, console = run.config, run.config.training, run.progress, run.console
    begin_iteration = progress.iteration
    console.start_bar(training.train_iters, done=begin_iteration)
    peak = peak_flops(run.device, run.dtype)
    meter, total = IntervalMeter(), IntervalMeter()
    run.clock.read()  # what was before belongs to no interval

    if begin_iteration or run.finished:
        # What a kill or a signal cut off after this iteration's checkpoint was written.
        done = log.evaluated if training.train_iters else ()
        _side_work(run, log, resumed=True, done=done)

    begin = time.perf_counter()
    for result, rate, data_wait in run.steps():
        seconds = time.perf_counter() - begin
        for sums in (meter, total):
            sums.add(seconds, data_wait, config.batch.tokens)
        console.advance(progress.iteration, result.loss)
        if training.logs.due(progress.iteration) or (run.finished and training.logs.interval):
            record = training_record(run, result, rate, meter, peak)
            log.write(record, prefix="training")
            pace = total.seconds / (progress.iteration - begin_iteration)
            seconds_left = pace * (training.train_iters - progress.iteration)
            console.line(training_line(record, training.train_iters, seconds_left))
            meter.reset()
            progress.loss_sum, progress.loss_count = 0.0, 0
        _side_work(run, log)
        if run.stop:
            run.clock("checkpoint")
            run.save()
            text = f"stopped after iteration {progress.iteration}"
            text += "; the same command goes on from there" if run.saved else ", which is not saved"
            say_end(run, "stopped", text, signal=run.stop.signum)
            return 128 + (run.stop.signum or 0)
        if training.shutdown.due(progress.iteration) and not run.finished:
            if not run.saved:
                raise RunFailed(
                    f"iteration {progress.iteration}, at which training.shutdown leaves, is not saved"
                )
            say_end(
                run, "shutdown", f"shutdown after iteration {progress.iteration}, as training.shutdown says"
            )
            return 0
        begin = time.perf_counter()

    tested = progress.iteration == begin_iteration and "test" in log.evaluated
    if training.test_iters and not tested:
        run.clock("evaluation")
        test = run.evaluators.test(run.model, progress.iteration)
        run.clock("other")
        if test is not None:
            log.write(test, prefix="test")
    if progress.iteration and not run.saved:
        raise RunFailed(
            f"the last iteration, {progress.iteration}, is not saved; see {run.folder / 'events.jsonl'}"
        )
    farewell(run)
    return 0


def _side_work(run: Run, log: MetricsLog, *, resumed: bool = False, done: Collection[str] = ()) -> None:
    """What is due beside training after this iteration: checkpoint, evaluators (those `done` left out), export.

    The checkpoint comes first, so that nothing that goes wrong in the others costs it.
    """
    training, iteration, clock = run.config.training, run.progress.iteration, run.clock
    if iteration and (training.checkpoint.due(iteration) or run.finished):
        clock("checkpoint")
        run.save()
    for name, entry in training.evaluators.items():
        if (entry.due(iteration) or (run.finished and entry.interval)) and name not in done:
            clock("evaluation")
            evaluation = run.evaluators.run(name, entry, run.model, iteration)
            if evaluation is not None:
                log.write(evaluation, prefix=name)
    export_due = training.export.due(iteration) or (run.finished and training.export.interval)
    if iteration and export_due and not run.stop:
        clock("export")
        run.export(replace=not resumed)
    clock("other")
