"""Decoders that are not Llama's, and pretrained folders that are not what they should be, through the whole program.

The verbs run in this process: that is a tenth of the time, and what processes do is tested elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.cli import main
from modelyard.train.checkpoint import open_checkpoint
from tests.system.conftest import Result

TRANSFORMER = "model.base_model.transformer"
STARCODER = (
    f"{TRANSFORMER}.gated=no",
    f"{TRANSFORMER}.add_linear_biases=yes",
    f"{TRANSFORMER}.normalization.type=layer_norm",
)


def modelyard(*words: object, cwd: Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def exported(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with a decoder of StarCoder 2's kind, stopped after 6 iterations and resumed."""
    folder = tmp_path_factory.mktemp("starcoder") / "run"
    for iterations in (6, 12):
        done = modelyard(
            "train", "train.yaml", *STARCODER, "training.export.format=starcoder2", "training.evaluators={}",
            f"training.train_iters={iterations}", f"run.experiment_dir={folder}", cwd=prepared,
        )  # fmt: skip
        assert done.status == 0, done.out + done.err
    return folder


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "evaluator" not in line]


def test_starcoder2_trains_exports_and_is_read_by_transformers(exported: Path, prepared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(losses(exported)) == 12
    assert losses(exported)[-1] < losses(exported)[0] - 0.2
    folder = exported / "export" / "starcoder2" / "12"
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "Starcoder2ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "import json"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    written = modelyard(
        "generate", folder, "--prompt", prompt, "--max-new-tokens", 12, "--temperature", 0, "--dtype", "fp32",
        cwd=prepared,
    )  # fmt: skip
    assert written.status == 0, written.err
    assert tokenizer.decode(new[0], skip_special_tokens=True).rstrip() in written.out


def test_a_checkpoint_is_converted_to_the_family_that_holds_it(exported: Path, tmp_path: Path) -> None:
    done = modelyard("convert", exported, tmp_path / "out", "--dtype", "fp32", cwd=tmp_path)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "starcoder2"
    whole, rounded = (
        load_file(f / "model.safetensors") for f in (tmp_path / "out", exported / "export/starcoder2/12")
    )
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in whole.items())
    refused = modelyard("convert", exported, tmp_path / "llama", "--format", "llama", cwd=tmp_path)
    assert refused.status == 2
    assert "format llama has rms_norm, the model layer_norm (starcoder2 has it)" in refused.err
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_family_that_cannot_hold_it_is_refused_before_anything_starts(project: Path, family: str) -> None:
    for verb in ("train", "validate"):
        done = modelyard(verb, "train.yaml", *STARCODER, f"training.export.format={family}", cwd=project)
        assert done.status == 2
        (line,) = [line for line in done.err.splitlines() if line.startswith("error")]
        assert line.endswith(
            f"training.export.format: format {family} has rms_norm, the model layer_norm (starcoder2 has it)"
        )
    assert not (project / "run").exists()


def test_gpt2s_kind_with_frozen_embeddings_goes_on_bit_equal(project: Path) -> None:
    """Learned positions, bf16 with a wide residual, learning-rate scales: 6 and 6 more iterations are 12."""
    keys = (
        *STARCODER, f"{TRANSFORMER}.rotary.type=none", "model.base_model.max_position_embeddings=40",
        f"{TRANSFORMER}.full_precision_residual=yes", "model.distributed.training_dtype=bf16",
        "model.base_model.embeddings_lr_scale=0", f"{TRANSFORMER}.mlp_lr_scale=0.5", "training.export.format=null",
        "training.export.interval=null",
        "training.evaluators={}", f"{TRANSFORMER}.init_method_max=0.2", f"{TRANSFORMER}.init_method_min=-0.2",
    )  # fmt: skip
    for run, stops in (("whole", [12]), ("halves", [6, 12])):
        for iterations in stops:
            done = modelyard(
                "train", "train.yaml", *keys, f"training.train_iters={iterations}", f"run.experiment_dir={run}",
                cwd=project,
            )  # fmt: skip
            assert done.status == 0, done.out + done.err
    assert losses(project / "whole") == losses(project / "halves")
    assert losses(project / "whole")[-1] < losses(project / "whole")[0] - 0.1

    first, last = (open_checkpoint(project / f"whole/checkpoint/{n}") for n in (9, 12))
    assert first is not None
    assert last is not None
    same = {name for name in last.names() if torch.equal(first.load(name), last.load(name))}
    assert same == {"embed_tokens.weight", "embed_positions.weight"}
    assert last.load("embed_positions.weight").abs().max().item() == pytest.approx(0.2)
    text = modelyard("generate", "whole", "--prompt", "import json", "--max-new-tokens", 60, cwd=project)
    assert text.status == 0, text.err  # and ends with the positions
    changed = modelyard(
        "train", "train.yaml", *keys, f"{TRANSFORMER}.mlp_lr_scale=1", "run.experiment_dir=whole", cwd=project
    )
    assert changed.status == 2
    assert "model.base_model.transformer.mlp_lr_scale: was 0.5, is now 1" in changed.err


# --- pretrained folders -----------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(project: Path, exported: Path) -> Path:
    shutil.copytree(exported / "export" / "starcoder2" / "12", project / "pre")
    (project / "go-on.yaml").write_text(
        "training: {train_iters: 2, logs: {interval: 1, tensorboard: no}}\n"
        "batch: {sequence_length: 32, batch_size: 4}\n"
        "data: {datasets: {training: {type: file, path: data/fast_llm_config_training.yaml}}}\n"
        "pretrained: {path: pre}\nrun: {experiment_dir: more}\n"
    )
    return project / "pre"


def go_on(folder: Path, *words: str) -> Result:
    return modelyard("train", "go-on.yaml", *words, cwd=folder.parent)


def refused(folder: Path, *words: str) -> list[str]:
    """What is said of a run that does not start, and leaves nothing behind."""
    done = go_on(folder, *words)
    assert done.status == 2, done.out + done.err
    assert not (folder.parent / "more").exists()
    return [line.removeprefix("error: ") for line in done.err.splitlines() if line.startswith("error")]


def test_training_goes_on_from_a_starcoder2_folder(pretrained: Path, exported: Path) -> None:
    done = go_on(pretrained)
    assert done.status == 0, done.out + done.err
    first = losses(pretrained.parent / "more")[0]
    assert first < losses(exported)[0] - 0.2


def test_tensors_missing_extra_and_of_another_shape(pretrained: Path) -> None:
    tensors = load_file(pretrained / "model.safetensors")
    del tensors["model.norm.bias"]
    tensors["model.layers.0.mlp.c_fc.weight"] = torch.zeros(3, 4)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3)
    save_file(tensors, pretrained / "model.safetensors")
    assert refused(pretrained) == [
        "pretrained.path: pre lacks 'norm.bias'",
        "pretrained.path: pre has weights that the architecture has no place for: 'layers.0.mlp.gate_proj.weight'",
        "pretrained.path: pre: 'layers.0.mlp.up_proj.weight' has shape [3, 4], the architecture wants [64, 32]",
    ]


def test_a_folder_of_another_family(pretrained: Path) -> None:
    (line,) = refused(pretrained, "pretrained.format=llama")
    assert line == (
        "override 1: pretrained.format is llama, but pre/config.json says starcoder2; write format: starcoder2"
    )
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    (line,) = refused(pretrained)
    assert "model_type 'falcon' is not supported (supported: llama, qwen2, mistral, starcoder2)" in line


def test_git_lfs_pointers_are_named_where_weights_are_wanted(pretrained: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (pretrained / "model.safetensors").write_text(pointer)
    (line,) = refused(pretrained)
    assert line.startswith("pretrained.path: pre/model.safetensors is a git-lfs pointer")
    validated = modelyard("validate", "go-on.yaml", cwd=pretrained.parent)
    assert validated.status == 2
    assert "pre/model.safetensors is a git-lfs pointer" in validated.err
    done = go_on(pretrained, "pretrained.model_weights=no")
    assert done.status == 0, done.err
    (pretrained / "config.json").write_text(pointer)
    shutil.rmtree(pretrained.parent / "more")
    (line,) = refused(pretrained, "pretrained.model_weights=no")
    assert line.endswith("pre/config.json is a git-lfs pointer, not the file; fetch it with `git lfs pull`")
