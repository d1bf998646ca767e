"""What is looked at in the data before the first step: bytes that changed on the disk, and whose tokens they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelyard.config.pretrained import model_tokenizer
from modelyard.config.train import TrainConfig
from modelyard.data.datasets import stores, two_chat_formats
from modelyard.data.store import TokenStore
from modelyard.data.stream import DataStream
from modelyard.data.tokenizer_difference import tokenizer_difference
from modelyard.files import CHECKSUM_LIMIT


def stores_read(streams: Sequence[DataStream]) -> list[TokenStore]:
    """Every token store below `streams`, once."""
    found = {
        store.path: store for stream in streams for dataset in stream.datasets for store in stores(dataset)
    }
    return list(found.values())


def damaged_data(read: Sequence[TokenStore]) -> list[str]:
    """One line for each file that is not what `prepare` wrote.

    Stores of up to `CHECKSUM_LIMIT` bytes in all are read whole; `modelyard inspect STORE --verify` does it for any.
    """
    size = sum(facts["bytes"] for store in read for facts in store.manifest["files"].values())
    if size > CHECKSUM_LIMIT:
        return []
    return [f"{problem}; prepare the data again" for store in read for problem in store.damaged_files()]


def foreign_tokenizers(config: TrainConfig, read: Sequence[TokenStore]) -> list[str]:
    """One line for each tokenizer, or chat format, that is not the one that the data was made with."""
    made_with = [store.path / "tokenizer" for store in read if (store.path / "tokenizer").is_dir()]
    if not made_with:
        return []
    first, *others = made_with
    chats = two_chat_formats(read)
    problems = [f"data.datasets: {chats}"] if chats else []
    problems += [
        f"data.datasets: {other.parent} was prepared with another tokenizer than {first.parent} ({reason}); prepare one "
        "of them again"
        for other in others
        if (reason := tokenizer_difference(first, other))
    ]
    if config.data.tokenizer.path is not None:
        named = Path(config.data.tokenizer.path).expanduser()
        if reason := tokenizer_difference(first, named):
            problems.append(
                f"data.tokenizer.path: {named} is another tokenizer than the one that {first.parent} was prepared with "
                f"({reason}); leave it out, or prepare the data again with it"
            )
    if config.pretrained is not None and config.pretrained.model_weights:
        model = Path(config.pretrained.path).expanduser()
        theirs = model_tokenizer(model)
        if reason := tokenizer_difference(first, theirs):
            problems.append(
                f"pretrained.path: the model in {model} has another tokenizer than the one that {first.parent} was "
                f"prepared with ({reason}); prepare the data with tokenizer.path: {theirs}"
            )
    return problems
