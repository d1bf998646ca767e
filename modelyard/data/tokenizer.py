"""A tokenizer folder, opened for tokenising documents: the `tokenizers` library alone, transformers only as a fallback."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from modelyard.config.huggingface import pointer_problem
from modelyard.data.pieces import Pieces
from modelyard.errors import UserError, did_you_mean, missing_path
from modelyard.files import CHAT_FILE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    CHAT_FILE,
)
"""What travels with a tokenizer, when it is there; licence files go along."""
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class SpecialToken:
    """A token that stands for no text."""

    id: int
    text: str


class Tokenizer:
    """Text ↔ token ids. Adds no begin or end token by itself. Can be pickled and copied into forked processes.

    Special-token strings in a text are ordinary text unless `parse_special` is given. Added tokens that are not
    special (runs of spaces, say) are always used, as in transformers.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        folder: Path,
        bos: str | None,
        eos: str | None,
        fingerprint: str,
        converted: bool = False,
    ):
        self._converted_json = backend.to_str(pretty=True).encode() if converted else None
        # Our own begin and end tokens, no truncation, no padding, no dropout: a document is what its text says. The
        # post-processor goes because some cut white space off the offsets, which spans need.
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        self.backend = backend
        self.folder = folder
        self.fingerprint = fingerprint
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One past the largest id, added tokens included."""
        self.bos = self.special_token(bos, "bos_token") if bos else None
        self.eos = self.special_token(eos, "eos_token") if eos else None

    def special_token(self, text: str, role: str) -> SpecialToken:
        """The token that is written `text`.

        Raises:
            UserError: the vocabulary has no such token.
        """
        token_id = self.backend.token_to_id(text)
        if token_id is None:
            names = [token.content for token in self.backend.get_added_tokens_decoder().values()]
            raise UserError(
                f"{self.folder}: {role} '{text}' is not in the vocabulary{did_you_mean(text, names)}"
            )
        return SpecialToken(token_id, text)

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has a token that is written `text`."""
        return self.backend.token_to_id(text) is not None

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of one text, without begin or end token."""
        return self.encode_batch([text], parse_special=parse_special)[0].ids

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = False, offsets: bool = False
    ) -> list[Encoding]:
        """Encodings of many texts; with `offsets` each has `.offsets`, the character range of every token.

        A text with lone surrogates (which no encoding can hold) must be cleaned before: see `replace_surrogates`.
        """
        self.backend.encode_special_tokens = not parse_special
        encode = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
        return encode(list(texts), add_special_tokens=False)

    @cached_property
    def pieces(self) -> Pieces | None:
        """What makes `encode_ids` fast; None where the tokenizer works otherwise."""
        return Pieces.of(self.backend, self.encode_batch)

    def encode_ids(self, texts: Sequence[str], *, inside: bool = False) -> list[np.ndarray]:
        """Token ids of many texts, special-token strings being text: uint32 [tokens] each.

        The ids of `encode_batch`, faster where the tokenizer allows; for passes over much text. `inside`: they are stretches of
        a longer text, and get no space in front as SentencePiece puts it before a whole one.
        """
        if inside and self._prefix is not None:
            backend = self._prefix[1]
            backend.encode_special_tokens = True
            found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in found]
        if self.pieces is not None:
            return self.pieces.encode(texts)
        return [np.array(encoding.ids, np.uint32) for encoding in self.encode_batch(texts)]

    @property
    def prefix(self) -> Literal["first", "always"] | None:
        """Where this tokenizer puts a space in front: of a text, or also after each special token in it; None: nowhere."""
        return self._prefix and self._prefix[0]

    @cached_property
    def _prefix(self) -> tuple[Literal["first", "always"], Backend] | None:
        """That, and a tokenizer that is the same but for it."""
        document = json.loads(self.backend.to_str())
        found = _take_prefix(document)
        return found and (found, Backend.from_str(json.dumps(document)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("pieces", "_prefix")}

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """The text of token ids; special tokens are written out unless `skip_special`."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def files(self) -> dict[str, bytes]:
        """Name → content of the files that make this tokenizer, those that exist, to be copied along.

        One converted from SentencePiece gets its tokenizer.json too, so that the copy needs no conversion.
        """
        paths = [self.folder / name for name in TOKENIZER_FILES]
        paths += [path for pattern in LICENSE_FILES for path in sorted(self.folder.glob(pattern))]
        contents = {path.name: path.read_bytes() for path in paths if path.is_file()}
        if self._converted_json is not None:
            contents["tokenizer.json"] = self._converted_json
        return contents


def _take_prefix(document: dict[str, Any]) -> Literal["first", "always"] | None:
    """Take the rule that puts a space in front out of a tokenizer.json; what it was."""
    normalizer = document.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    if any(part.get("type") == "Prepend" for part in parts):
        kept = [part for part in parts if part.get("type") != "Prepend"]
        document["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
        return "always"
    pre_tokenizer = document.get("pre_tokenizer") or {}
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "Metaspace" and (scheme := part.get("prepend_scheme", "always")) != "never":
            part["prepend_scheme"] = "never"
            return "first" if scheme == "first" else "always"
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"] = False
            return "always"
    return None


def replace_surrogates(text: str) -> str:
    """`text` with every lone surrogate replaced by U+FFFD: as long as before, and encodable."""
    return LONE_SURROGATE.sub("\ufffd", text)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Open a tokenizer folder, or fetch one from the Hub when `path` is no local path but a name there.

    Raises:
        UserError: nothing there, no tokenizer in it, or a damaged one.
    """
    folder = _folder(str(path))
    file = folder / "tokenizer.json"
    model = folder / "tokenizer.model"
    for either in (file, model):
        if either.is_file() and (problem := pointer_problem(either)):
            raise UserError(problem)
    if file.is_file():
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise UserError(f"{file} is not a tokenizer ({first_line(error)})") from None
        fingerprint, converted = hashlib.sha256(file.read_bytes()).hexdigest(), False
    elif model.is_file():
        backend = _convert_sentencepiece(folder)
        fingerprint, converted = hashlib.sha256(model.read_bytes()).hexdigest(), True
    else:
        raise UserError(f"{folder} holds no tokenizer: neither tokenizer.json nor tokenizer.model is in it")
    tokens = _special_token_names(folder)
    return Tokenizer(
        backend,
        folder=folder,
        bos=tokens.get("bos_token"),
        eos=tokens.get("eos_token"),
        fingerprint=fingerprint,
        converted=converted,
    )


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a local path: never look it up on the Hub then."""
    first = name.split("/", 1)[0]
    return (
        name.startswith((".", "/", "~"))
        or not HUB_NAME.fullmatch(name)
        or (first != name and Path(first).exists())
        or Path(name).suffix.lower()
        in (".jsonl", ".json", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".py", ".model")
    )


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path
    if looks_like_path(name):
        raise UserError(f"tokenizer: {missing_path(path)}; `modelyard tokenizer train` makes one")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, *LICENSE_FILES]))
    except Exception as error:  # offline, no such name, no rights: each its own class, over several libraries
        raise UserError(
            f"tokenizer '{name}' is not a folder here and could not be fetched from the Hub ({first_line(error)}); "
            "`modelyard tokenizer train` makes one"
        ) from None


def _special_token_names(folder: Path) -> dict[str, str]:
    """`bos_token` and `eos_token` as the folder's files name them; tokenizer_config.json has the last word."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        document = _read_json(folder / file)
        for role in ("bos_token", "eos_token"):
            value = document.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                names[role] = value
            elif role in document and file == "tokenizer_config.json":
                names.pop(role, None)  # null there: it has none
    return names


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error})") from None
    return document if isinstance(document, dict) else {}


def _convert_sentencepiece(folder: Path) -> Backend:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise UserError(
            f"{folder} has only a SentencePiece tokenizer.model: pip install 'modelyard[sentencepiece]', or save the "
            "tokenizer as tokenizer.json"
        ) from None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True).backend_tokenizer
    except Exception as error:
        raise UserError(
            f"{folder / 'tokenizer.model'} could not be converted ({first_line(error)})"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message: other libraries' messages run over many."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


Add = bool | Literal["auto"]


@dataclass(frozen=True)
class DocumentFrame:
    """What stands around each document."""

    bos: SpecialToken | None
    eos: SpecialToken | None


def document_frame(
    tokenizer: Tokenizer, *, bos_token: str | None, eos_token: str | None, add_bos: Add, add_eos: Add
) -> DocumentFrame:
    """Decide the begin and end token of documents: named ones, else the tokenizer's own.

    Raises:
        UserError: a named token is not in the vocabulary, or one is demanded that the tokenizer does not have.
    """
    found: list[SpecialToken | None] = []
    for role, own, named, add in (
        ("bos", tokenizer.bos, bos_token, add_bos),
        ("eos", tokenizer.eos, eos_token, add_eos),
    ):
        token = tokenizer.special_token(named, f"tokenizer.{role}_token") if named else own
        if add is True and token is None:
            raise UserError(
                f"tokenizer.add_{role} is true, but {tokenizer.folder} has none: name it, {role}_token: …"
            )
        found.append(token if add is not False else None)
    return DocumentFrame(*found)


END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
END_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")


def separator_notice(tokenizer: Tokenizer, frame: DocumentFrame) -> str | None:
    """A line for the user when documents are about to end with an end-of-turn token though an end of text exists."""
    if frame.eos is None or frame.eos.text not in END_OF_TURN:
        return None
    better = next((name for name in END_OF_TEXT if tokenizer.has_token(name)), None)
    if better is None:
        return None
    return (
        f"documents end with {frame.eos.text}, this tokenizer's end of turn; for plain text set "
        f'tokenizer.eos_token: "{better}"'
    )
