"""Whether a run may begin, and from which checkpoint: what the main process judges before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelyard.config.architecture import Architecture
from modelyard.config.train import TrainConfig
from modelyard.data.stream import DataStream, ids_outside_vocabulary
from modelyard.errors import UserError
from modelyard.files import set_aside
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.data_check import damaged_data, foreign_tokenizers, stores_read
from modelyard.train.events import EventLog
from modelyard.train.experiment import another_run
from modelyard.train.resume import refuse_changes


def check_data(config: TrainConfig, streams: Sequence[DataStream], *, force: bool) -> list[str]:
    """Raise UserError where the data cannot be trained on; returns what is trained on all the same with `force`."""
    read = stores_read(streams)
    if problems := damaged_data(read) + ids_outside_vocabulary(streams):
        raise UserError(*problems)
    for stream in streams:
        stream.describe()  # says what the first block shows: that no document fits in a row
    foreign = foreign_tokenizers(config, read)
    if foreign and not force:
        raise UserError(*foreign, "with --force it is trained all the same")
    return foreign


def starting_point(
    config: TrainConfig,
    architecture: Architecture,
    data_fingerprint: str,
    *,
    usable: Path | None,
    damaged: dict[Path, str],
    events: EventLog,
    force: bool,
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the beginning), and what is gone on from because of `force`.

    `usable` is the newest that is whole; newer ones that are `damaged`, with the reasons, are set aside. Raises UserError
    where the run may not go on, or may not begin where another one was.
    """
    folder, forced = config.run.experiment_dir, list[str]()
    if damaged and usable is None and not force:
        raise UserError(
            *damaged.values(),
            f"every checkpoint in {folder / 'checkpoint'} is damaged; --force sets them aside and starts anew",
        )
    if usable is not None:
        checkpoint = Checkpoint(usable, verify=False)
        forced = refuse_changes(checkpoint, config, architecture, data_fingerprint, force=force)
    elif other := another_run(folder, config, architecture, data_fingerprint):
        if not force:
            raise UserError(f"{other}; choose another folder, or start over in this one with --force")
        forced = [other]
    set_damaged_aside(damaged, events)
    return usable, forced


def set_damaged_aside(damaged: dict[Path, str], events: EventLog) -> None:
    """Rename damaged checkpoints so that none is gone on from, and say why; nothing is deleted."""
    for path, problem in damaged.items():
        warning = f"warning: checkpoint {path} is damaged ({problem}); set aside as {set_aside(path)}"
        events.add("checkpoint_damaged", int(path.name), warning)
