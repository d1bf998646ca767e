"""Dataset files: paths relative to the file, circles, typing errors, older forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from modelyard.config.data import BlendedDataset, DatasetConfig, MemmapDataset, SampledDataset, SliceDataset
from modelyard.data.foreign_file import open_store
from modelyard.data.resolve import read_dataset_file, resolve
from modelyard.errors import UserError

CONFIG: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def file(path: str | Path) -> DatasetConfig:
    return CONFIG.validate_python({"type": "file", "path": str(path)})


def test_nested_paths_are_relative_to_their_own_file(tmp_path):
    write(
        tmp_path / "outer.yaml",
        "type: concatenated\ndatasets:\n- {type: file, path: deep/inner.yaml}\n- {type: memmap, path: here}\n",
    )
    write(tmp_path / "deep" / "inner.yaml", "type: memmap\npath: ../there\n")
    tree = resolve(file("outer.yaml"), tmp_path)
    assert [part.path for part in tree.datasets] == [tmp_path / "deep" / ".." / "there", tmp_path / "here"]


def test_paths_of_the_config_itself_are_left_to_the_working_directory():
    tree = resolve(CONFIG.validate_python({"type": "memmap", "path": "train"}))
    assert tree == MemmapDataset(type="memmap", path=Path("train"))


def test_a_split_written_by_the_older_prepare(tmp_path):
    text = "begin: 0.0\ndataset:\n  num_documents: 400\n  num_tokens: 14462\n  path: shard_0_0\n  type: memmap\nend: 0.9075\ntype: slice\n"
    tree = resolve(file(write(tmp_path / "fast_llm_config_training.yaml", text)))
    assert isinstance(tree, SliceDataset)
    assert (tree.begin, tree.end) == (0.0, 0.9075)
    assert tree.dataset == MemmapDataset(
        type="memmap", path=tmp_path / "shard_0_0", num_documents=400, num_tokens=14462
    )


def test_the_oldest_form_is_a_blend(tmp_path):
    entries = [
        {"prefix": "shard_0", "num_documents": 3, "num_tokens": 30, "weight": 0.75},
        {"prefix": "shard_1", "weight": 0.25},
    ]
    tree = resolve(file(write(tmp_path / "dataset.json", json.dumps({"datasets": entries}))))
    assert isinstance(tree, BlendedDataset)
    assert tree.weights == [0.75, 0.25]
    assert [part.path for part in tree.datasets] == [tmp_path / "shard_0", tmp_path / "shard_1"]


def test_slices_move_below_blends():
    blend = {
        "type": "blended",
        "weights": [1, 2],
        "datasets": [{"type": "random"}, {"type": "random", "name": "b"}],
    }
    sampled = {"type": "sampled", "sampling": {"seed": 3}, "dataset": blend}
    tree = resolve(CONFIG.validate_python({"type": "slice", "begin": 0.25, "dataset": sampled}))
    assert isinstance(tree, SampledDataset)
    assert tree.sampling.seed == 3
    assert isinstance(tree.dataset, BlendedDataset)
    assert [(part.type, part.begin, part.end) for part in tree.dataset.datasets] == [("slice", 0.25, 1.0)] * 2


def test_circles_are_found(tmp_path):
    a = write(tmp_path / "a.yaml", "type: slice\ndataset: {type: file, path: b.yaml}\n")
    write(tmp_path / "b.yaml", "type: file\npath: ../" + tmp_path.name + "/a.yaml\n")
    with pytest.raises(UserError, match=r"lead in a circle: .*a\.yaml → .*b\.yaml → .*a\.yaml"):
        resolve(file(a))


def test_the_same_file_twice_is_no_circle(tmp_path):
    write(tmp_path / "a.yaml", "type: memmap\npath: x\n")
    both = {"type": "concatenated", "datasets": [{"type": "file", "path": "a.yaml"}] * 2}
    assert len(resolve(CONFIG.validate_python(both), tmp_path).datasets) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: memap\npath: x\n", r"bad\.yaml.*unknown dataset type 'memap' .*did you mean 'memmap'\?"),
        ("path: x\n", r"bad\.yaml.*a dataset needs a type \(one of file, memmap, "),
        ("type: memmap\npaht: x\n", r"bad\.yaml:2: unknown key 'paht'; did you mean 'path'\?"),
        ("type: fim\nrate: 0.5\n", r"bad\.yaml.*dataset type 'fim' cannot be used: fill-in-the-middle"),
        (
            "type: slice\nbegin: 1.5\ndataset: {type: random}\n",
            r"bad\.yaml:2: begin = 1.5: expected a number of at most 1",
        ),
        (
            "type: blended\nweights: [1, x]\ndatasets:\n- type: random\n- type: random\n",
            r"bad\.yaml:2: weights\.1 = 'x': expected a number",
        ),
        (
            "type: blended\nweights: [1]\ndatasets: [{type: random}, {type: random}]\n",
            r"1 weights for 2 datasets",
        ),
        ("config: {type: memmap}\nmetadata: {}\n", r"bad\.yaml.*path is missing"),
        ("training: {iterations: 3}\n", r"a dataset needs a type"),
        ("- a\n", r"bad\.yaml:1: found a list"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_dataset_file(write(tmp_path / "bad.yaml", text))


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "fast_llm_config_training.yaml", "type: random\n")
    with pytest.raises(UserError, match=r"nearest there: .*fast_llm_config_training\.yaml"):
        resolve(file("fast_llm_config_trianing.yaml"), tmp_path)


def test_a_folder_in_place_of_a_dataset_file(tmp_path):
    with pytest.raises(UserError, match=r"is a folder, not a dataset file$"):
        read_dataset_file(tmp_path)
    (tmp_path / "fast_llm_config_training.yaml").write_text("type: random")
    with pytest.raises(UserError, match=r"name one in it, as .*/fast_llm_config_training.yaml"):
        read_dataset_file(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="it is a token store: write type: memmap"):
        read_dataset_file(tmp_path)


@pytest.mark.parametrize("kind", ["file", "memmap"])
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt.gz", "texts.parquet"])
def test_texts_in_the_place_of_prepared_tokens(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_text('{"text": "x"}')
    config = TypeAdapter(DatasetConfig).validate_python({"type": kind, "path": str(tmp_path / name)})
    with pytest.raises(
        UserError, match=rf"{name} holds texts, not prepared tokens: run `modelyard prepare` on it"
    ):
        open_store(resolve(config).path)
