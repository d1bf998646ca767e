"""The preparation config: the guides' keys, later spellings, and combinations that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from modelyard.config.prepare import PrepareConfig


def make(**changes: Any) -> PrepareConfig:
    document: dict[str, Any] = {"output_path": "out", "dataset": {"path": "x"}, "tokenizer": {"path": "t"}}
    for key, value in changes.items():
        document[key] = document.get(key, {}) | value if isinstance(value, dict) else value
    return PrepareConfig.model_validate(document)


def problem(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make(**changes)
    (error,) = caught.value.errors()
    return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"


def test_guides_config(shared):
    config = PrepareConfig.model_validate(
        yaml.safe_load((shared / "configs" / "sft-prepare.yaml").read_text())
    )
    assert str(config.output_path) == "sft-tutorial/tokenized/Llama-3.1-8B"
    assert (config.loading_workers, config.tokenize_workers, config.saving_workers) == (32, 32, 32)
    assert config.dataset.path == "./sft-tutorial/hf_dataset"
    assert (config.dataset.text_column, config.dataset.spans_column) == ("text", "spans")
    assert config.dataset.parse_special_tokens
    assert config.splits == {"training": 0.998, "validation": 0.002}


def test_defaults():
    config = make()
    assert (config.dataset.text_column, config.dataset.spans_column, config.dataset.split) == (
        "text",
        None,
        "train",
    )
    assert not config.dataset.parse_special_tokens
    assert config.tokens_per_shard == 1_000_000_000
    assert (config.tokenizer.add_bos, config.tokenizer.add_eos) == ("auto", "auto")


@pytest.mark.parametrize(
    ("schema", "columns"),
    [
        ({"type": "text_column", "input_column": "body", "loss_masking_spans_column": "s"}, ("body", "s")),
        ({"type": "document", "text": "body", "loss_masking_spans": "s"}, ("body", "s")),
        ({"input_column": "body"}, ("body", None)),
        ({"type": "document"}, ("text", None)),
    ],
)
def test_source_schema_means_the_same(schema, columns):
    dataset = make(dataset={"source_schema": schema}).dataset
    assert (dataset.text_column, dataset.spans_column) == columns


@pytest.mark.parametrize(
    ("special_tokens", "spans", "parse"),
    [("auto", None, False), ("auto", "s", True), ("text", "s", False), ("parse", None, True)],
)
def test_special_tokens(special_tokens, spans, parse):
    config = make(dataset={"special_tokens": special_tokens, "loss_masking_spans": spans})
    assert config.dataset.parse_special_tokens is parse


def test_extensions_get_their_dot():
    assert make(dataset={"extensions": ["py", ".rs"]}).dataset.extensions == [".py", ".rs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": {"chosen_text": "a"}},
            "dataset: Value error, 'chosen_text' cannot be used: preference pairs",
        ),
        ({"dataset": {"load_from_disk": True}}, "'load_from_disk' cannot be used: leave it out"),
        (
            {"dataset": {"source_schema": {"type": "conversation", "messages": "m"}}},
            "write dataset.conversations",
        ),
        (
            {"dataset": {"source_schema": {"type": "document", "images": "i"}}},
            "'images' cannot be used: images",
        ),
        (
            {"dataset": {"source_schema": {"type": "document", "input_column": "a"}}},
            "'document' has no input_column",
        ),
        ({"dataset": {"source_schema": {"text": "a"}}}, "type 'text_column' has no text"),
        ({"dataset": {"source_schema": {}, "field": "a"}}, "give source_schema or field, not both"),
        ({"dataset": {"max_file_bytes": 5}}, "max_file_bytes: only with `extensions`"),
        ({"dataset": {"extensions": []}}, "name at least one extension"),
        (
            {"dataset": {"extensions": ["py"], "min_file_bytes": 9, "max_file_bytes": 8}},
            "9 is above max_file_bytes 8",
        ),
        (
            {"dataset": {"extensions": ["py"], "loss_masking_spans": "s"}},
            "source files (`extensions`) have no spans",
        ),
        ({"dataset": {"path": ""}}, "dataset.path: Value error, must not be empty"),
        ({"dataset": {"feild": "x"}}, "dataset.feild: Extra inputs are not permitted"),
        (
            {"dataset": {"special_tokens": "yes"}},
            "dataset.special_tokens: Input should be 'auto', 'text' or 'parse'",
        ),
        ({"tokenizer": {"add_eos": False, "eos_token": "x"}}, "eos_token is given but add_eos is false"),
        ({"tokenizer": {"add_bos": False, "bos_token": "x"}}, "bos_token is given but add_bos is false"),
        ({"splits": {"a/b": 0.5}}, "split name 'a/b' must be letters, digits"),
        ({"splits": {"training": 1.0, "test": 0.0}}, "split 'test' needs a share above 0, not 0.0"),
        ({"splits": {"training": -1.0}}, "needs a share above 0"),
        ({"tokenize_workers": 0}, "tokenize_workers: Input should be greater than or equal to 1"),
        ({"tokens_per_shard": 0}, "tokens_per_shard: Input should be greater than or equal to 1"),
        ({"distributed": {"world_size": 2, "rank": 2}}, "rank 2 of world_size 2: ranks are numbered from 0"),
        ({"distributed": {"rank": 1}}, "rank 1 without a world_size"),
    ],
)
def test_refused(changes, message):
    assert message in problem(**changes)


def test_every_field_is_described():
    def check(model: type[BaseModel]) -> int:
        count = 0
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            count += 1 + sum(
                check(kind) for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)
            )
        return count

    assert check(PrepareConfig) > 35
