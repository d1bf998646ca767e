"""From a config to the objects that train: device, model, weights, data."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import torch

from modelyard import kernels
from modelyard.config.architecture import Architecture
from modelyard.config.layout import splits_backward
from modelyard.config.model import BaseModelConfig, init_limits
from modelyard.config.peft import adapter_of, adapter_words
from modelyard.config.train import TrainConfig
from modelyard.data.stream import DataStream
from modelyard.errors import UserError
from modelyard.model.adapter import AdaptedWeights
from modelyard.model.decoder import Decoder
from modelyard.model.formats import WeightSource, fit_problems, load_weights
from modelyard.model.fp8 import Scaling, obstacle
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.parallel.apply import Fill, Write
from modelyard.parallel.rank import local_rank
from modelyard.parallel.world import World
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.models_on_disk import base_fingerprint, first_adapter, open_model
from modelyard.train.step import LossOptions
from modelyard.train.weights import DTYPES


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


def chosen_kernels(config: TrainConfig) -> kernels.Choice:
    """What computes the parts that there are kernels for; raises UserError where this machine cannot."""
    wanted = config.training.kernels
    if wanted == "auto":  # nobody has measured the kernels on a GPU yet
        return "torch"
    if wanted == "triton":
        if problem := kernels.obstacle():
            raise UserError(f"training.kernels: triton needs {problem}; write kernels: auto")
        if config.model.distributed.training_dtype == "float64":
            raise UserError(
                "training.kernels: triton computes in float32, and model.distributed.training_dtype is float64; "
                "write kernels: auto"
            )
    return wanted


def fp8_scaling(config: TrainConfig, device: torch.device) -> Scaling | None:
    """How the blocks' products are scaled into fp8, None where they are not; raises UserError where this machine cannot."""
    wanted = config.training.fp8
    if wanted == "none":
        return None
    if problem := obstacle(device):
        raise UserError(f"training.fp8: {wanted} needs {problem}; write fp8: none")
    return wanted


def loss_options(model: BaseModelConfig) -> LossOptions:
    return LossOptions(
        implementation="fused" if model.cross_entropy_impl == "triton" else model.cross_entropy_impl,
        z_loss=model.logit_z_loss,
    )


def first_weights(
    architecture: Architecture, config: TrainConfig, *, goes_on: bool = False
) -> tuple[Fill, str]:
    """What fills the parameters: from `pretrained`, or drawn by (seed, name); and a line that says which.

    Where a run `goes_on`, an adapter's values come from its checkpoint later, and `pretrained.adapter` may be gone.
    Raises UserError where the pretrained weights do not fit.
    """
    adapter = adapter_of(config.model.base_model.transformer.peft)
    base, origin = _base_weights(architecture, config)
    if adapter is None:
        return partial(_load, source=base, where=origin), origin
    first, pretrained = None, config.pretrained
    if pretrained is not None and pretrained.adapter is not None and not goes_on:
        first = first_adapter(pretrained.adapter, adapter, Path(pretrained.path))
        origin += f", adapter from {pretrained.adapter}"
    adapted = AdaptedWeights(
        base,
        adapter,
        seed=config.model.distributed.seed,
        dtype=DTYPES[config.model.distributed.training_dtype],
        device=compute_device(),
        first=first,
    )
    own, whole = adapter.parameter_count(architecture), architecture.parameter_count()
    return (
        adapted.fill,
        f"{origin}; {adapter_words(adapter)}: {own:,} parameters beside {whole:,} ({own / whole:.2%})",
    )


def _base_weights(architecture: Architecture, config: TrainConfig) -> tuple[WeightSource, str]:
    """The weights that training starts from, without an adapter, and a line that says which."""
    pretrained = config.pretrained
    if pretrained is not None and pretrained.model_weights:
        path, origin = Path(pretrained.path), f"weights from {pretrained.path}"
        if pretrained.adapter is not None and adapter_of(config.model.base_model.transformer.peft) is None:
            source = open_model(pretrained.adapter, base=path).weights
            origin += f", {pretrained.adapter} merged into them"
        else:
            try:
                source = open_model(path).weights
            except UserError as error:
                raise UserError(*(f"pretrained.path: {problem}" for problem in error.problems)) from None
        if problems := fit_problems(source, architecture, pretrained.path):
            raise UserError(*problems)
        return source, origin
    transformer = config.model.base_model.transformer
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
    seed = config.model.distributed.seed
    return DrawnWeights(architecture, std, seed, compute_device()), f"weights drawn from seed {seed}"


def adapted_base(config: TrainConfig, checkpoint: Checkpoint | None) -> dict[str, str] | None:
    """What an adapter that is trained alone adapts: folder and fingerprint; None where it is no pretrained model, and in all
    but one of a host's processes: they read the same folder.

    Raises UserError where `checkpoint`, which is gone on from, is of other weights.
    """
    if config.pretrained is None or local_rank() != 0:
        return None
    path = config.pretrained.path
    base = {"path": str(path.resolve()), "fingerprint": base_fingerprint(path)}
    before = None if checkpoint is None else checkpoint.state.get("base")
    if checkpoint is not None and before is not None and base["fingerprint"] != before["fingerprint"]:
        raise UserError(
            f"pretrained.path: the weights in {path} are not those that {checkpoint.folder} was trained on "
            f"({before['path']}); name that folder, or choose another run.experiment_dir"
        )
    return base


def agreed_base(base: dict[str, str] | None, world: World) -> dict[str, str] | None:
    """The `adapted_base` of all hosts, as rank 0 has it. Raises UserError where theirs are not the same weights."""
    found = [one for one in world.gather(base) if one is not None]
    with world.together():
        if len({one["fingerprint"] for one in found}) > 1:
            raise UserError(
                f"pretrained.path: the weights in {found[0]['path']} are not the same on all hosts; give all of them one copy"
            )
    return found[0] if found else None


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
