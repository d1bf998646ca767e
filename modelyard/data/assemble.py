"""The work of `prepare` once it is known what is to be done: tokenise, and write the stores.

A source is divided into parts (`parts.py`), which the ranks of a preparation make by turns. Rank 0 writes the stores. What
it tokenises itself when that is next goes straight there; so it is with everything where there is one process alone. Other
parts go into files, which rank 0 reads when their turn has come. It makes what nobody else will, so that the stores become
complete whoever is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass

from modelyard.data import stores as stores_module
from modelyard.data.documents import Job, Tokenized, tokenize_chunk
from modelyard.data.parts import Begun, Damaged, Division, Part, PartFolder, PartWriter, part_chunks
from modelyard.data.progress import Amount, Progress
from modelyard.data.ranks import BEAT_SECONDS, Rank, Team
from modelyard.data.sources import Chunk
from modelyard.data.stores import Stores
from modelyard.data.workers import Stopped, ordered_map
from modelyard.errors import UserError

POLL_SECONDS = 0.5
"""How often rank 0 looks for a part that it waits for."""
WAIT_LINE_SECONDS = 30.0
"""How often it says that it waits."""

Item = tuple[int, Chunk | None]


@dataclass
class Work:
    """What is to be done, and by how many worker processes of this one."""

    job: Job
    division: Division
    workers: int
    report: Callable[[str], None]
    terminal: bool | None
    team: Team | None

    def results(self, parts: dict[int, int]) -> Generator[tuple[Item, Tokenized | None], None, None]:
        """The tokenised chunks of `parts`, as `part_chunks` has them."""
        if not (self.job.spans or self.job.parse_special):
            _ = self.job.tokenizer.pieces  # Made here, so that the workers share it.
        items = part_chunks(self.job.source, self.division, parts)
        return ordered_map(_tokenize, self.job, items, self.workers)

    def refuse(self, chunk: Chunk, result: Tokenized, before: int | None = None) -> None:
        """Raise UserError for a chunk with a record that cannot be used.

        `before` are the records of the same file before it, which are counted where this process has not met them.
        """
        if result.problem is not None:
            index, reason = result.problem
            before = _records_before(self.job, chunk) if before is None else before
            raise UserError(f"{self.job.source.place(chunk)}: record {before + index + 1}: {reason}")


class PartMaker:
    """Writes tokenised chunks into files of parts."""

    def __init__(self, work: Work, parts: PartFolder, begun: dict[int, Begun]):
        self._work = work
        self._parts = parts
        self._begun = begun
        self._writer: PartWriter | None = None
        self._synced = time.monotonic()

    def take(self, part: int, chunk: Chunk | None, result: Tokenized | None) -> None:
        """The next chunk of a part; after the last one, none: then the part is complete."""
        if self._writer is None:
            self._writer = self._parts.writer(part, self._begun.get(part))
        if chunk is None or result is None:
            self._writer.finish()
            self._writer = None
            return
        self._work.refuse(chunk, result)
        self._writer.add(chunk, result)
        if time.monotonic() - self._synced >= stores_module.SAVE_SECONDS:
            self._writer.sync()
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def make_parts(work: Work, team: Team, first: int) -> Amount:
    """What a rank other than 0 does: its parts from number `first` on, those that are not there yet.

    Returns the weight, documents and tokens of all of its parts that are there at the end.
    """
    own = [part for part in range(first, work.division.count) if team.rank.owns(part)]
    there = team.parts.complete()
    begun = team.parts.begun({part for part in own if part not in there})
    made = [team.parts.made(part) for part in own if part in there]
    before = _sum(*(part for part in made if part is not None), *begun.values())
    if before[0]:
        work.report(
            f"going on where an earlier start was stopped: {before[1]:,} documents, {before[2]:,} tokens are there already"
        )
    todo = {part: begun[part].frames if part in begun else 0 for part in own if part not in there}
    total = sum(min(work.division.size, work.division.total - part * work.division.size) for part in own)
    maker = PartMaker(work, team.parts, begun)
    bar = Progress(total, work.report, False, before, interval=team.rank.world_size)
    with bar, closing(maker), closing(work.results(todo)) as results:
        for (part, chunk), result in results:
            maker.take(part, chunk, result)
            if chunk is not None and result is not None:
                bar.update(chunk.weight, len(result.lengths), len(result.tokens))
            team.attendance.beat()
    return bar.done, bar.documents, bar.tokens


class Assembly:
    """What rank 0 does, or the one process: the stores from where they are to the end of the source."""

    def __init__(self, work: Work, stores: Stores):
        self._work = work
        self._stores = stores
        self._team = work.team
        self._rank = work.team.rank if work.team is not None else Rank()
        self._looked = 0.0
        self._cleared = stores.part  # parts before this one are in the stores for good, and their files gone
        self._given_up: dict[int, str] = {}  # parts that others do not make, and why
        self._counted: set[int] = set()  # parts of others that are no news for the progress display
        self._elsewhere: dict[int, Amount] = {}
        self._begun: dict[int, Begun] = {}
        self.before: Amount = stores.amount
        """What was made when `run` began, by whomever."""

    def run(self) -> None:
        """Make and store everything."""
        count = self._work.division.count
        if self._team is not None and self._stores.part in self._team.parts.complete():
            with self._bar("merge", self._stores.amount) as bar:
                self._drain(bar)
        todo = self._todo()
        self.before = self._there()
        with self._bar("prepare", self.before) as bar:
            self._make(todo, bar)
        if self._stores.part < count:
            with self._bar("merge", self._stores.amount) as bar:
                self._finish(bar)

    def _bar(self, word: str, before: Amount) -> Progress:
        # A bar that is drawn has no place between the lines of others.
        terminal = self._work.terminal if self._rank.alone else False
        elsewhere = self._made_elsewhere if word == "prepare" and not self._rank.alone else None
        total = self._work.division.total
        return Progress(total, self._work.report, terminal, before, word=word, elsewhere=elsewhere)

    def _todo(self) -> dict[int, int]:
        """Own parts that are not there, and how many chunks of each are."""
        stores, count = self._stores, self._work.division.count
        own = {part for part in range(stores.part, count) if self._rank.owns(part)}
        if self._team is not None:
            own -= self._team.parts.complete()
            self._begun = self._team.parts.begun(own)
        todo = {part: self._begun[part].frames if part in self._begun else 0 for part in own}
        if stores.part in todo and stores.part not in self._begun:
            todo[stores.part] = stores.chunk
        return todo

    def _there(self) -> Amount:
        """What has been made so far, in the stores or not."""
        there: list[Amount | Part | Begun] = [self._stores.amount, *self._begun.values()]
        if self._team is not None:
            for part in self._team.parts.complete():
                if part >= self._stores.part and (made := self._team.parts.made(part)) is not None:
                    self._counted.add(part)
                    there.append(made)
        return _sum(*there)

    def _made_elsewhere(self) -> Amount:
        if self._team is not None:
            for part in self._team.parts.complete():
                if part in self._counted or part in self._elsewhere or self._rank.owns(part):
                    continue
                if (made := self._team.parts.made(part)) is not None:
                    self._elsewhere[part] = _sum(made)
        return _sum(*self._elsewhere.values())

    def _make(self, todo: dict[int, int], bar: Progress) -> None:
        """Tokenise parts: into the stores while they are next there, otherwise into files."""
        maker = PartMaker(self._work, self._team.parts, self._begun) if self._team is not None else None
        stores = self._stores
        with (
            closing(maker) if maker is not None else nullcontext(),
            closing(self._work.results(todo)) as results,
        ):
            for (part, chunk), result in results:
                if part == stores.part and part not in self._begun:
                    if chunk is None or result is None:
                        stores.next_part()
                    else:
                        self._work.refuse(chunk, result, stores.records_before(chunk.file))
                        stores.add(chunk.file, chunk.weight, result)
                elif maker is not None:
                    maker.take(part, chunk, result)
                if chunk is None:
                    self._drain(bar)
                elif result is not None:
                    bar.update(chunk.weight, len(result.lengths), len(result.tokens))
                self._look()

    def _finish(self, bar: Progress) -> None:
        """Store what others make, as it comes, and make what they do not."""
        said = -WAIT_LINE_SECONDS
        while self._stores.part < self._work.division.count:
            self._drain(bar)
            part = self._stores.part
            if part == self._work.division.count:
                return
            if (why := self._nobody_makes(part)) is not None:
                self._work.report(f"note: {why}; part {part + 1} is made here")
                self._begun.pop(part, None)
                self._make({part: self._stores.chunk}, bar)
            elif time.monotonic() - said >= WAIT_LINE_SECONDS:
                said = time.monotonic()
                self._work.report(self._waiting())
            else:
                time.sleep(POLL_SECONDS)
            self._look()

    def _nobody_makes(self, part: int) -> str | None:
        if part in self._given_up:
            return self._given_up[part]
        if self._rank.owns(part) or self._team is None:
            return f"part {part + 1} is missing"
        return self._team.attendance.gone(part % self._rank.world_size, self._team.timeout)

    def _waiting(self) -> str:
        count, there = (
            self._work.division.count,
            self._team.parts.complete() if self._team is not None else set(),
        )
        missing = [part for part in range(self._stores.part, count) if part not in there]
        ranks = sorted({part % self._rank.world_size for part in missing})
        names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        word = "rank" if len(ranks) == 1 else "ranks"
        return f"waiting for {word} {names}: {len(missing)} of {count} parts are missing"

    def _drain(self, bar: Progress) -> None:
        """Store all parts that are there and next."""
        if self._team is None:
            return
        parts, stores = self._team.parts, self._stores
        while stores.part < self._work.division.count and (made := parts.made(stores.part)) is not None:
            try:
                for frame in parts.frames(made, stores.chunk):
                    stores.add(frame.file, frame.weight, frame.result)
                    if bar.word == "merge":
                        bar.update(frame.weight, len(frame.result.lengths), len(frame.result.tokens))
                    else:
                        bar.update(0, 0, 0)
                    self._look()
            except Damaged as damage:
                self._given_up[stores.part] = str(damage)
                parts.discard(stores.part)
                break
            if stores.part not in self._counted and not self._rank.owns(stores.part):
                self._elsewhere[stores.part] = _sum(made)
            stores.next_part()
            while self._cleared < stores.saved_part:
                parts.discard(self._cleared)
                self._cleared += 1

    def _look(self) -> None:
        """Every few seconds: give a sign of life, and see whether another rank has failed."""
        if self._team is None or time.monotonic() - self._looked < BEAT_SECONDS:
            return
        self._team.attendance.beat()
        if (problem := self._team.attendance.failed()) is not None:
            raise Stopped(problem)
        self._looked = time.monotonic()


def _tokenize(job: Job, item: Item) -> Tokenized | None:
    """A chunk of a part; nothing for the end of one. Runs in a worker process."""
    chunk = item[1]
    return None if chunk is None else tokenize_chunk(job, chunk)


def _records_before(job: Job, chunk: Chunk) -> int:
    """Records of the same file before a chunk."""
    count = 0
    for other in job.source.chunks(lambda first, last: first <= chunk.position <= last):
        if (other.file, other.group, other.begin) == (chunk.file, chunk.group, chunk.begin):
            break
        if other.file == chunk.file:
            count += job.source.count(other)
    return count


def _sum(*amounts: Amount | Part | Begun) -> Amount:
    rows = [a if isinstance(a, tuple) else (a.weight, a.documents, a.tokens) for a in amounts]
    return sum(row[0] for row in rows), sum(row[1] for row in rows), sum(row[2] for row in rows)
