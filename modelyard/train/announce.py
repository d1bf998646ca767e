"""What a run says when it begins and when it ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from modelyard.config.layout import Layout
from modelyard.config.peft import adapter_in_short
from modelyard.config.traces import trace_warnings
from modelyard.files import CHAT_FILE
from modelyard.plan.layout import layout_line, layout_rows
from modelyard.train.build import chosen_kernels, compiles

if TYPE_CHECKING:
    from modelyard.train.state import Run


def announce(run: Run, remarks: list[str]) -> None:
    """What is about to be done, before anything is."""
    config, console = run.config, run.console
    for remark in remarks:
        console.line(remark)
    console.line(
        f"{run.architecture.parameter_count():,} parameters, {config.model.distributed.training_dtype} on "
        f"{run.device.type} ({torch.get_num_threads()} threads), {config.batch.tokens:,} tokens an iteration "
        f"(micro-batches of {config.batch.micro_rows(run.mesh.layout.data)})"
    )
    if not run.world.is_alone:
        for name, text in layout_rows(config, run.architecture, run.mesh.layout):
            console.line(f"{name}: {text}")
    for line in run.stream.describe():
        console.line(line)
    for line in trace_warnings(config):
        console.line(f"warning: {line}")
    if compiles(config, run.device):
        console.line(
            "blocks are compiled: the first iteration takes longer than those after it, up to minutes"
        )
    if chosen_kernels(config) == "triton":
        console.line("computed with kernels in Triton where there are any (training.kernels)")
    if config.training.fp8 != "none":
        how = "" if run.device.type == "cuda" else ", emulated: slower here than without"
        console.line(f"the blocks' products are in fp8, scaled {config.training.fp8}{how}")


def say_start(run: Run) -> None:
    """That the run begins, or where it goes on from, and on what other processes it was until then."""
    iteration, train_iters, console = run.progress.iteration, run.config.training.train_iters, run.console
    layout = run.mesh.layout
    facts: dict[str, Any] = {"processes": layout.world, "layout": layout_line(layout)}
    if run.forced:
        facts["forced"] = run.forced
    if restart := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        facts["restart"] = restart
    if iteration:
        checkpoint = run.folder / "checkpoint" / str(iteration)
        before = _saved_on(checkpoint) if run.world.is_main else None
        if moved := before not in (None, facts["layout"]):
            facts["layout_before"] = before
        run.events.add("resumed", iteration, f"resuming from {checkpoint}", **facts)
        if moved:
            rows = run.config.batch.batch_size
            console.line(
                f"it was on {before}; now it is on {facts['layout']}, with the same {rows} rows a step"
            )
    else:
        text = f"{run.architecture.parameter_count():,} parameters, {train_iters:,} iterations"
        if run.adapter is not None:
            text += f", {adapter_in_short(run.adapter, run.architecture)} trained"
        run.events.add("started", 0, text, say=False, **facts)
        if restart:
            console.line("from the beginning again, for there is no checkpoint yet")
    if iteration >= train_iters > 0:
        console.line(
            f"this run has {iteration} iterations, training.train_iters is {train_iters}: nothing to train"
        )


def _saved_on(checkpoint: Path) -> str | None:
    """The layout that wrote a checkpoint; None where it does not say so."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return layout_line(Layout(**state["layout"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def farewell(run: Run) -> None:
    """That the run has come to its end, and where to find what."""
    console, folder = run.console, run.folder
    console.stop_bar()
    if run.config.training.train_iters == 0:
        text = (
            f"evaluated; training.train_iters is 0: nothing is trained or saved ({folder / 'metrics.jsonl'})"
        )
        say_end(run, "finished", text)
        return
    say_end(run, "finished", f"finished {run.progress.iteration} iterations, {run.progress.tokens:,} tokens")
    console.line(f"  checkpoints  {folder / 'checkpoint'}")
    board = f", tensorboard --logdir {folder / 'tensorboard'}" if run.config.training.logs.tensorboard else ""
    console.line(f"  metrics      {folder / 'metrics.jsonl'}{board}")
    if (export := run.export_folder) is not None and export.exists():
        console.line(f"  export       {export}")
    talks = run.tokenizer_folder is not None and (run.tokenizer_folder / CHAT_FILE).is_file()
    verb = f"chat {folder}" if talks else f"generate {folder} --prompt '…'"
    console.line(f"  try          modelyard {verb}")


def say_end(run: Run, event: Literal["stopped", "shutdown", "finished"], text: str, **facts: Any) -> None:
    """The last event of a run, with the seconds of its phases since the last training record."""
    run.events.add(event, run.progress.iteration, text, **facts, seconds=run.clock.read())
