"""`modelyard prepare`: texts → token stores, one per split.

Worker processes read chunks of the source and tokenise them; this process takes the results in the source's order,
deals the documents to the splits and writes. So the stores are the same bytes whatever the number of workers. All is
written in `<output>.tmp`, which gets its name when it is complete; where a run was stopped, the next one goes on. Where
several processes prepare together, each makes parts of the source (`parts.py`) and rank 0 the stores (`assemble.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, cast

import tokenizers
import yaml

from modelyard.chat.format import RENDERER, family_from, settings_of
from modelyard.chat.formats import FORMATS, Format, Reading
from modelyard.chat.template import Template
from modelyard.chat.tool_data.definitions import load_definitions
from modelyard.config.disk import size
from modelyard.config.prepare import ConversationsConfig, PrepareConfig
from modelyard.data import sources
from modelyard.data.assemble import Assembly, Work, make_parts
from modelyard.data.documents import Conversations, Job, frame_of
from modelyard.data.output import (
    Output,
    existing_record,
    explained,
    in_the_input,
    output_folder,
    stored_parts,
    unfinished,
)
from modelyard.data.parts import Division, divide, remove
from modelyard.data.progress import duration
from modelyard.data.ranks import (
    PutTogether,
    Rank,
    Team,
    cores_of_rank,
    join,
    own_rank,
    parts_folder,
    parts_root,
)
from modelyard.data.sources import Source, open_source
from modelyard.data.store import TOKEN_TYPES, token_type, write_synced
from modelyard.data.stores import Counts, Stores
from modelyard.data.tokenizer import (
    DocumentFrame,
    Tokenizer,
    document_frame,
    load_tokenizer,
    separator_notice,
)
from modelyard.errors import UserError, did_you_mean, missing_path
from modelyard.parallel.rank import wait_for_the_main_process

COMPRESSED_GROWTH = 3.5
"""Text in a byte of a compressed file, for the disk estimate."""
CHARACTERS_PER_TOKEN = 5
"""More than tokenizers reach on most text, so that the disk estimate errs on the low side."""


def prepare(
    config: PrepareConfig,
    *,
    report: Callable[[str], None] = print,
    overwrite: bool = False,
    terminal: bool | None = None,
) -> dict[str, Any]:
    """Make the token stores and dataset files of `config`.

    Args:
        config: the whole preparation config.
        report: prints one line.
        overwrite: replace an output folder that holds something else.
        terminal: draw a progress bar; default: whether standard error is a terminal.

    Returns:
        `output`, `documents`, `tokens`, `empty`, `repaired`, `unreadable`, `already_there`, and `splits`: name →
        `path`, `config` (the dataset file), `documents`, `tokens`. Of several processes all but rank 0 count their own
        share, and have no `splits`.

    Raises:
        UserError: anything the user has to change. What an interruption leaves is gone on with by the next call.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    rank = own_rank(config)
    if rank.number:
        say, report = report, lambda line: say(f"rank {rank.number}: {line}")
    try:
        started = time.monotonic()
        job, workers = _job(config, rank, report)
        record = _record(config, job)
        division = divide(job.source)
        identity = record | {"program": _program(job.source, division)}
        # Of several processes, one that comes late must not start over what the others have made with the same words.
        there = existing_record(config.output_path, record, overwrite, again=rank.alone)
        if there is None:
            if not config.dataset.disable_disk_space_check:
                _check_disk(config, job)
            folder, failed_before = parts_folder(
                config.output_path, identity, overwrite, clear=not rank.number
            )
    except UserError:
        wait_for_the_main_process()  # all have read the same
        raise
    if there is not None:
        if not rank.number:
            remove(parts_root(config.output_path))
        report(f"{config.output_path} is already there, made from the same data with the same config")
        return _summary(config, there["counts"], there["stores"], already_there=True)
    if rank.number >= division.count:
        parts = "1 part" if division.count == 1 else f"{division.count} parts"
        report(f"nothing to do: the source is of {parts}, which the ranks before this one make")
        return _share(config, 0, 0)
    team = None
    try:
        if not rank.alone or folder.exists():
            team = join(folder, identity, rank, job.dtype, config.distributed.timeout, report)
        if rank.number and existing_record(config.output_path, record, overwrite, again=False) is not None:
            remove(parts_root(config.output_path))  # rank 0 has become ready at this very moment
    except (PutTogether, FileNotFoundError):
        if not rank.number or folder.exists():
            raise
        report("nothing to do: rank 0 has put all together")
        return _share(config, 0, 0)
    work = Work(job, division, workers, report, terminal, team)
    try:
        if rank.number and team is not None:
            return _prepare_parts(config, work, team, identity, started)
        with output_folder(config.output_path, identity, overwrite=overwrite or failed_before) as output:
            _say_what_is_there(output, report)
            try:
                counts, stores, before = _prepare_stores(config, work, output, record)
            except KeyboardInterrupt:
                if output.resumable:
                    report(
                        f"what is done so far is kept in {output.folder}: run the same again and it goes on from there"
                    )
                raise
    except BaseException as error:
        if team is not None:
            team.leave(error)
        if rank.alone and in_the_input(error):
            remove(parts_root(config.output_path))
        raise
    remove(parts_root(config.output_path))
    seconds = time.monotonic() - started
    summary = _summary(config, asdict(counts), stores, already_there=False)
    for line in _summary_lines(summary, counts, counts.tokens - before, seconds):
        report(line)
    return summary


def _job(config: PrepareConfig, rank: Rank, report: Callable[[str], None]) -> tuple[Job, int]:
    """What is to be tokenised with what, and by how many worker processes of this one; says what is worth a note."""
    notices: list[str] = []
    tokenizer, frame, source, conversations = _open(config, notices)
    workers = _workers(config, rank, notices)
    job = Job(
        source,
        tokenizer,
        frame,
        spans=config.dataset.spans_column is not None,
        parse_special=config.dataset.parse_special_tokens,
        dtype=config.dataset.data_type or token_type(tokenizer.vocab_size),
        conversations=conversations,
    )
    if not rank.number:  # the others have the same to say
        for notice in notices:
            report(f"note: {notice}")
    return job, workers


def _program(source: Source, division: Division) -> dict[str, Any]:
    """What of this program decides what a part of the source is and holds."""
    own = {"chunk_bytes": sources.CHUNK_BYTES, "part": division.size, "tokenizers": tokenizers.__version__}
    return own | source.cutting()


def _prepare_stores(
    config: PrepareConfig, work: Work, output: Output, record: dict[str, Any]
) -> tuple[Counts, dict[str, dict[str, Any]], int]:
    """All that is in the output folder but its name.

    Returns the counts, each split's dataset config, and how many of the tokens earlier starts have made.
    """
    if output.record is not None:
        record = output.record
        before = record["counts"]["tokens"]
    else:
        with Stores(config, work.job, output) as stores:
            assembly = Assembly(work, stores)
            assembly.run()
            stores.check()
            stores.save()
        before = assembly.before[2]
        counts, facts = stores.counts, stores.facts()
        files = {_dataset_file(config, name): values for name, values in facts.items()}
        for file, values in files.items():
            write_synced(output.folder / file, yaml.safe_dump(values, sort_keys=False))
        record |= {"counts": asdict(counts), "stores": facts, "files": list(files)}
    output.finish(record)
    return Counts(**record["counts"]), record["stores"], before


def _prepare_parts(
    config: PrepareConfig, work: Work, team: Team, identity: dict[str, Any], started: float
) -> dict[str, Any]:
    """What another rank than 0 does; returns a summary with the documents and tokens of its own parts."""
    documents = tokens = 0
    first = stored_parts(config.output_path, identity)
    try:
        if first is not None:
            _, documents, tokens = make_parts(work, team, first)
        team.attendance.leave("done")
        speed = tokens / max(time.monotonic() - started, 1e-9)
        work.report(
            f"its share is done: {documents:,} documents, {tokens:,} tokens ({speed:,.0f} tokens/s); rank 0 puts all together"
        )
        team.wait_for_the_end()
    except (PutTogether, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and team.parts.path.exists():
            raise
        work.report("its share is not needed any more: rank 0 has put all together")
    except OSError as error:
        raise explained(error, config.output_path, True) from error
    return _share(config, documents, tokens)


def _share(config: PrepareConfig, documents: int, tokens: int) -> dict[str, Any]:
    counts = asdict(Counts(documents, tokens))
    return {"output": str(config.output_path), **counts, "splits": {}, "already_there": False}


def _say_what_is_there(output: Output, report: Callable[[str], None]) -> None:
    """A line on what an earlier start left."""
    if output.notice is not None:
        report(f"note: {output.notice}")
    there = (output.record or output.saved or {}).get("counts")
    if there is None:
        return
    how_far = f"{there['documents']:,} documents, {there['tokens']:,} tokens"
    if output.record is not None:
        report(f"an earlier start was stopped when all was written ({how_far}): only its name is missing")
    else:
        report(f"going on where an earlier start was stopped: {how_far} are there already")


def _open(
    config: PrepareConfig, notices: list[str]
) -> tuple[Tokenizer, DocumentFrame, Source, Conversations | None]:
    """The tokenizer, what stands around documents, the source, and how conversations are written; the problems of all of
    them at once."""
    problems: list[str] = []
    conversations = None
    try:
        try:
            tokenizer = load_tokenizer(config.tokenizer.path)
        except UserError as error:
            raise UserError(
                *(f"tokenizer.path: {line.removeprefix('tokenizer: ')}" for line in error.problems)
            ) from None
        if config.dataset.conversations is None:
            frame = document_frame(tokenizer, **config.tokenizer.model_dump(exclude={"path"}))
        else:
            conversations = _conversations(config.dataset.conversations, tokenizer, notices)
            frame = frame_of(conversations.family, tokenizer)
    except UserError as error:
        problems += error.problems
    try:
        source = open_source(config.dataset, notices)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    if notice := separator_notice(tokenizer, frame):
        notices.append(notice)
    return tokenizer, frame, source, conversations


def _conversations(config: ConversationsConfig, tokenizer: Tokenizer, notices: list[str]) -> Conversations:
    """How records become conversations. Raises UserError."""
    if config.format != "auto" and config.format not in FORMATS:
        hint = did_you_mean(config.format, FORMATS)
        raise UserError(
            f"dataset.conversations.format: there is no '{config.format}'; there are auto, {', '.join(FORMATS)}{hint}"
        )
    asked = config.model_fields_set & {"date", "knowledge_date", "tools_in_user_message", "builtin_tools"}
    settings = {name: getattr(config, name) for name in asked}
    try:
        family = family_from(
            {"family": config.family, "default_system": config.system, **settings}, tokenizer
        )
    except UserError as error:
        raise UserError(*(f"dataset.conversations: {line}" for line in error.problems)) from None
    if config.family == "auto":
        how = (
            "this tokenizer's own chat template"
            if isinstance(family, Template)
            else f"the format {family.name}"
        )
        notices.append(f"conversations are written in {how} (dataset.conversations.family: auto)")
    format = None if config.format == "auto" else cast(Format, config.format)
    reading = Reading(config.nested, config.definitions, config.text_beside_calls)
    if reading.definitions is not None:
        if not reading.definitions.exists():
            raise UserError(f"dataset.conversations.definitions: {missing_path(reading.definitions)}")
        load_definitions(reading.definitions)  # a file that is none is told now, not at the first record
    return Conversations(family, format, reading, config.unusable == "drop")


def run_prepare(config: PrepareConfig, *, overwrite: bool = False) -> int:
    """The verb `modelyard prepare`; returns the exit status."""
    prepare(config, report=lambda line: print(line, flush=True), overwrite=overwrite)
    return 0


def _workers(config: PrepareConfig, rank: Rank, notices: list[str]) -> int:
    cores = cores_of_rank(rank)
    asked = {
        name: value
        for name in ("loading_workers", "tokenize_workers", "saving_workers")
        if (value := getattr(config, name)) is not None
    }
    if above := {name: value for name, value in asked.items() if value > cores}:
        words = ", ".join(f"{name} {value}" for name, value in above.items())
        place = "this machine" if rank.alone else "this process's share of the machine"
        notices.append(f"{words}: {place} has {cores} cores, so {cores} are used (the result is the same)")
    processes = [value for name, value in asked.items() if name != "saving_workers"]
    return min(max(processes, default=cores), cores)


def _record(config: PrepareConfig, job: Job) -> dict[str, Any]:
    """What decides the stores' content: the config but for places and workers, the source, the tokenizer."""
    settings = config.model_dump(
        mode="json",
        exclude={
            "output_path": True,
            "loading_workers": True,
            "tokenize_workers": True,
            "saving_workers": True,
            "distributed": True,
            "dataset": {
                "path": True,
                "trust_remote_code": True,
                "disable_disk_space_check": True,
                "conversations": {"definitions"},
            },
            "tokenizer": {"path"},
        },
    )
    files = {
        name: hashlib.sha256(content).hexdigest() for name, content in sorted(job.tokenizer.files().items())
    }
    record = {"version": 1, "config": settings, "source": job.source.identity(), "tokenizer": files}
    if job.conversations is not None:
        record["renderer"] = RENDERER
        record["chat"] = settings_of(job.conversations.family)
    if job.conversations is not None and (path := job.conversations.reading.definitions) is not None:
        content = json.dumps(load_definitions(path)).encode()
        record["definitions"] = hashlib.sha256(content).hexdigest()
    return record


def _summary(
    config: PrepareConfig, counts: dict[str, int], stores: dict[str, dict[str, Any]], *, already_there: bool
) -> dict[str, Any]:
    splits = {
        name: {
            "path": str(config.output_path / name),
            "config": str(config.output_path / _dataset_file(config, name)),
            "documents": facts["num_documents"],
            "tokens": facts["num_tokens"],
        }
        for name, facts in stores.items()
    }
    return {"output": str(config.output_path), **counts, "splits": splits, "already_there": already_there}


def _summary_lines(summary: dict[str, Any], counts: Counts, tokens: int, seconds: float) -> list[str]:
    """`tokens` are those that this run made."""
    speed = tokens / max(seconds, 1e-9)
    lines = [
        f"prepared {counts.documents:,} documents, {counts.tokens:,} tokens in {duration(seconds)} ({speed:,.0f} tokens/s)"
    ]
    if counts.answers:
        lines.append(
            f"{counts.answers:,} answers are trained on, {counts.trained / counts.tokens:.1%} of the tokens; every one of them "
            "ends in a trained token that ends it"
        )
    if counts.remarks():
        lines.append("; ".join(counts.remarks()))
    for facts in summary["splits"].values():
        lines.append(f"{facts['config']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
    return lines


def _dataset_file(config: PrepareConfig, name: str) -> str:
    return f"fast_llm_config_{name}.yaml" if config.splits else "fast_llm_config.yaml"


def _check_disk(config: PrepareConfig, job: Job) -> None:
    width = TOKEN_TYPES[job.dtype].itemsize + (job.lane is not None)
    needed = _text_bytes(job.source) / CHARACTERS_PER_TOKEN * width
    place = config.output_path.absolute()
    while not place.exists():
        place = place.parent
    there = 0
    for folder in (unfinished(config.output_path), parts_root(config.output_path)):
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):  # another process may be at work there
                    there += os.stat(os.path.join(parent, name)).st_size
    free = shutil.disk_usage(place).free
    if needed > free + there:
        raise UserError(
            f"{place} has {size(free)} free, and the tokens need about {size(needed)}; "
            "dataset.disable_disk_space_check: true starts nevertheless"
        )


def _text_bytes(source: Source) -> float:
    """About how much text the source holds; 0 when that cannot be known."""
    return sum(
        file.size * (COMPRESSED_GROWTH if file.compression or file.kind == "parquet" else 1)
        for file in getattr(source, "files", [])
    )
