"""One chunk of a source → the tokens of its documents. What a worker process of `prepare` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from tokenizers import Encoding

from modelyard.chat.conversation import Conversation, ConversationError, Message
from modelyard.chat.families import Family
from modelyard.chat.format import chat_files
from modelyard.chat.formats import Format, Reading, read_records
from modelyard.chat.schema import call_problem
from modelyard.chat.segments import Kind, trained
from modelyard.chat.tokens import require_specials, tokenize_many, untrained_reason
from modelyard.data.lanes import KIND_LANE, MASK_LANE
from modelyard.data.sources import Chunk, Record, RecordError, Source
from modelyard.data.spans import SpanError, character_mask, token_mask
from modelyard.data.store import TOKEN_TYPES
from modelyard.data.tokenizer import DocumentFrame, Tokenizer, replace_surrogates


@dataclass(frozen=True)
class Job:
    """What a worker needs to turn a chunk into tokens."""

    source: Source
    tokenizer: Tokenizer
    frame: DocumentFrame
    spans: bool
    parse_special: bool
    dtype: str
    conversations: Conversations | None = None
    """How records become conversations; None: they are texts."""

    @property
    def lane(self) -> str | None:
        """Name of the lane beside the tokens, if there is one."""
        return KIND_LANE if self.conversations else MASK_LANE if self.spans else None

    def tokenizer_files(self) -> dict[str, bytes]:
        """What goes into a store's `tokenizer/`: with conversations also how they are written."""
        files = self.tokenizer.files()
        if self.conversations is not None:
            files |= chat_files(self.conversations.family, self.tokenizer)
        return files


@dataclass(frozen=True)
class Conversations:
    """What a worker needs to write conversations."""

    family: Family
    format: Format | None
    """Of the records; None: told by their columns."""
    reading: Reading
    """What the format leaves open."""
    drop: bool
    """Whether a record that cannot be used is left out."""


@dataclass(kw_only=True)
class Tally:
    """What came of documents and conversations, beside those that are kept; it adds up from chunk to chunk."""

    empty: int = 0
    """Documents of no text, which are left out."""
    repaired: int = 0
    """Documents with lone surrogates, which became U+FFFD."""
    unreadable: int = 0
    """Source files that are not UTF-8."""
    unusable: int = 0
    """Conversations that were left out because they cannot be used."""
    trained: int = 0
    """Tokens of conversations that are trained on."""
    answers: int = 0
    """Messages of conversations that are trained on; each ends in a trained terminator."""
    silent: int = 0
    """Of these, messages that say nothing: their end alone is trained on."""
    calls: int = 0
    """Calls of tools in conversations that define tools."""
    unfit: int = 0
    """Of these, calls that do not fit the definitions."""
    doubled: int = 0
    """Texts with spans that begin with the begin token twice."""
    ends_masked: int = 0
    """Texts with spans whose end is not trained on."""
    calls_masked: int = 0
    """Texts with spans that train on something, but not on the calls of tools in them."""


COUNTED = tuple(count.name for count in fields(Tally))


@dataclass
class Tokenized(Tally):
    """One chunk's documents. Empty documents are counted, not kept."""

    records: int
    """Records in the chunk, kept or not."""
    lengths: np.ndarray
    """Tokens of each kept document, [documents]."""
    tokens: np.ndarray
    """[sum of lengths]"""
    lane: np.ndarray | None
    """Values of the job's lane, uint8 [sum of lengths]; None where it has none."""
    columns: list[tuple[str | None, ...]]
    """Per kept document."""
    problem: tuple[int, str] | None = None
    """Number within the chunk, and reason, of the first record that cannot be used; then nothing else is filled."""


def tokenize_chunk(job: Job, chunk: Chunk) -> Tokenized:
    """Read one chunk and tokenise its documents; runs in a worker process."""
    try:
        records = job.source.read(chunk)
    except RecordError as error:
        return _failed(error.index, error.reason)
    if job.conversations is not None:
        return _tokenize_conversations(job, job.conversations, records)
    kept = [(index, record) for index, record in enumerate(records) if record is not None]
    result = Tokenized(len(records), *_nothing(job), columns=[], unreadable=len(records) - len(kept))
    texts = []
    for _, record in kept:
        text = record.text
        if not text.isascii() and (clean := replace_surrogates(text)) != text:
            text = clean
            result.repaired += 1
        texts.append(text)
    encodings: Sequence[Encoding | None] = [None] * len(texts)
    if job.spans or job.parse_special:
        encodings = job.tokenizer.encode_batch(texts, parse_special=job.parse_special, offsets=job.spans)
        all_ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
    else:
        all_ids = job.tokenizer.encode_ids(texts)
    pieces: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    lengths = []
    for (index, record), ids, encoding in zip(kept, all_ids, encodings, strict=True):
        if not len(ids):
            result.empty += 1
            continue
        before, after = missing_ends(ids, job.frame)
        if job.spans and encoding is not None:
            try:
                characters = character_mask(record.spans, len(record.text))
            except SpanError as error:
                return _failed(index, str(error))
            # The begin token shares the fate of the first character, the end token that of the last.
            mask = token_mask(characters, encoding.offsets)
            masks += [characters[:1]] * len(before) + [mask] + [characters[-1:]] * len(after)
            _look_for_pitfalls(result, job.tokenizer, ids, mask)
        pieces += [np.array(before, np.uint32), ids, np.array(after, np.uint32)]
        lengths.append(len(before) + len(ids) + len(after))
        result.columns.append(record.columns)
    if pieces:
        result.lengths = np.array(lengths, np.int64)
        result.tokens = np.concatenate(pieces, dtype=TOKEN_TYPES[job.dtype], casting="unsafe")
        result.lane = np.concatenate(masks).astype(np.uint8) if job.spans else None
    return result


def _tokenize_conversations(
    job: Job, conversations: Conversations, records: Sequence[Record | None]
) -> Tokenized:
    result = Tokenized(len(records), *_nothing(job), columns=[])
    rendered, numbers, problems = [], [], []
    for number, record in enumerate(records):
        if record is None or record.conversation is None:
            result.empty += 1  # an empty line
            continue
        try:
            found = list(read_records(record.conversation, conversations.format, conversations.reading))
        except ConversationError as error:
            found = [error]
        for conversation in found:
            try:
                if isinstance(conversation, ConversationError):
                    raise conversation
                segments = conversations.family.render(conversation)
                require_specials(segments, job.tokenizer)
                rendered.append(segments)
                numbers.append(number)
                if conversation.tools:
                    called = [call for message in conversation.messages for call in message.calls]
                    result.calls += len(called)
                    result.unfit += sum(call_problem(call, conversation.tools) is not None for call in called)
            except ConversationError as error:
                problems.append((number, str(error)))
    kept = []
    for number, tokenized in zip(numbers, tokenize_many(rendered, job.tokenizer), strict=True):
        if reason := untrained_reason(tokenized):
            problems.append((number, reason))
        else:
            kept.append((number, tokenized))
    if problems and not conversations.drop:
        return _failed(*_in_one(sorted(problems)))
    result.unusable = len(problems)
    if kept:
        result.lengths = np.array([len(tokenized.ids) for _, tokenized in kept], np.int64)
        result.tokens = np.concatenate(
            [tokenized.ids for _, tokenized in kept], dtype=TOKEN_TYPES[job.dtype], casting="unsafe"
        )
        result.lane = np.concatenate([tokenized.kinds for _, tokenized in kept])
        result.columns = [record.columns for number, _ in kept if (record := records[number]) is not None]
        in_loss = trained(result.lane)
        result.trained = int(np.count_nonzero(in_loss))
        ends = in_loss & (result.lane & 7 == Kind.TERMINATOR)
        result.answers = int(np.count_nonzero(ends))
        result.silent = int(np.count_nonzero(ends & ~np.append(False, in_loss[:-1])))
    return result


_MOST_NAMED = 5


def _in_one(problems: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """The first of the problems of a chunk, with a word on the others."""
    first, reason = problems[0]
    others = sorted({number for number, _ in problems} - {first})
    if others:
        # Records are numbered from the first of the file; here only how far on they are is known.
        named = ", ".join(f"the {number - first}." for number in others[:_MOST_NAMED])
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        reason += f"; nor can these after it: {named}{more}"
    return first, f"{reason} (dataset.conversations.unusable: drop leaves such records out)"


def _look_for_pitfalls(result: Tokenized, tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> None:
    """What scripts that write chats as texts with spans get wrong, counted."""
    bos = tokenizer.bos
    result.doubled += bool(bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos.id)
    result.ends_masked += bool(mask[-1])
    calls = np.isin(ids, [tokenizer.backend.token_to_id(name) or -1 for name in _CALL_TOKENS])
    result.calls_masked += bool((calls & (mask != 0)).any() and not mask.all())


_CALL_TOKENS = ("<|python_tag|>", "<|eom_id|>")
"""Stand in an assistant's call of a tool and nowhere else."""


def frame_of(family: Family, tokenizer: Tokenizer) -> DocumentFrame:
    """What stands around a conversation; nothing is put there, the chat format has it already."""
    first = family.render(Conversation((Message("user", "?"), Message("assistant", "!"))))[0]
    bos = tokenizer.special_token(first.text, "begin token") if first.kind == Kind.BEGIN else None
    return DocumentFrame(bos, None)


def missing_ends(ids: Sequence[int] | np.ndarray, frame: DocumentFrame) -> tuple[list[int], list[int]]:
    """The begin and end token that a document still needs, each as a list of at most one.

    One that the text brought itself is not doubled; a document of a single token is not both its begin and its end.
    """
    has_bos = frame.bos is not None and ids[0] == frame.bos.id
    begin = 1 if has_bos else 0
    has_eos = frame.eos is not None and len(ids) > begin and ids[-1] == frame.eos.id
    before = [frame.bos.id] if frame.bos and not has_bos else []
    after = [frame.eos.id] if frame.eos and not has_eos else []
    return before, after


def _nothing(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    tokens = np.zeros(0, TOKEN_TYPES[job.dtype])
    return np.zeros(0, np.int64), tokens, np.zeros(0, np.uint8) if job.lane else None


def _failed(index: int, reason: str) -> Tokenized:
    empty = np.zeros(0, np.int64)
    return Tokenized(0, empty, empty, None, [], problem=(index, reason))
