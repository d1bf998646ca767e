"""From a config to the objects that train: device, model, weights, data."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import torch

from modelyard.config.architecture import Architecture
from modelyard.config.layout import splits_backward
from modelyard.config.model import BaseModelConfig, init_limits
from modelyard.config.pretrained import is_checkpoint
from modelyard.config.train import TrainConfig
from modelyard.data.stream import DataStream
from modelyard.errors import UserError
from modelyard.model.decoder import Decoder
from modelyard.model.formats import WeightSource, fit_problems, load_weights, open_huggingface
from modelyard.model.init import InitStd, initialize
from modelyard.parallel.apply import Fill, Write
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.step import LossOptions


def compute_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the model's blocks are compiled; raises UserError where this machine cannot."""
    wanted = config.training.compile
    if wanted == "auto":
        return device.type == "cuda" and not splits_backward(config.model.distributed)
    compiler = os.environ.get("CXX") or "g++"
    if wanted and device.type == "cpu" and not shutil.which(compiler):
        raise UserError(
            f"training.compile: yes needs a C++ compiler, and there is no {compiler}; install one, name it in the "
            "variable CXX, or write compile: no"
        )
    return wanted


def loss_options(model: BaseModelConfig) -> LossOptions:
    return LossOptions(
        implementation="fused" if model.cross_entropy_impl == "triton" else model.cross_entropy_impl,
        z_loss=model.logit_z_loss,
    )


def first_weights(architecture: Architecture, config: TrainConfig) -> tuple[Fill, str]:
    """What fills the parameters: from `pretrained`, or drawn by (seed, name); and a line that says which.

    Raises UserError where the pretrained weights do not fit.
    """
    pretrained = config.pretrained
    if pretrained is not None and pretrained.model_weights:
        folder = Path(pretrained.path)
        source: WeightSource = (
            Checkpoint(folder) if is_checkpoint(folder) else open_huggingface(folder).weights
        )
        return stored_weights(source, architecture, pretrained.path), f"weights from {pretrained.path}"
    transformer = config.model.base_model.transformer
    seed = config.model.distributed.seed
    std = InitStd.for_architecture(
        architecture,
        base=transformer.init_method_std,
        embedding=config.model.base_model.init_method_std_embed,
        qkv=transformer.init_method_std_qkv,
        attention_output=transformer.init_method_std_attn_proj,
        mlp_in=transformer.init_method_std_mlp_1,
        mlp_out=transformer.init_method_std_mlp_2,
        limits=init_limits(config.model.base_model),
    )

    def draw(model: Decoder, write: Write) -> None:
        initialize(model, seed, std, write=write, device=compute_device())

    return draw, f"weights drawn from seed {seed}"


def _load(model: Decoder, write: Write, *, source: WeightSource, where: str) -> None:
    load_weights(model, source, where, write=write)


def stored_weights(source: WeightSource, architecture: Architecture, where: Path | str) -> Fill:
    """What fills the parameters from a checkpoint or another folder. Raises UserError where they do not fit."""
    if problems := fit_problems(source, architecture, where):
        raise UserError(*problems)
    return partial(_load, source=source, where=str(where))


def open_stream(config: TrainConfig, name: str, architecture: Architecture) -> DataStream:
    """The batches of `data.datasets.<name>`."""
    if name not in config.data.datasets:
        known = ", ".join(config.data.datasets) or "none"
        raise UserError(f"data.datasets has no '{name}' (it has: {known})")
    # Only `shuffle: full` asks how long the run is; an evaluation reads the beginning of its data.
    total_rows = config.training.train_iters * config.batch.batch_size if name == "training" else None
    return DataStream(
        config.data.datasets[name],
        name=name,
        sampling=config.data.sampling,
        batch=config.batch,
        vocab_size=architecture.vocab_size,
        total_rows=total_rows,
    )


def tokenizer_folder(config: TrainConfig, stream: DataStream) -> Path | None:
    """The tokenizer of the data: what the config names, else the copy that the first store carries."""
    if config.data.tokenizer.path is not None:
        return Path(config.data.tokenizer.path)
    return stream.tokenizer_folder
