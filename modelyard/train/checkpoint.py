"""Checkpoints: one folder an iteration, complete or absent, whose tensors any later layout can read.

<experiment_dir>/checkpoint/<iteration>/
    .metadata, *.distcp   torch's distributed checkpoint: `model.<name>` in fp32, `optimizer.<name>.exp_avg` and
                          `optimizer.<name>.exp_avg_sq`, full logical shapes, no entry belongs to a rank
    state.json            iteration, optimizer steps, tokens, data position, seeds, versions, architecture
    config.yaml           the resolved config
    manifest.json         size and sha256 of every file
    permanent, ephemeral  an empty file of this name says that the checkpoint stays for ever, or until there is a newer one

What `modelyard average` makes is one too, without `optimizer.…`: `tokenizer/` lies in it, and state.json says what it was
made of (`train.average`).
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from modelyard.config.architecture import Architecture, architecture_from
from modelyard.errors import UserError, missing_path
from modelyard.files import (
    CHECKSUM_LIMIT,
    Facts,
    Retention,
    complete_or_absent,
    damage,
    numbered_folders,
    synced_facts,
    unfinished,
    write_json,
)
from modelyard.model.formats.source import WeightSource
from modelyard.parallel.world import World
from modelyard.train.torch_private import SafeFileSystemReader

FORMAT_VERSION = 1

# Said of every call with no_dist. Once and for all: a change of filters around a call is no matter of one thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def save_checkpoint(
    folder: Path,
    *,
    parameters: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    retention: Retention = "regular",
    world: World | None = None,
) -> None:
    """Write a checkpoint that appears at `folder` only once it is complete and durable.

    Of several processes (`world`) each gives its parts of the tensors, as DTensors, and all must call this; the folder is
    the same as one process writes, but for the number of its files. Each syncs and sums up the files that it wrote. What
    goes wrong in one is raised in all.
    """
    world = world or World()
    known: Facts = {}
    with _one_folder(folder, world, known) as temporary:
        with world.together():
            tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
            tensors |= {f"optimizer.{name}": moment for name, moment in moments.items()}
            with _plain_errors():
                writer = _Writer(str(temporary), sync_files=False)
                dcp.save(tensors, storage_writer=writer, process_group=world.group, no_dist=world.is_alone)
        with world.together():
            # The names that torch gives to what a rank writes.
            facts = synced_facts(sorted(temporary.glob(f"__{world.rank}_*.distcp")), temporary)
        for part in world.gather(facts):
            known |= part
        with world.together():
            if world.is_main:
                write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **state})
                text = yaml.safe_dump(config, sort_keys=False)
                (temporary / "config.yaml").write_text(text, encoding="utf-8")
                if retention != "regular":
                    (temporary / retention).touch()


def marked_retention(folder: Path) -> Retention:
    """How long the checkpoint stays, as was said when it was saved: intervals may have changed since."""
    marks: tuple[Retention, ...] = ("permanent", "ephemeral")
    return next((mark for mark in marks if (folder / mark).exists()), "regular")


@contextmanager
def _one_folder(folder: Path, world: World, known: Facts) -> Iterator[Path]:
    """`complete_or_absent` in the main process; the others write into what it made, and go on when it is complete."""
    with ExitStack() as stack:
        with world.together():
            temporary = unfinished(folder)
            if world.is_main:
                temporary = stack.enter_context(complete_or_absent(folder, manifest=True, known=known))
        yield temporary
        with world.together():
            stack.close()


class _Writer(dcp.FileSystemWriter):
    """`FileSystemWriter` that fails with the disk's own error, which pickling would lose on its way to other processes:
    torch.save hides a full disk behind a position that it did not expect."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except UserError:
            raise
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Around calls of torch's distributed checkpoint, which wraps whatever happens: the first error comes out as it is."""
    try:
        yield
    except CheckpointException as failure:
        for error, _ in failure.failures.values():
            raise error from None
        raise


class _OneAtATime(dcp.DefaultSavePlanner):
    """Asks the source for each tensor when it is its turn to be written; what is planned with has no values."""

    def __init__(self, source: WeightSource):
        super().__init__()
        self._source = source

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._source.load(index.fqn.removeprefix("model."))


def write_weights(folder: Path, source: WeightSource) -> None:
    """Write a source's weights as the tensors of a checkpoint, a file each; one is in memory, two while the next is made."""
    tensors = {
        f"model.{name}": torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")
        for name in source.names()
    }
    # torch's writer keeps what it has put into a file until the next file; reading ahead it would hold even more.
    writer = _Writer(str(folder), single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, planner=_OneAtATime(source), no_dist=True)


class Checkpoint:
    """A complete checkpoint folder, read tensor by tensor."""

    def __init__(self, folder: Path, *, verify: bool = True):
        """Raises UserError when the folder is not a checkpoint or is damaged; `verify` False where that was looked at."""
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"checkpoint {missing_path(folder)}")
        if verify and (problems := self.problems(folder)):
            raise UserError(*problems)
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if self.state["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder} has checkpoint format {self.state['format_version']}; this version reads {FORMAT_VERSION}"
            )
        try:
            self._reader = SafeFileSystemReader(folder)
        except (OSError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder / '.metadata'} cannot be used: {error}") from error
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }

    @staticmethod
    def problems(folder: Path) -> list[str]:
        """What is wrong with the folder's files; empty when it can be used."""
        return damage(folder, checksums=_compared(folder, "auto"), always=_SMALL)

    @property
    def iteration(self) -> int:
        return self.state["progress"]["iteration"]

    @property
    def is_average(self) -> bool:
        """Whether it holds what `modelyard average` made: weights alone."""
        return "averaged" in self.state

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))

    @property
    def architecture(self) -> Architecture:
        return architecture_from(self.state["architecture"])

    def load_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill `tensors` (`model.…`, `optimizer.…`) in place: whole ones, or one process's parts of them as DTensors.

        No process waits for another. Raises UserError on a missing or misshapen one.
        """
        problems = []
        for name, tensor in tensors.items():
            if name not in self._tensors:
                problems.append(f"{self.folder} has no tensor '{name}'")
            elif self._tensors[name].size != tensor.shape:
                there = tuple(self._tensors[name].size)
                problems.append(
                    f"{self.folder}: '{name}' has shape {there}, the config makes it {tuple(tensor.shape)}"
                )
        if problems:
            raise UserError(*problems)
        try:
            with _plain_errors():
                dcp.load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror or error}") from error
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.folder} cannot be read: {reason}; training.checkpoint.checksums=yes finds a file that is damaged, "
                "and goes on from the checkpoint before"
            ) from error

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything stored, by the names that `load_into` takes."""
        return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in self._tensors.items()}

    # What the Hugging Face writer and the generator ask of any source of weights.

    def names(self) -> list[str]:
        """Logical names of the model's parameters."""
        return [name.removeprefix("model.") for name in self._tensors if name.startswith("model.")]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[f"model.{name}"].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[f"model.{name}"].properties.dtype

    def load(self, name: str) -> torch.Tensor:
        """One parameter, full, on the CPU, in its stored dtype."""
        entry = self._tensors[f"model.{name}"]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.load_into({f"model.{name}": tensor})
        return tensor


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint that `path` names: a checkpoint folder, or the newest whole one of an experiment; None when it is
    neither. A damaged one that is passed over is named on standard error. Raises UserError where all that is there is
    damaged; files are verified once."""
    if (path / "state.json").is_file() and (path / ".metadata").is_file():
        return Checkpoint(path)
    for directory in (path / "checkpoint", path):
        if found := [
            folder for folder in numbered_folders(directory) if not (folder / "config.json").exists()
        ]:
            damaged: list[str] = []
            for folder in reversed(found):
                if not (problems := Checkpoint.problems(folder)):
                    if damaged:
                        passed_over = f"warning: checkpoint {found[-1]} is damaged ({damaged[0]})"
                        print(f"{passed_over}; {folder} is used instead", file=sys.stderr)
                    return Checkpoint(folder, verify=False)
                damaged = damaged or problems
            raise UserError(*damaged)
    return None


def newest_usable(
    directory: Path,
    *,
    checksums: bool | Literal["auto"] = "auto",
    world: World | None = None,
    latest: int | None = None,
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are whole, and what is wrong with each newer one that is not.

    Processes (`world`) look at a share of the files each, and have the same answer. None after the iteration `latest` is
    looked at.
    """
    world = world or World()
    damaged: dict[Path, str] = {}
    for folder, compared in world.tell(
        [
            (folder, _compared(folder, checksums))
            for folder in reversed(numbered_folders(directory))
            if latest is None or int(folder.name) <= latest
        ]
        if world.is_main
        else []
    ):
        found = damage(folder, checksums=compared, share=(world.rank, world.size), always=_SMALL)
        if problems := [line for lines in world.gather(found) for line in lines]:
            damaged[folder] = problems[0]
        else:
            return folder, damaged
    return None, damaged


_SMALL = ("state.json", "config.yaml", ".metadata")
"""Without these nothing can be read; they are compared with their checksums whatever the size of the rest."""


def _compared(folder: Path, checksums: bool | Literal["auto"]) -> bool:
    """Whether the folder's checksums are compared, or only sizes."""
    if checksums != "auto":
        return checksums
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= CHECKSUM_LIMIT
