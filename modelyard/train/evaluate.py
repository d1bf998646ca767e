"""`modelyard evaluate`: the config's evaluators on a checkpoint, without training."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from modelyard.config.adapter_files import is_peft_folder
from modelyard.config.layout import layout_of
from modelyard.config.loader import Loaded
from modelyard.errors import UserError, missing_path
from modelyard.parallel.apply import parallelize
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.world import connected
from modelyard.train.adapted import adapted_weights
from modelyard.train.build import (
    compute_device,
    open_stream,
    stored_weights,
    tokenizer_folder,
)
from modelyard.train.checkpoint import Checkpoint, open_checkpoint
from modelyard.train.console import Console
from modelyard.train.evaluators import Evaluators
from modelyard.train.failure import on_its_own
from modelyard.train.models_on_disk import OpenModel, model_of, open_model
from modelyard.train.weights import DTYPES


def evaluate(loaded: Loaded, *, checkpoint: Path | None, as_json: bool, base: Path | None = None) -> int:
    """Run every evaluator (and the test set, if the config has one) once. Returns the exit status.

    `checkpoint` is a checkpoint folder, or PEFT's of an adapter; None takes the newest of `run.experiment_dir`. An adapter
    is computed with as in training, beside its base, which is at the place that it names or in `base`. Under torchrun
    every process of the job calls this; the main one speaks.
    """
    config = loaded.train
    if not config.training.evaluators and not config.training.test_iters:
        raise UserError("training.evaluators is empty: there is nothing to evaluate")
    distributed = config.model.distributed
    logs = config.run.experiment_dir / "logs"
    with ExitStack() as stack:
        world = stack.enter_context(
            connected(backend=distributed.backend, timeout=distributed.timeout, traces=logs)
        )
        stack.enter_context(on_its_own(world, Console(speaks=False), lambda: "the evaluation"))

        def say(text: str) -> None:
            if world.is_main:
                print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

        source = found = None
        with world.together():
            layout = layout_of(config, world.size)
            if world.is_main:
                source = _source(loaded, checkpoint, base)
                found = source.folder
        found = world.tell(found)
        assert found is not None
        with world.together():
            source = source or _reopened(found, base)
            device, dtype = compute_device(), DTYPES[distributed.training_dtype]
            adapter = None
            if source.adapted is None:
                fill = stored_weights(source.weights, source.architecture, found)
            else:
                adapter, weights = adapted_weights(
                    source, dtype=dtype, device=device, tensor_parallel=layout.tensor
                )
                fill = weights.fill
            tokenizer = None
            if "training" in config.data.datasets:
                tokenizer = tokenizer_folder(config, open_stream(config, "training", source.architecture))
            evaluators = Evaluators(
                config, source.architecture, tokenizer_folder=tokenizer, say=say, world=world
            )
        # Alone there is no need of master weights beside those to compute with; of a base that is adapted there are none.
        is_cast = world.is_alone and adapter is None
        parallel = parallelize(
            source.architecture,
            alone(device) if world.is_alone else Mesh(layout, device),
            compute_dtype=torch.promote_types(dtype, torch.float32) if is_cast else dtype,
            recompute="none",
            compile=False,
            sequence_length=config.batch.sequence_length,
            fill=fill,
            frozen=frozenset(source.architecture.parameter_shapes() if adapter is not None else ()),
            adapter=adapter,
        )
        parallel.weights.publish()
        if is_cast:
            parallel.models[0].to(dtype)
        say(f"checkpoint {found}")
        iteration = source.checkpoint.iteration if source.checkpoint else 0
        records = [
            evaluators.run(name, entry, parallel, iteration)
            for name, entry in config.training.evaluators.items()
        ]
        if config.training.test_iters:
            records.append(evaluators.test(parallel, iteration))
        if as_json and world.is_main:
            for record in records:
                print(json.dumps(record))
    return 0


def _reopened(folder: Path, base: Path | None) -> OpenModel:
    """What the main process found whole."""
    if is_peft_folder(folder):
        return open_model(folder, base=base)
    return model_of(Checkpoint(folder, verify=False), base=base)


def _source(loaded: Loaded, checkpoint: Path | None, base: Path | None) -> OpenModel:
    """The model to evaluate. Raises UserError where there is none, or one of another model."""
    folder = loaded.train.run.experiment_dir
    if checkpoint is not None and is_peft_folder(checkpoint):
        source = open_model(checkpoint, base=base)
    elif found := open_checkpoint(checkpoint or folder):
        source = model_of(found, base=base)
    else:
        where = checkpoint or folder / "checkpoint"
        raise UserError(
            f"no checkpoint to evaluate: {missing_path(where) if not where.exists() else f'none in {where}'}"
        )
    if (
        loaded.architecture is not None
        and loaded.architecture.parameter_shapes() != source.architecture.parameter_shapes()
    ):
        raise UserError(f"{source.folder} holds a model of another shape than the config describes")
    return source
