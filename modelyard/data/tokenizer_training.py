"""Train a byte-level BPE tokenizer, so that a new project needs no download."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message
from modelyard.chat.families import FAMILIES, Llama3
from modelyard.chat.formats import read_record
from modelyard.config.prepare import PrepareConfig
from modelyard.data.sources import RecordError, Source, open_source
from modelyard.data.tokenizer import replace_surrogates
from modelyard.errors import UserError, did_you_mean
from modelyard.files import replace_text

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BYTES = 256
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where merges must not cross: the pattern that Llama 3 (and, but for its digits, GPT-4) publishes. Words take one space
or sign in front, digits go in threes, line ends stay with the signs before them."""


def train_tokenizer(
    texts: Iterable[str],
    folder: Path,
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (BOS, EOS),
) -> int:
    """Learn merges from `texts` and write a tokenizer folder that this program and transformers' AutoTokenizer load.

    Ids: the special tokens first (0 begins, 1 ends a document), then the 256 bytes, then the merges in the order they
    were learnt. The same texts in the same order give the same files.

    Args:
        texts: the training texts; read once.
        folder: the folder to make; must not hold a tokenizer.
        vocab_size: ids wanted, special tokens included.
        special_tokens: at least two; the first begins, the second ends a document.

    Returns:
        The vocabulary's size, smaller than asked when the texts have no more repeated pairs.

    Raises:
        UserError: too small a vocabulary, no text, or a tokenizer is there already.
    """
    smallest = BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is below {smallest}: {BYTES} bytes and {len(special_tokens)} special tokens"
        )
    if (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} holds a tokenizer already; it is not written over")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = Seen(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.characters:
        raise UserError("no text to train a tokenizer on")
    bos, eos = special_tokens[:2]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    _write(tokenizer, folder, bos, eos)
    return tokenizer.get_vocab_size()


class Seen:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


TAGS = ("<tool_call>", "</tool_call>")
"""Tokens that are text for people, too, as in Qwen's own tokenizer: leaving special tokens out of a text leaves them in."""


def _as_json(tokenizer: Tokenizer) -> str:
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] not in TAGS
    return json.dumps(document, ensure_ascii=False, indent=2)


def _write(tokenizer: Tokenizer, folder: Path, bos: str, eos: str) -> None:
    named = {"bos_token": bos, "eos_token": eos}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
    }
    # A folder with a tokenizer.json is a whole tokenizer: it comes last.
    texts = {
        "special_tokens_map.json": json.dumps(named, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "tokenizer.json": _as_json(tokenizer),
    }
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    absent = [folder / name for name in texts if not (folder / name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, text in texts.items():
            replace_text(folder / name, text)
    except BaseException:  # a full disk, Ctrl-C: what is not whole is not there
        for path in absent:
            path.unlink(missing_ok=True)
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


def source_texts(source: Source) -> Iterator[str]:
    """Every text of a source, in order, read in this process.

    Raises:
        UserError: a record cannot be used.
    """
    file, before = -1, 0
    for chunk in source.chunks():
        if chunk.file != file:
            file, before = chunk.file, 0
        try:
            records = source.read(chunk)
        except RecordError as error:
            raise UserError(
                f"{source.place(chunk)}: record {before + error.index + 1}: {error.reason}"
            ) from None
        before += len(records)
        for index, record in enumerate(records):
            if record is None:
                continue
            try:
                texts = [record.text] if record.conversation is None else _said(record.conversation)
            except ConversationError as error:
                number = before - len(records) + index + 1
                raise UserError(f"{source.place(chunk)}: record {number}: {error}") from None
            yield from (replace_surrogates(text) for text in texts if text)


def _said(record: dict[str, Any]) -> list[str]:
    """The texts of a conversation's messages."""
    conversation = read_record(record)
    return [message.content for message in conversation.messages if isinstance(message.content, str)]


def chat_tokens(name: str) -> tuple[str, ...]:
    """The special tokens that a chat format is made of, begin and end of a text left out. Raises UserError for no such format."""
    if name not in FAMILIES:
        raise UserError(
            f"there is no chat format '{name}'; there are {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}"
        )
    family = FAMILIES[name]
    families = [family, replace(family, builtin_tools=("f",))] if isinstance(family, Llama3) else [family]
    asked, call = Message("user", "?"), Call("f", {})
    talks = [
        Conversation((asked, Message("assistant", "!"))),
        Conversation((asked, Message("assistant", calls=(call,)), Message("assistant", calls=(call, call)))),
    ]
    found: dict[str, None] = {}
    for each in families:
        for talk in talks:
            with suppress(ConversationError):  # a format without tools
                found |= {segment.text: None for segment in each.render(talk) if segment.special}
    return tuple(token for token in found if token not in (BOS, EOS))


def run_tokenizer_train(
    config: PrepareConfig, *, vocab_size: int, output: Path | None = None, chat: str | None = None
) -> int:
    """`modelyard tokenizer train`: learn a tokenizer from the texts of a preparation config.

    Args:
        config: its `dataset` says what to read; the rest is not used, but for the default of `output`.
        vocab_size: ids wanted, special tokens included.
        output: the folder to make; default: the config's `tokenizer.path`.
        chat: a chat format, whose special tokens the vocabulary is to have.
    """
    specials = (BOS, EOS, *(chat_tokens(chat) if chat is not None else ()))
    # Counting words is the library's own parallel work; the setting may come from an earlier preparation.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder = output or Path(config.tokenizer.path).expanduser()
    notices: list[str] = []
    source = open_source(config.dataset, notices)
    for notice in notices:
        print(f"note: {notice}")
    size = train_tokenizer(source_texts(source), folder, vocab_size=vocab_size, special_tokens=specials)
    if size < vocab_size:
        print(f"note: the texts gave {size:,} tokens, not {vocab_size:,}: there is too little text")
    print(f"tokenizer with {size:,} tokens: {folder}")
    return 0
