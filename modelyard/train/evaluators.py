"""What is measured beside training: the loss on held-out data, and text written from prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.config.train import TrainConfig
from modelyard.config.training import (
    ChatEvaluatorConfig,
    EvaluatorConfig,
    LossEvaluatorConfig,
    SamplesEvaluatorConfig,
)
from modelyard.data.stream import DataStream
from modelyard.errors import UserError
from modelyard.generate.sample import Alone
from modelyard.model.decoder import Decoder
from modelyard.parallel.apply import Parallel
from modelyard.parallel.context import whole_rows
from modelyard.parallel.world import World
from modelyard.train.build import loss_options, open_stream
from modelyard.train.scores import Evaluation, no_scores, score_sums
from modelyard.train.step import LossOptions, micro_batches

if TYPE_CHECKING:
    from modelyard.train.chat_evaluator import ChatEvaluator


def evaluate_loss(
    parallel: Parallel,
    stream: DataStream,
    *,
    iterations: int | None,
    micro_batch_size: int,
    options: LossOptions,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores over the first `iterations` batches of `stream`, the same ones each time; None: over every document once.

    Every process calls it and reads its share of the rows. Returns None when `stop`, which all must answer alike, cut it
    short.
    """
    model, mesh, device = parallel.model, parallel.mesh, parallel.mesh.device
    share = (mesh.share, mesh.layout.data)
    total = no_scores(device)
    batches = (
        stream.one_pass(share)
        if iterations is None
        else (stream.batch(index, share) for index in range(iterations))
    )
    with torch.no_grad():
        for batch in batches:
            if stop():
                return None
            parts = micro_batches(parallel.local(batch), micro_batch_size, device)
            if isinstance(model, Decoder):
                for micro_batch in parts:
                    total += score_sums(model, micro_batch, options)
            else:
                total += model.score_sums(list(parts), options)
    parallel.release()
    return Evaluation.of(mesh.total_of_losses(total))


class _InLockStep:
    """A model that is spread over processes, as `generate` takes one: all of them compute the same text."""

    def __init__(self, parallel: Parallel, world: World):
        self._parallel, self._world = parallel, world
        self.architecture = parallel.architecture

    def start(self) -> Callable[[Sequence[int]], Tensor]:
        model = self._parallel.model
        if isinstance(model, Decoder):
            return Alone(model).start()
        seen: list[int] = []

        def read_again(tokens: Sequence[int]) -> Tensor:
            seen.extend(tokens)
            return model.last_logits(seen)

        return read_again

    def settle(self, token: int) -> int:
        return self._world.tell(token)


class Evaluators:
    """The evaluators of a config, ready to run on a model in its layout, by all processes alike.

    `stop` is asked between batches and prompts.
    """

    def __init__(
        self,
        config: TrainConfig,
        architecture: Architecture,
        *,
        tokenizer_folder: Path | None,
        say: Callable[[str], None],
        stop: Callable[[], bool] = lambda: False,
        world: World | None = None,
    ):
        self._config, self._say, self._stop, self._world = config, say, stop, world or World()
        self._tokenizer_folder = tokenizer_folder
        # What is trained for beside the loss is no part of the loss.
        self._options = dataclasses.replace(loss_options(config.model.base_model), z_loss=0.0)
        entries = config.training.evaluators
        self._streams = {
            name: open_stream(config, entry.evaluator.dataset_name or name, architecture)
            for name, entry in entries.items()
            if isinstance(entry.evaluator, LossEvaluatorConfig)
        }
        if config.training.test_iters:  # No evaluator has this name: the config refuses it.
            self._streams["test"] = open_stream(config, "test", architecture)
        for entry in entries.values():
            if tokenizer_folder is None and not isinstance(entry.evaluator, LossEvaluatorConfig):
                raise UserError(
                    f"a {entry.evaluator.type} evaluator needs a tokenizer: prepare the data again, or set data.tokenizer.path"
                )
        self._chats = {
            name: _open_chat(name, entry.evaluator, tokenizer_folder, architecture)
            for name, entry in entries.items()
            if isinstance(entry.evaluator, ChatEvaluatorConfig) and tokenizer_folder is not None
        }

    @property
    def streams(self) -> list[DataStream]:
        """The data that is evaluated on."""
        return list(self._streams.values())

    def run(
        self, name: str, entry: EvaluatorConfig, parallel: Parallel, iteration: int
    ) -> dict[str, Any] | None:
        """Run one evaluator; returns its record for the metrics, None when it was told to stop."""
        if isinstance(entry.evaluator, SamplesEvaluatorConfig):
            return self._samples(name, entry.evaluator, parallel, iteration)
        if isinstance(entry.evaluator, ChatEvaluatorConfig):
            return self._chat(name, parallel, iteration)
        return self._loss(name, entry.evaluator.iterations, parallel, iteration)

    def test(self, parallel: Parallel, iteration: int) -> dict[str, Any] | None:
        """Loss on the dataset `test`, as `training.test_iters` says."""
        return self._loss("test", self._config.training.test_iters, parallel, iteration)

    def _loss(
        self, name: str, iterations: int | None, parallel: Parallel, iteration: int
    ) -> dict[str, Any] | None:
        begin = time.perf_counter()
        stream = self._streams[name]
        evaluation = evaluate_loss(
            parallel,
            stream,
            iterations=iterations,
            micro_batch_size=self._config.batch.micro_rows(parallel.mesh.layout.data),
            options=self._options,
            stop=self._stop,
        )
        if evaluation is None:
            return None
        self._say(f"evaluator {name} at iteration {iteration}: {evaluation}")
        return {
            "iteration": iteration,
            "evaluator": name,
            **evaluation.record(),
            "seconds": time.perf_counter() - begin,
        }

    def _samples(
        self, name: str, settings: SamplesEvaluatorConfig, parallel: Parallel, iteration: int
    ) -> dict[str, Any] | None:
        from modelyard.generate.text import Generator, SamplingOptions

        assert self._tokenizer_folder is not None
        generator = Generator(_InLockStep(parallel, self._world), self._tokenizer_folder)
        samples = []
        for index, prompt in enumerate(settings.prompts):
            if self._stop():
                return None
            options = SamplingOptions(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                seed=settings.seed + index,
            )
            with whole_rows(*parallel.models):
                text = generator.complete(prompt, options).text
            samples.append({"prompt": prompt, "text": text})
            self._say(f"{name} at iteration {iteration}: {prompt!r} → {text!r}")
        parallel.release()
        return {"iteration": iteration, "evaluator": name, "samples": samples}

    def _chat(self, name: str, parallel: Parallel, iteration: int) -> dict[str, Any] | None:
        record = self._chats[name].record(
            _InLockStep(parallel, self._world),
            iteration,
            say=self._say,
            stop=self._stop,
        )
        parallel.release()
        return record


def _open_chat(
    name: str, settings: ChatEvaluatorConfig, tokenizer_folder: Path, architecture: Architecture
) -> ChatEvaluator:
    from modelyard.train.chat_evaluator import ChatEvaluator

    return ChatEvaluator(name, settings, tokenizer_folder, architecture)
