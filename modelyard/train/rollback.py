"""What is done about a spike: it is said, and the run goes back to a checkpoint from before it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import RunFailed
from modelyard.train.checkpoint import Checkpoint, newest_usable
from modelyard.train.spikes import batch_number, documents_of, in_words, set_newer_aside
from modelyard.train.start import set_damaged_aside

if TYPE_CHECKING:
    from modelyard.train.state import Run


def say_spike(run: Run, reason: str) -> None:
    """Say and keep that the last step was a spike, and which documents were in its batch."""
    progress, batch_size = run.progress, run.config.batch.batch_size
    batch = batch_number(progress.iteration - 1, progress.left_out)
    documents = documents_of(run.stream, batch, batch_size) if run.world.is_main else {}
    text = f"warning: iteration {progress.iteration}: {reason}; batch {batch} has documents {in_words(documents)}"
    policy = run.config.training.spikes.policy
    facts: dict[str, Any] = {"reason": reason, "policy": policy, "batch": batch, "documents": documents}
    run.events.add("spike", progress.iteration, text, **facts)


def roll_back(run: Run, reason: str) -> bool:
    """Go back to a checkpoint from before the batches that are to be left out; False where there is none.

    All processes call it alike. Raises RunFailed where the run has gone back too often.
    """
    run.land()
    run.clock("checkpoint")
    settings, before = run.config.training.spikes, dataclasses.replace(run.progress)
    spike = before.iteration
    if before.rollbacks >= settings.max_rollbacks:
        raise RunFailed(
            f"iteration {spike}: {reason}; the run has gone back {before.rollbacks} times already, as often as "
            "training.spikes.max_rollbacks allows; lower optimizer.learning_rate.base, or look at the data"
        )
    last_good = spike - settings.batches
    # From before all batches that are to be left out; where there is none, the newest there is.
    usable = _usable(run, latest=last_good) or _usable(run)
    if usable is None:
        run.console.line("there is no checkpoint to go back to: the step is skipped")
        return False
    with run.world.together():
        run.restore(Checkpoint(usable, verify=False))
    run.weights.publish()
    aside: list[Path] = []
    with run.world.together():
        if run.world.is_main:  # only now: until here they were what a start would have gone on from
            for folder in (run.folder / "checkpoint", *(run.folder / "export").glob("*")):
                aside += set_newer_aside(folder, run.progress.iteration)
    progress = run.progress
    progress.rollbacks, progress.failed_saves = before.rollbacks + 1, before.failed_saves
    begin = max(last_good, progress.iteration)
    left_out = [batch_number(iteration, before.left_out) for iteration in range(begin, spike)]
    progress.left_out = sorted({*before.left_out, *left_out})
    run.went_back = True
    text = f"going back from iteration {spike} to {usable}, and on without batches {left_out}"
    if aside:
        text += f"; set aside: {', '.join(map(str, aside))}"
    facts: dict[str, Any] = {"to": progress.iteration, "left_out": left_out}
    run.events.add("rolled_back", spike, text, **facts)
    # A run that is stopped before its next save has to know what is left out.
    run.save_again()
    return True


def _usable(run: Run, latest: int | None = None) -> Path | None:
    """The newest whole checkpoint, not after `latest`; damaged ones that are met are set aside."""
    checksums = run.config.training.checkpoint.checksums
    directory = run.folder / "checkpoint"
    usable, damaged = newest_usable(directory, checksums=checksums, world=run.world, latest=latest)
    with run.world.together():
        if run.world.is_main:
            set_damaged_aside(damaged, run.events)
    return usable
