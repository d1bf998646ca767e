"""Hardware files, what is written on a command line, and how ranks lie on nodes; figures against the data sheets by hand."""

from __future__ import annotations

import pytest
import yaml

from modelyard.errors import UserError
from modelyard.plan.hardware import (
    ATTAINABLE,
    FOLDER,
    attainable,
    cluster_of,
    hardware_names,
    load_hardware,
    parse_rate,
    parse_size,
)
from modelyard.train.metrics import PEAK_BF16_FLOPS

NAMES = hardware_names()


def test_what_there_is() -> None:
    assert {"a100", "a100-40gb", "h100", "h200", "b200", "a6000"} <= set(NAMES)


def test_an_h100_by_its_data_sheet() -> None:
    h100 = load_hardware("h100")
    assert h100.title == "NVIDIA H100 SXM5 80 GB"
    assert h100.memory == 79 * 2**30
    assert h100.peaks == {
        "float32": 67e12,
        "tf32": 494.5e12,
        "bfloat16": 989e12,
        "float16": 989e12,
        "float8": 1979e12,
    }
    assert (h100.bandwidth, h100.link, h100.network) == (3.35e12, 450e9, 50e9)
    assert (h100.gpus_per_node, h100.processors) == (8, 132)
    assert h100.peak("float8") == 1979e12
    assert load_hardware("a100").peak("float8") is None
    assert load_hardware("A100_40GB").memory == 39 * 2**30


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_its_source(name: str) -> None:
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    figures = [
        values[key] for key in ("memory", "bandwidth", "link", "gpus_per_node", "network", "processors")
    ]
    for figure in [*figures, *values["peak"].values()]:
        assert set(figure) == {"value", "source"}
        assert len(figure["source"]) > 10
    hardware = load_hardware(name)
    # A tensor core's narrow dtypes are not slower than its wide ones.
    assert hardware.peaks["bfloat16"] == hardware.peaks["float16"] >= hardware.peaks["tf32"]
    assert hardware.peaks["tf32"] >= hardware.peaks["float32"]
    assert {"bandwidth", "peak bfloat16", "attainable matmul", "attainable latency.link"} <= set(
        hardware.sources
    )


def test_what_is_attainable_has_sources_and_is_less_than_all() -> None:
    for entry in yaml.safe_load(ATTAINABLE.read_text(encoding="utf-8")).values():
        for figure in [entry] if "value" in entry else entry.values():
            assert len(figure["source"]) > 10
    figures, _ = attainable("hopper")
    assert figures["matmul"] == 0.728
    assert figures["latency.network"] == 14e-6
    shares = ("matmul", "attention", "bandwidth", "link", "network", "together")
    assert all(0.2 < figures[name] < 1 for name in shares)


def test_the_peaks_of_mfu_are_those_of_the_files() -> None:
    """`modelyard train` reports MFU of the same peaks that the planner predicts it of."""
    compared = 0
    for name in NAMES:
        hardware = load_hardware(name)
        if hardware.torch_name in PEAK_BF16_FLOPS:
            assert hardware.peaks["bfloat16"] == PEAK_BF16_FLOPS[hardware.torch_name]
            compared += 1
    assert compared == len(NAMES)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        load_hardware("h10")
    assert str(error.value) == (
        "--gpu h10: there is no hardware of this name (there is: a100, a100-40gb, a6000, b200, h100, h200, l40s, rtx-4090, "
        "this-machine); did you mean 'h100'?"
    )


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50GB/s", 50e9),
        ("400Gb/s", 50e9),
        ("400Gbps", 50e9),
        ("400 Gbit/s", 50e9),
        ("12.5 GB/s", 12.5e9),
        ("1TB/s", 1e12),
        ("100Mbps", 12.5e6),
        ("900kB/s", 9e5),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["50", "50GB", "fast", "-1GB/s", "0GB/s", "", "50 Gxx/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(
        UserError, match=r"--network .*not a rate of data; write bytes as 50GB/s, or bits as 400Gb/s"
    ):
        parse_rate(text, "--network")


def test_sizes() -> None:
    assert parse_size("80GB") == 80 * 10**9
    assert parse_size("79 GiB") == 79 * 2**30
    assert parse_size("23.5 GiB") == 47 * 2**29
    for wrong in ("80", "GB", "0GB"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(wrong)


def test_clusters() -> None:
    h100 = load_hardware("h100")
    usual = cluster_of(h100, 20)
    assert (usual.gpus_per_node, usual.network, usual.nodes) == (8, 50e9, 3)
    other = cluster_of(h100, 20, gpus_per_node=4, network=1e9)
    assert (other.gpus_per_node, other.network, other.nodes) == (4, 1e9, 5)
    with pytest.raises(UserError, match="--gpus 0"):
        cluster_of(h100, 0)
    with pytest.raises(UserError, match="--gpus-per-node 0"):
        cluster_of(h100, 8, gpus_per_node=0)
