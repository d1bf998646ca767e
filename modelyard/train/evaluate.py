"""`modelyard evaluate`: the config's evaluators on a checkpoint, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from modelyard.config.loader import Loaded
from modelyard.errors import UserError, missing_path
from modelyard.model.formats import load_weights
from modelyard.train.build import build_model, compute_device, open_stream, tokenizer_folder
from modelyard.train.checkpoint import open_checkpoint
from modelyard.train.evaluators import Evaluators
from modelyard.train.weights import DTYPES


def evaluate(loaded: Loaded, *, checkpoint: Path | None, as_json: bool) -> int:
    """Run every evaluator (and the test set, if the config has one) once. Returns the exit status.

    `checkpoint` is a checkpoint folder; None takes the newest of `run.experiment_dir`.
    """
    config = loaded.train
    if not config.training.evaluators and not config.training.test_iters:
        raise UserError("training.evaluators is empty: there is nothing to evaluate")
    source = open_checkpoint(checkpoint or config.run.experiment_dir)
    if source is None:
        where = checkpoint or config.run.experiment_dir / "checkpoint"
        raise UserError(
            f"no checkpoint to evaluate: {missing_path(where) if not where.exists() else f'none in {where}'}"
        )
    folder = source.folder
    if (
        loaded.architecture is not None
        and loaded.architecture.parameter_shapes() != source.architecture.parameter_shapes()
    ):
        raise UserError(f"{folder} holds a model of another shape than the config describes")

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    device = compute_device()
    dtype = DTYPES[config.model.distributed.training_dtype]
    model = build_model(source.architecture, device).to(torch.promote_types(dtype, torch.float32))
    load_weights(model, source, str(folder))
    model.to(dtype)
    say(f"checkpoint {folder}")
    tokenizer = None
    if "training" in config.data.datasets:
        tokenizer = tokenizer_folder(config, open_stream(config, "training", source.architecture))
    evaluators = Evaluators(config, source.architecture, device=device, tokenizer_folder=tokenizer, say=say)
    records = [
        evaluators.run(name, entry, model, source.iteration)
        for name, entry in config.training.evaluators.items()
    ]
    if config.training.test_iters:
        records.append(evaluators.test(model, source.iteration))
    if as_json:
        for record in records:
            print(json.dumps(record))
    return 0
