"""A run at Weights & Biases; whatever goes wrong there costs a line, never the training."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.files import replace_text
from modelyard.train.metrics import scalars

# Events that people want to hear of where `alert.status_updates` is on.
_NEWS = (
    "started", "resumed", "save_failed", "checkpoint_damaged", "spike", "rolled_back", "slow_rank", "diverged", "zero_gradient",
    "stopped", "shutdown", "finished", "failed",
)  # fmt: skip


def require_wandb(config: TrainConfig) -> None:
    """Raise UserError where the config asks for Weights & Biases and the package is not there."""
    if config.training.wandb.entity_name is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a mere folder ./wandb, as runs leave them, is no package
        raise UserError(
            "training.wandb needs the wandb package: pip install 'modelyard[wandb]', or set training.wandb.entity_name: null"
        )


class WandbRun:
    """Sends every record of the metrics with its iteration as the step, and messages as `alert` says.

    The id of the run is kept in EXPERIMENT_DIR/wandb.json, so that a run that is resumed goes on in the same one. Records
    before the last step that arrived there (again after a kill) are left out by the service; they are the same.
    """

    def __init__(self, config: TrainConfig, description: Path, say: Callable[[str], None]):
        """`description` is the experiment's `config.json`, sent as the run's config."""
        self._settings, self._say = config.training.wandb, say
        self._folder = config.run.experiment_dir
        self._run: Any = None
        self._careful("cannot be started", self._start, description)

    def _careful(self, failure: str, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever it is: it is not worth the training
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._say(f"warning: Weights & Biases {failure} ({reason}); training goes on without it")
            self._run = None

    def _start(self, description: Path) -> None:
        import wandb

        # Where the key is a mounted secret; only this process sees it.
        if (path := os.environ.get("WANDB_API_KEY_PATH")) and "WANDB_API_KEY" not in os.environ:
            os.environ["WANDB_API_KEY"] = Path(path).read_text(encoding="utf-8").strip()
        kept = self._folder / "wandb.json"
        run_id = json.loads(kept.read_text(encoding="utf-8"))["id"] if kept.exists() else None
        self._run = wandb.init(
            entity=self._settings.entity_name,
            project=self._settings.project_name,
            group=self._settings.group_name,
            name=self._folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(self._folder),
            config=json.loads(description.read_text(encoding="utf-8")),
            # The console is ours (log.txt), and its lines are too.
            settings=wandb.Settings(console="off", silent=True, save_code=False),
        )
        if run_id is None:
            replace_text(kept, json.dumps({"id": self._run.id}) + "\n")
        offline = self._run.settings.mode == "offline"
        where = f"offline, `wandb sync {Path(self._run.dir).parent}` sends it" if offline else self._run.url
        self._say(f"Weights & Biases: {where}")

    def record(self, record: dict[str, Any], prefix: str) -> None:
        """A record of the metrics; samples become a table."""
        if self._run is not None:
            self._careful("takes no records", self._record, record, prefix)

    def _record(self, record: dict[str, Any], prefix: str) -> None:
        import wandb

        values: dict[str, Any] = dict(scalars(record, prefix))
        if samples := record.get("samples"):
            rows = [[sample["prompt"], sample["text"]] for sample in samples]
            values[f"{prefix}/samples"] = wandb.Table(columns=["prompt", "text"], data=rows)
        self._run.log(values, step=record["iteration"])
        alert = self._settings.alert
        if prefix == "training" and alert.due(record["iteration"]):
            numbers = ", ".join(
                f"{key} {record[key]:.4g}"
                for key in ("loss", "grad_norm", "tokens_per_second")
                if record[key]
            )
            self._run.alert(title=f"iteration {record['iteration']}", text=numbers)

    def event(self, event: dict[str, Any]) -> None:
        """Something that happened to the run."""
        alert = self._settings.alert
        wanted = alert.interval is not None if alert.status_updates is None else alert.status_updates
        if self._run is not None and wanted and event["event"] in _NEWS:
            self._careful(
                "takes no messages", lambda: self._run.alert(title=event["event"], text=event["text"])
            )

    def finish(self, status: int) -> None:
        """Send what is left, and the exit status."""
        if self._run is not None:
            self._careful("does not end well", lambda: self._run.finish(exit_code=status))
            self._run = None
