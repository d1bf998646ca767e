"""The preparation config: which texts become which token store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modelyard.config.base import Section

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

REFUSED_DATASET_KEYS = {
    "chosen_text": "preference pairs are not supported yet",
    "rejected_text": "preference pairs are not supported yet",
    "chosen_span": "preference pairs are not supported yet",
    "rejected_span": "preference pairs are not supported yet",
    "load_from_disk": "leave it out: a save_to_disk folder is recognised by its files",
}
"""Keys of the same schema elsewhere that this program does not have, and why."""

REFUSED_SCHEMA_KEYS = REFUSED_DATASET_KEYS | {
    "messages": "write dataset.conversations: {columns: {messages: NAME}}",
    "train_on_eos": "with dataset.conversations the end of every answer is trained on",
    "images": "images are not supported",
    "image_positions": "images are not supported",
}


def _refuse(document: Any, keys: dict[str, str]) -> Any:
    if isinstance(document, dict):
        found = [f"'{key}' cannot be used: {keys[key]}" for key in document if key in keys]
        if found:
            raise ValueError("; ".join(found))
    return document


class SourceSchema(Section):
    """Which columns hold what: the later spelling of `field` and `loss_masking_spans`."""

    type: Literal["text_column", "document"] = "text_column"
    """`text_column` (columns named by `input_column`, `loss_masking_spans_column`) or `document` (by `text`,
    `loss_masking_spans`). Default text_column."""
    input_column: str | None = None
    """With `text_column`: name of the text column. Default "text"."""
    loss_masking_spans_column: str | None = None
    """With `text_column`: name of the spans column. Default none."""
    text: str | None = None
    """With `document`: name of the text column. Default "text"."""
    loss_masking_spans: str | None = None
    """With `document`: name of the spans column. Default none."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, document: Any) -> Any:
        if isinstance(document, dict) and document.get("type") == "conversation":
            raise ValueError("type 'conversation' cannot be used: write dataset.conversations")
        return _refuse(document, REFUSED_SCHEMA_KEYS)

    @model_validator(mode="after")
    def _one_spelling(self) -> SourceSchema:
        foreign = {
            "text_column": [name for name in ("text", "loss_masking_spans") if getattr(self, name)],
            "document": [
                name for name in ("input_column", "loss_masking_spans_column") if getattr(self, name)
            ],
        }[self.type]
        if foreign:
            raise ValueError(f"type '{self.type}' has no {' and no '.join(foreign)}")
        return self


ConversationColumn = Literal[
    "messages", "tools", "conversations", "conversation", "system",
    "instruction", "input", "output", "response", "prompt", "completion", "question", "answer",
]  # fmt: skip
"""Columns by which `modelyard.chat.formats` knows a record's format, and what else it reads."""


class ConversationsConfig(Section):
    """Records are conversations: they are written in a chat format, and every token knows what it is."""

    format: str = "auto"
    """How the records are: messages (OpenAI's), sharegpt, alpaca, pair (prompt and completion), or one of the tool-call
    sets of docs/tool-data.md; auto: by their columns. Default auto."""
    columns: dict[ConversationColumn, str] = Field(default_factory=dict)
    """Columns that have other names in the data: the format's name → the data's (`messages: chat`). Default none."""
    family: Literal["auto", "llama3", "qwen2.5", "chatml", "vicuna", "template"] = "auto"
    """The chat format to write: `template` is the tokenizer's own chat template; `auto` the family that writes the same as
    that template does, else the template itself. Default auto."""
    system: str | None = None
    """Said in conversations that have no system message. Default none: what the format says then (Qwen 2.5 and Vicuna have
    a sentence of their own)."""
    date: str | None = None
    """With llama3: `Today Date` of the system turn, as text; with template: today, as YYYY-MM-DD. Never the clock's, so that the
    data does not change with the day. Default `26 Jul 2024`, the template's own."""
    knowledge_date: str | None = None
    """With llama3: `Cutting Knowledge Date`. Default `December 2023`, the template's own."""
    tools_in_user_message: bool = True
    """With llama3: tools are told in the first user turn; `no`: in the system turn. Default yes, as its template has it."""
    builtin_tools: list[str] | None = None
    """With llama3: tools that the model knows by name (brave_search, wolfram_alpha, code_interpreter). Default none."""
    nested: Literal["turns", "expression"] = "turns"
    """Of tool-call sets with calls inside calls: each call and its result a turn of its own, or one expression, `f(g(x))`.
    Default turns."""
    definitions: Path | None = None
    """Of tool-call sets that keep the tools' definitions in a file (or folder) of their own: that file. Default none."""
    text_beside_calls: Literal["keep", "drop"] = "keep"
    """What the assistant says in a message that calls tools; Llama 3.1's format has no place for it, and refuses such a
    message unless it is dropped. Default keep."""
    unusable: Literal["error", "drop"] = "error"
    """What a record does that cannot be used (a broken one, one without anything to train on, one that the chat format cannot
    hold): stop with its name, or be left out and counted. Default error."""

    @model_validator(mode="after")
    def _of_the_family(self) -> ConversationsConfig:
        given = self.model_fields_set
        llama = given & {"knowledge_date", "tools_in_user_message", "builtin_tools"}
        if self.family not in ("auto", "llama3") and llama:
            raise ValueError(f"{' and '.join(sorted(llama))}: only with family llama3, not {self.family}")
        if self.date is not None and self.family not in ("auto", "llama3", "template"):
            raise ValueError(f"date: the format {self.family} has none")
        return self


class PrepareDatasetConfig(Section):
    """The texts."""

    path: str
    """A local file, a local folder, or the name of a dataset on the Hugging Face Hub. What exists locally is local; a
    missing path is never taken for a Hub name."""
    config_name: str | None = None
    """Hub datasets: which of the dataset's configurations. Default none."""
    data_directory: str | None = None
    """Only this sub-folder of `path`. Default none."""
    data_files: str | list[str] | None = None
    """Only these files of `path`: names or glob patterns relative to it. Default all."""
    split: str = "train"
    """Which split of the source. Local folders: by the files' names (`train-00000.parquet`), all files when none is
    named for a split; Hub datasets take slices too (`train[:10%]`). Default train."""
    field: str = "text"
    """Column that holds the text. Default text."""
    loss_masking_spans: str | None = None
    """Column with the character ranges that are never targets: `[[first, last], …]`, both inclusive, in characters.
    Default none."""
    source_schema: SourceSchema | None = None
    """The later spelling of `field` and `loss_masking_spans`. Default none."""
    conversations: ConversationsConfig | None = None
    """The records are conversations, not texts. Default none."""
    columns: list[str] | None = None
    """Other columns kept beside the tokens, as text in each store's `columns.parquet`. Default none; for folders of
    source files `path` and `license`."""
    special_tokens: Literal["auto", "text", "parse"] = "auto"
    """What the text `<|end_of_text|>` and its like become: `text` tokenises the characters, `parse` makes them the
    token, `auto` parses when `loss_masking_spans` is given (such texts are rendered chats). Default auto."""
    extensions: list[str] | None = None
    """For a folder of source files, each file one document: the name endings to take (`.py`). Default none: the
    folder holds data files (.jsonl, .parquet, .arrow, .txt)."""
    exclude: list[str] = Field(default_factory=list)
    """For a folder: names of files and sub-folders to leave out, or paths relative to it; both may be glob patterns.
    Default none."""
    min_file_bytes: int = Field(default=1, ge=0)
    """With `extensions`: shorter files are left out, in bytes. Default 1."""
    max_file_bytes: int = Field(default=1_000_000, ge=1)
    """With `extensions`: longer files are left out (generated, or data), in bytes. Default 1,000,000."""
    sample_by: Literal["document", "line", "paragraph"] = "document"
    """.txt files: a document is the whole file, a line, or a stretch between empty lines. Default document."""
    data_type: Literal["uint8", "uint16", "uint32"] | None = None
    """Width of the stored tokens. Default: the narrowest that holds the vocabulary."""
    trust_remote_code: bool = False
    """Accepted from older configs, without effect: current `datasets` runs no dataset scripts. Default false."""
    disable_disk_space_check: bool = False
    """Start although the disk seems too small for the result. Default false."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, document: Any) -> Any:
        return _refuse(document, REFUSED_DATASET_KEYS)

    @field_validator("path", "field", "split")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("must not be empty")
        return value

    @field_validator("extensions")
    @classmethod
    def _dotted(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            raise ValueError("name at least one extension, or leave it out")
        return value and [name if name.startswith(".") else f".{name}" for name in value]

    @model_validator(mode="after")
    def _consistent(self) -> PrepareDatasetConfig:
        given = self.model_fields_set
        if self.source_schema and (clash := given & {"field", "loss_masking_spans"}):
            raise ValueError(f"give source_schema or {' and '.join(sorted(clash))}, not both")
        if self.extensions is None and (lost := given & {"min_file_bytes", "max_file_bytes"}):
            raise ValueError(
                f"{' and '.join(sorted(lost))}: only with `extensions` (a folder of source files)"
            )
        if self.min_file_bytes > self.max_file_bytes:
            raise ValueError(
                f"min_file_bytes {self.min_file_bytes} is above max_file_bytes {self.max_file_bytes}"
            )
        if self.conversations is not None:
            texts = {
                "field",
                "loss_masking_spans",
                "source_schema",
                "special_tokens",
                "extensions",
                "sample_by",
            }
            if not_for_them := sorted(given & texts):
                raise ValueError(f"{' and '.join(not_for_them)}: for texts; the records are conversations")
        if self.extensions is not None and self.spans_column:
            raise ValueError("loss_masking_spans: source files (`extensions`) have no spans")
        return self

    @property
    def text_column(self) -> str:
        """Name of the text column, in whichever spelling it was given."""
        if self.source_schema is None:
            return self.field
        return self.source_schema.input_column or self.source_schema.text or "text"

    @property
    def spans_column(self) -> str | None:
        """Name of the spans column, in whichever spelling it was given."""
        if self.source_schema is None:
            return self.loss_masking_spans
        return self.source_schema.loss_masking_spans_column or self.source_schema.loss_masking_spans

    @property
    def parse_special_tokens(self) -> bool:
        """Whether special-token strings in the text become those tokens."""
        return self.special_tokens == "parse" or (
            self.special_tokens == "auto" and self.spans_column is not None
        )


class PrepareTokenizerConfig(Section):
    """The tokenizer, and what begins and ends a document."""

    path: str
    """A tokenizer folder (tokenizer.json, or a SentencePiece tokenizer.model), or the name of one on the Hub."""
    bos_token: str | None = None
    """The token that begins a document. Default: the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends a document. Default: the tokenizer's own; an Instruct tokenizer's own is its end of turn,
    so name the end of text for plain documents."""
    add_bos: bool | Literal["auto"] = "auto"
    """One begin token in front of each document: `auto` if the tokenizer has one, true must have one, false none. A
    text that begins with it gets no second. Default auto."""
    add_eos: bool | Literal["auto"] = "auto"
    """One end token after each document, as `add_bos`. Default auto."""

    @model_validator(mode="after")
    def _consistent(self) -> PrepareTokenizerConfig:
        for add, token in (("add_bos", "bos_token"), ("add_eos", "eos_token")):
            if getattr(self, add) is False and getattr(self, token) is not None:
                raise ValueError(f"{token} is given but {add} is false")
        return self


class DistributedPrepareConfig(Section):
    """Preparation in several processes, on one machine or more. What torchrun says in the environment needs no key."""

    world_size: int | None = Field(default=None, ge=1)
    """Processes that prepare together; each is to be given the same number. Default: WORLD_SIZE in the environment,
    else 1."""
    rank: int | None = Field(default=None, ge=0)
    """This process's number among them, from 0. Default: RANK in the environment, else 0."""
    timeout: float = Field(default=600.0, gt=0)
    """How long rank 0 waits for a process that gives no sign of life, before it does that one's share itself, in seconds.
    Default 600."""
    backend: Literal["gloo", "nccl"] = "gloo"
    """Accepted from older configs, without effect: the processes meet in files beside `output_path`. Default gloo."""

    @model_validator(mode="after")
    def _rank_of_world(self) -> DistributedPrepareConfig:
        if self.world_size is not None and (self.rank or 0) >= self.world_size:
            raise ValueError(f"rank {self.rank} of world_size {self.world_size}: ranks are numbered from 0")
        if self.world_size is None and self.rank is not None:
            raise ValueError(f"rank {self.rank} without a world_size")
        return self


class PrepareConfig(Section):
    """What `modelyard prepare` is given."""

    output_path: Path
    """Folder to make: one token store per split and a dataset file for each."""

    @field_validator("output_path")
    @classmethod
    def _one_name(cls, path: Path) -> Path:
        return path.resolve() if ".." in path.parts else path  # as RunConfig does

    dataset: PrepareDatasetConfig
    """The texts."""
    tokenizer: PrepareTokenizerConfig
    """The tokenizer, and what begins and ends a document."""

    @model_validator(mode="after")
    def _ends_of_conversations(self) -> PrepareConfig:
        if self.dataset.conversations is not None and (ends := self.tokenizer.model_fields_set - {"path"}):
            raise ValueError(
                f"tokenizer.{min(ends)}: the chat format says what begins and ends a conversation; leave it out"
            )
        return self

    splits: dict[str, float] = Field(default_factory=dict)
    """Name → share of the documents; normalised to a sum of one. Each document is in exactly one, chosen by a keyed
    hash of its number. Default: one store, not split."""
    seed: int = Field(default=784569, ge=0)
    """Key of the hash that deals documents to splits. No unit; default 784569."""
    loading_workers: int | None = Field(default=None, ge=1)
    """Processes that read. Reading and tokenising happen in one process, so the larger of this and `tokenize_workers`
    counts; at most one per core. The result does not depend on it. Default: one per core."""
    tokenize_workers: int | None = Field(default=None, ge=1)
    """Processes that tokenise; see `loading_workers`. Default: one per core."""
    saving_workers: int | None = Field(default=None, ge=1)
    """Threads that sync and checksum full shards while the next ones are written. Default: one per core."""
    tokens_per_shard: int = Field(default=1_000_000_000, ge=1)
    """A shard is closed before it would exceed this, in tokens. Default 1,000,000,000."""
    distributed: DistributedPrepareConfig = Field(default_factory=DistributedPrepareConfig)
    """Several processes, on one machine or more."""

    @field_validator("splits", mode="before")
    @classmethod
    def _null_is_no_split(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("splits")
    @classmethod
    def _usable_splits(cls, value: dict[str, float]) -> dict[str, float]:
        for name, share in value.items():
            if not SPLIT_NAME.fullmatch(name):
                raise ValueError(
                    f"split name '{name}' must be letters, digits, '_' and '-' (it names a folder)"
                )
            if not 0 < share < float("inf"):
                raise ValueError(f"split '{name}' needs a share above 0, not {share}")
        return value
