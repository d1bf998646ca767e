"""A whole run against one that nobody here wrote: transformers' Llama under `torch.optim.AdamW`, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from modelyard.config.loader import load_config
from modelyard.data.batch import Batch
from modelyard.train.build import open_stream
from tests.system.conftest import modelyard

SETTINGS = (
    "training.train_iters=8",
    "training.checkpoint.interval=null",
    "training.export={interval: 8, format: llama, data_type: fp32}",
    "batch.cross_document_attention=yes",
    "optimizer.weight_decay=0.3",
    "optimizer.beta_1=0.8",
    "optimizer.beta_2=0.9",
    "optimizer.epsilon=1e-6",
    "optimizer.gradient_norm_clipping=0.5",
)


@pytest.fixture
def pretrained(project: Path) -> Path:
    """A small random Llama, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    folder = project / "pretrained"
    LlamaForCausalLM(config).save_pretrained(folder)
    text = (project / "train.yaml").read_text()
    model = text[text.index("model:") : text.index("run:")]
    (project / "train.yaml").write_text(text.replace(model, f"pretrained: {{path: {folder}}}\n"))
    return folder


def reference_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def test_every_step_is_that_of_transformers_and_adamw(
    project: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    done = modelyard("train", "train.yaml", *SETTINGS, cwd=project)
    assert done.status == 0, done.err
    records = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "evaluator" not in record]
    evaluations = {record["iteration"]: record["loss"] for record in records if "evaluator" in record}

    monkeypatch.chdir(project)
    loaded = load_config([project / "train.yaml"], SETTINGS)
    assert loaded.architecture is not None
    training, validation = (
        open_stream(loaded.train, name, loaded.architecture) for name in ("training", "validation")
    )
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32, attn_implementation="sdpa")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    clipped = 0
    for index, record in enumerate(steps):
        step = index + 1
        # Warm-up over 2 steps to 3e-3, cosine to 3e-4 at step 12.
        cosine = 3e-4 + (3e-3 - 3e-4) * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        rate = 3e-3 * step / 2 if step <= 2 else cosine
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
        loss = reference_loss(model, training.batch(index))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        clipped += norm > 0.5
        assert record["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-4)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        if step in evaluations:
            with torch.no_grad():
                batches = [validation.batch(i) for i in range(2)]
                expected = sum(reference_loss(model, b).item() * b.num_targets for b in batches)
            assert evaluations[step] == pytest.approx(
                expected / sum(b.num_targets for b in batches), abs=2e-5
            )
    assert len(steps) == 8
    assert sorted(evaluations) == [4, 8]
    assert clipped, "clipping must be part of the comparison"

    ours = AutoModelForCausalLM.from_pretrained(
        project / "run" / "export" / "llama" / "8", dtype=torch.float32
    )
    for (name, a), (_, b) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
