"""Loss and accuracy of held-out conversations, by kind: computed by hand, by transformers, and alike in every layout."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.chat.segments import Kind, Segment, lane_value
from modelyard.config.layout import Layout
from modelyard.config.prepare import PrepareConfig
from modelyard.data.batch import Batch
from modelyard.data.lanes import NO_KIND
from modelyard.data.prepare import prepare
from modelyard.loss.cross_entropy import IGNORED
from modelyard.model.decoder import Decoder
from modelyard.model.formats import load_decoder, open_huggingface
from modelyard.parallel.mesh import Mesh, alone
from modelyard.train.evaluators import evaluate_loss
from modelyard.train.metrics import scalars
from modelyard.train.run import train
from modelyard.train.scores import Evaluation, Score, head_score_sums, score_sums
from modelyard.train.step import LossOptions
from tests.parallel.cases import STARCODER, TIED, layout_of
from tests.parallel.matrix import Case, build, global_batch
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded

CONTENT, TOOL_CALL, TERMINATOR, HEADER, LEFT_OUT = (
    lane_value(Segment("", kind, "assistant", trained=trained))
    for kind, trained in (
        (Kind.CONTENT, True),
        (Kind.TOOL_CALL, True),
        (Kind.TERMINATOR, True),
        (Kind.HEADER, True),
        (Kind.CONTENT, False),
    )
)
USERS = lane_value(Segment("", Kind.CONTENT, "user"))
SAID = {"content": CONTENT, "tool_call": TOOL_CALL, "terminator": TERMINATOR}


# --- by hand ----------------------------------------------------------------------------------------------------


def scored(labels: Sequence[int], kinds: Sequence[int] | None, options: LossOptions | None = None) -> Tensor:
    """Of tokens for each of which the words have the probabilities 1/12, 2/12, 3/12, 6/12."""
    model: Any = SimpleNamespace(
        output_weight=torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64).log(),
        vocabulary=None,
        architecture=SimpleNamespace(logits_scale=1.0),
    )
    row, hidden = torch.tensor([labels]), torch.ones(1, len(labels), 1, dtype=torch.float64)
    of = None if kinds is None else torch.tensor([kinds], dtype=torch.uint8)
    return head_score_sums(
        model, hidden, Batch(row, row, row, torch.tensor([[0, len(labels)]]), of), options or LossOptions()
    )


def test_by_hand() -> None:
    found = Evaluation.of(
        scored(
            [3, 2, IGNORED, 1, 3, 3, 0, 3, IGNORED],
            [CONTENT, CONTENT, CONTENT, TERMINATOR, USERS, NO_KIND, HEADER, LEFT_OUT, TOOL_CALL],
        )
    )
    assert found.whole == Score(
        pytest.approx((math.log(2) * 4 + math.log(4) + math.log(6) + math.log(12)) / 7), 4 / 7, 7
    )
    # Calls are left out: none of them is a target. What is not said by the assistant, or not to be learnt, is in the whole.
    assert found.kinds == {
        "content": Score(pytest.approx((math.log(2) + math.log(4)) / 2), 1 / 2, 2),
        "terminator": Score(pytest.approx(math.log(6)), 0.0, 1),
    }
    assert found.record() == {
        "loss": pytest.approx(1.2051, abs=1e-4),
        "accuracy": 4 / 7,
        "targets": 7,
        "kinds": {
            "content": {"loss": pytest.approx(1.0397, abs=1e-4), "accuracy": 0.5, "targets": 2},
            "terminator": {"loss": pytest.approx(1.7918, abs=1e-4), "accuracy": 0.0, "targets": 1},
        },
    }
    assert str(found) == (
        "loss 1.2051 over 7 tokens, accuracy 57.1% (content 1.0397 / 50.0%, terminator 1.7918 / 0.0%)"
    )
    assert scalars(found.record(), "v")["v/kinds/content/accuracy"] == 0.5


def test_the_loss_is_made_as_the_options_say() -> None:
    with pytest.raises(ValueError, match="unknown cross-entropy implementation 'other'"):
        scored([3], None, LossOptions("other"))
    torch.testing.assert_close(scored([3, 0], None, LossOptions("torch")), scored([3, 0], None))
    assert scored([3], None, LossOptions(z_loss=0.5))[0, 0] == pytest.approx(
        math.log(2) + 0.5 * math.log(12) ** 2
    )


def test_text_has_no_kinds_and_nothing_no_score() -> None:
    text = Evaluation.of(scored([3, 2], None))
    assert text.record() == {"loss": pytest.approx(math.log(8) / 2), "accuracy": 0.5, "targets": 2}
    assert str(text) == "loss 1.0397 over 2 tokens, accuracy 50.0%"
    nothing = Evaluation.of(scored([IGNORED], [CONTENT]))
    assert nothing.record() == {"loss": 0.0, "accuracy": 0.0, "targets": 0}


def test_a_loss_that_is_not_finite_is_that_of_its_kind_alone() -> None:
    sums = scored([3, 3], [CONTENT, TERMINATOR])
    sums[:2, 0] = math.nan
    record = Evaluation.of(sums).record()
    assert record["loss"] is None
    assert record["kinds"]["content"] == {"loss": None, "accuracy": 1.0, "targets": 1}
    assert record["kinds"]["terminator"]["loss"] == pytest.approx(math.log(2))


# --- every layout -----------------------------------------------------------------------------------------------

LAYOUTS = {
    2: [
        Case(layout_of(shard=2, zero=3), micro_batch_size=1, data="masked"),
        Case(layout_of(replicate=2), micro_batch_size=3),
        Case(layout_of(tensor=2)),
        Case(layout_of(tensor=2, sequence=True), architecture=STARCODER),
        Case(layout_of(tensor=2), architecture=TIED, options=LossOptions("torch", z_loss=1e-3)),
        Case(layout_of(context=2), data="long"),
        Case(layout_of(pipeline=2), micro_batch_size=3),
        Case(layout_of(pipeline=2, schedule="zbv"), architecture=TIED, data="masked"),
    ],
    4: [
        Case(layout_of(pipeline=2, tensor=2, sequence=True), options=LossOptions(z_loss=1e-3)),
        Case(layout_of(context=2, tensor=2), data="long"),
        Case(layout_of(shard=2, pipeline=2, schedule="interleaved"), architecture=TIED),
        Case(layout_of(shard=2, context=2, zero=3), data="whole"),
    ],
}


class Conversations:
    """Batches with random kinds, and many labels that are the likeliest word, as a stream gives them."""

    def __init__(self, case: Case, model: Decoder, batches: int = 2):
        self._batches, self.logits = [], []
        generator = torch.Generator().manual_seed(11)
        of = torch.tensor([*SAID.values(), USERS, HEADER, LEFT_OUT, NO_KIND], dtype=torch.uint8)
        for index in range(batches):
            batch = global_batch(case, index)
            with torch.no_grad():
                logits = model.logits(model(batch.input_ids, batch.positions, batch.cu_seqlens))
            kinds = of[torch.randint(len(of), batch.labels.shape, generator=generator)]
            foreseen = (batch.labels != IGNORED) & (torch.rand(batch.labels.shape, generator=generator) < 0.4)
            labels = batch.labels.where(~foreseen, logits.argmax(-1))
            self._batches.append(dataclasses.replace(batch, labels=labels, kinds=kinds))
            self.logits.append(logits)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def batch(self, index: int, share: tuple[int, int] = (0, 1)) -> Batch:
        number, of = share
        batch = self._batches[index]
        rows = len(batch) // of
        return batch.rows(number * rows, number * rows + rows)

    def truth(self, options: LossOptions) -> dict[str, tuple[float, float, int]]:
        """Loss, accuracy and targets of the whole and of each kind, token by token."""
        labels = torch.stack([batch.labels for batch in self]).flatten()
        kinds = torch.stack([batch.kinds for batch in self if batch.kinds is not None]).flatten()
        logits = torch.stack(self.logits).flatten(0, -2)
        losses = (
            F.cross_entropy(logits, labels, reduction="none") + options.z_loss * logits.logsumexp(-1) ** 2
        )
        found = {}
        for name, byte in {"whole": None, **SAID}.items():
            chosen = (labels != IGNORED) & (torch.tensor(byte is None) | (kinds == (byte or 0)))
            hits = logits[chosen].argmax(-1) == labels[chosen]
            found[name] = (losses[chosen].mean().item(), hits.double().mean().item(), int(chosen.sum()))
        return found


def _evaluations(work: list[tuple[Case, Conversations]], single: bool = False) -> list[dict[str, Any]]:
    found = []
    for case, stream in work:
        run = build(case, alone() if single else Mesh(case.layout, torch.device("cpu")))
        evaluation = evaluate_loss(
            run,
            stream,
            iterations=2,
            micro_batch_size=case.micro_batch_size,
            options=case.options,  # type: ignore[arg-type]
        )
        assert evaluation is not None
        scores = {"whole": evaluation.whole, **evaluation.kinds}
        found.append({name: dataclasses.astuple(score) for name, score in scores.items()})
    return found


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_finds_the_same(processes: int) -> None:
    work = []
    for case in LAYOUTS[processes]:
        one = build(dataclasses.replace(case, layout=Layout()), alone()).model
        assert isinstance(one, Decoder)
        work.append((case, Conversations(case, one)))
    on_one = _evaluations([(dataclasses.replace(case, layout=Layout()), s) for case, s in work], single=True)
    everywhere = run_distributed(_evaluations, processes, work)
    for index, (case, stream) in enumerate(work):
        truth = stream.truth(case.options)
        assert 0.2 < truth["whole"][1] < 0.8
        assert truth["whole"][2] > sum(targets for _, _, targets in list(truth.values())[1:]) > 10
        for found in [on_one[index], *(rank[index] for rank in everywhere)]:
            assert found.keys() == truth.keys(), case.layout
            for name, (loss, accuracy, targets) in truth.items():
                assert found[name] == (pytest.approx(loss, rel=1e-10), accuracy, targets), (name, case.layout)


# --- real weights -----------------------------------------------------------------------------------------------


def test_real_weights_score_as_transformers_has_it(shared_data: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = shared_data / "weights" / "stories260K"
    opened = open_huggingface(folder / "hf")
    model = load_decoder(opened.weights, opened.architecture, where=folder)
    published = json.loads((folder / "reference.json").read_text())
    ids = torch.tensor([published["greedy_ids"], published["greedy_ids"][::-1]])
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[:, ::7] = IGNORED
    length = inputs.shape[1]
    kinds = torch.tensor([CONTENT, TOOL_CALL, CONTENT, TERMINATOR, USERS], dtype=torch.uint8).repeat(
        2, length
    )
    batch = Batch(
        inputs, labels, torch.arange(length).repeat(2, 1), torch.tensor([[0, length]] * 2, dtype=torch.int32),
        kinds[:, :length],
    )  # fmt: skip
    found = Evaluation.of(score_sums(model, batch, LossOptions()))

    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)(inputs).logits.double()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    hits = logits.argmax(-1) == labels
    for name, score in [("whole", found.whole), *found.kinds.items()]:
        chosen = labels != IGNORED
        if name != "whole":
            chosen &= kinds[:, :length] == SAID[name]
        assert score.targets == int(chosen.sum())
        assert score.loss == pytest.approx(losses[chosen].mean().item(), rel=1e-5)
        assert score.accuracy == pytest.approx(hits[chosen].double().mean().item(), abs=1e-12)
    assert found.kinds.keys() == SAID.keys()
    # Greedy words are all foreseen, read backwards hardly any.
    assert 0.5 < found.whole.accuracy < 0.6


# --- the program ------------------------------------------------------------------------------------------------


def test_an_evaluator_on_conversations(
    tiny: Path, chat_tokenizers: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What its record has and the log says; a model that has seen the same answer eight times knows some of its words."""
    talk = [{"role": "user", "content": "how wide?"}, {"role": "assistant", "content": "a wide sea"}]
    Path("talks.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 8)
    document = {
        "output_path": "data",
        "dataset": {"path": "talks.jsonl", "conversations": {"family": "chatml"}},
        "tokenizer": {"path": str(chat_tokenizers["chatml"])},
        "tokenize_workers": 1,
    }
    prepare(PrepareConfig.model_validate(document), report=lambda line: None, terminal=False)
    config = loaded(
        "data.datasets={training: {type: file, path: data/fast_llm_config.yaml}, talks: {type: file, path: "
        "data/fast_llm_config.yaml}, held_out: {type: random}}",
        "training.evaluators={talks: {interval: 12, evaluator: {iterations: 1}}, held_out: {interval: 12, evaluator: "
        "{iterations: 1}}}",
        "model.base_model.vocab_size=290",
        "batch={sequence_length: 64, batch_size: 4, cross_document_attention: no}",
        "optimizer.learning_rate.base=0.02",
    )
    assert train(config) == 0
    talks, held_out = (
        next(r for r in lines("run/metrics.jsonl") if r.get("evaluator") == name)
        for name in ("talks", "held_out")
    )
    assert "kinds" not in held_out
    assert 0 <= held_out["accuracy"] < 0.1
    assert talks["kinds"].keys() == {"content", "terminator"}
    content, terminator = talks["kinds"].values()
    assert (content["targets"], terminator["targets"]) == (40, 8)
    assert talks["targets"] == content["targets"] + terminator["targets"]
    for key in ("loss", "accuracy"):
        mean = (40 * content[key] + 8 * terminator[key]) / 48
        assert talks[key] == pytest.approx(mean, rel=1e-12)
    assert 0 < talks["accuracy"] < 1
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluator talks"))
    assert said == (
        f"evaluator talks at iteration 12: loss {talks['loss']:.4f} over {talks['targets']} tokens, accuracy "
        f"{talks['accuracy']:.1%} (content {content['loss']:.4f} / {content['accuracy']:.1%}, "
        f"terminator {terminator['loss']:.4f} / {terminator['accuracy']:.1%})"
    )
