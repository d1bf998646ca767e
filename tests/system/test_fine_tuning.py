"""Fine-tuning as a user does it: the guide's recipe as it stands, and conversations without any script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modelyard.chat.families import Llama3
from modelyard.chat.shipped import chat_template
from modelyard.data.store import TokenStore
from modelyard.data.tokenizer import load_tokenizer
from tests.system.conftest import modelyard

TALKS = [
    [
        {"role": "user", "content": f"how wide is {i}?"},
        {"role": "assistant", "content": f"{i} times the sea"},
        {"role": "user", "content": "and over?"},
        {"role": "assistant", "content": "a ship"},
    ]
    for i in range(400)
]
HEAD, END = "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"


def spans_around_answers(text: str) -> list[list[int]]:
    """What is not to be trained on, first and last character: all but the answers and what ends them."""
    spans, at = [], 0
    while (begin := text.find(HEAD, at)) >= 0:
        spans.append([at, begin + len(HEAD) - 1])
        at = text.index(END, begin) + len(END)
    return spans


@pytest.fixture
def tutorial(tmp_path: Path, chat_tokenizers: dict[str, Path]) -> Path:
    """The folder that the guide's configs speak of, with a small model in it."""
    model = tmp_path / "sft-tutorial" / "Llama-3.1-8B"
    shutil.copytree(chat_tokenizers["llama3"], model)
    template = chat_template(Llama3())
    assert template is not None
    (model / "chat_template.jinja").write_text(template)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=290,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    records = {"text": texts, "spans": [spans_around_answers(text) for text in texts]}
    datasets.Dataset.from_dict(records).save_to_disk(tmp_path / "sft-tutorial" / "hf_dataset")
    return tmp_path


def test_the_guides_recipe_as_it_stands(tutorial: Path, shared: Path) -> None:
    """Both files unchanged; on the command line only how long it takes."""
    configs = shared / "configs"
    done = modelyard("prepare", configs / "sft-prepare.yaml", cwd=tutorial)
    assert done.status == 0, done.err
    folder = tutorial / "sft-tutorial" / "tokenized" / "Llama-3.1-8B"
    store = TokenStore(folder / "training")
    tokenizer = load_tokenizer(store.path / "tokenizer")
    assert store.num_documents + TokenStore(folder / "validation").num_documents == 400
    for number in range(0, store.num_documents, 37):
        ids, mask = store.document(number), store.lane("loss_mask", number)
        assert mask is not None
        text = tokenizer.decode(ids[mask == 0])
        assert ids[0] == 0
        assert ids[1] != 0  # the text has its begin token already
        assert text.replace("<|end_of_text|>", "").endswith(" times the sea<|eot_id|>a ship<|eot_id|>")

    smaller = ("training.train_iters=12", "batch.batch_size=2", "training.evaluators.validation.interval=4",
               "training.evaluators.validation.evaluator.iterations=1", "optimizer.learning_rate.base=0.01",
               "optimizer.learning_rate.warmup_iterations=2")  # fmt: skip
    done = modelyard("train", configs / "llama-3.1-8b-sft.yaml", *smaller, cwd=tutorial)
    assert done.status == 0, done.err
    records = [
        json.loads(line)
        for line in (tutorial / "sft-tutorial" / "llama-3.1-8b-instruct-magpie" / "metrics.jsonl").open()
    ]
    losses = [record["loss"] for record in records if record.get("evaluator") == "validation"]
    assert losses[-1] < 0.9 * losses[0]
    exports = tutorial / "sft-tutorial" / "llama-3.1-8b-instruct-magpie" / "export" / "llama"
    assert AutoModelForCausalLM.from_pretrained(exports / "12").num_parameters() > 0


def test_the_same_from_conversations(tutorial: Path, shared: Path) -> None:
    """Without a script: the ids are those of the guide's texts, and what is trained on is the same but for what ends a text."""
    configs = shared / "configs"
    (tutorial / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    (tutorial / "prepare.yaml").write_text(
        "output_path: talks\ndataset: {path: talks.jsonl, conversations: {}}\n"
        "tokenizer: {path: sft-tutorial/Llama-3.1-8B}\nsplits: {training: 0.998, validation: 0.002}\n"
    )
    assert modelyard("prepare", "prepare.yaml", cwd=tutorial).status == 0
    done = modelyard("prepare", configs / "sft-prepare.yaml", "tokenizer.add_eos=no", cwd=tutorial)
    assert done.status == 0, done.err
    ours = TokenStore(tutorial / "talks" / "training")
    theirs = TokenStore(tutorial / "sft-tutorial" / "tokenized" / "Llama-3.1-8B" / "training")
    from modelyard.data.datasets import StoredDataset
    from modelyard.data.lanes import not_targets

    for number in range(ours.num_documents):
        assert np.array_equal(ours.document(number), theirs.document(number))
        mask, length = theirs.lane("loss_mask", number), len(ours.document(number))
        found = not_targets(StoredDataset(ours.path), number, 0, length, spans=False, lane="sft")
        assert mask is not None
        assert found is not None
        assert found.tolist() == (mask != 0).tolist()
