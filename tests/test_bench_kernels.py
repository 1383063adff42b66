"""bench_kernels on a tiny model: it checks what it times, and one failure does not end it."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.bench_kernels import Case, cases, make_bench, run
from benchmarks.peer_kernels import load_peers, make_stacks


def options(**changed: object) -> argparse.Namespace:
    plain = {"rows": [2], "ranks": [8], "popularities": ["distinct"], "vllm": None, "sglang": None}
    return argparse.Namespace(**{**plain, "compilers": 0, "budget": 600.0, "tiny": True, **changed})


def test_a_tiny_run_measures_and_checks_our_kernels() -> None:
    (case,) = run(options())["cases"]
    assert case["adapters"] == 2
    assert case["floor_us"] > 0
    assert 0 < case["ours"]["error"] < 1e-3
    assert case["ours"]["layer_us"] > 0
    assert {"seconds_us", "shrink_us", "resolve_us", "host_us"} <= case["ours"].keys()


def test_wrong_outputs_are_an_error_of_their_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.lora.resolve", lambda *args: None)  # tiles are looked up nowhere
    (case,) = run(options(rows=[1]))["cases"]
    assert "ArithmeticError" in case["ours"]["error"]


def test_a_single_row_is_measured_once() -> None:
    found = list(cases(options(rows=[1, 4], ranks=[8, 16], popularities=["uniform", "identical"])))
    assert found[:3] == [Case(1, 8, "uniform"), Case(1, 16, "uniform"), Case(4, 8, "uniform")]
    assert len(found) == 6


def test_the_floor_is_the_bytes_of_each_adapter_at_the_copy_bandwidth() -> None:
    bench = make_bench(True, 2, 8)
    sides = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 96) * 3
    assert bench.floor(3, 5) == pytest.approx(3 * 8 * sides * 4 / bench.bandwidth)


def test_a_peer_that_is_not_there_is_named(tmp_path: Path) -> None:
    peers, errors = load_peers(tmp_path, tmp_path, torch.device("cpu"))
    assert not peers
    assert set(errors) == {"vllm", "sglang csgmv", "sglang v2"}
    assert "expected vllm/lora/ops/triton_ops" in errors["vllm"]


def test_stacks_are_cut_from_the_memory_there_is() -> None:
    memory = torch.arange(5000.0)
    shapes = [(16, (16, 8, 8)), (16, (24,))]
    stacks = make_stacks(memory, 2, 8, 3, shapes)
    assert [len(layer) for layer in stacks] == [2, 2, 2]
    for layer in stacks:
        for stack, (side, widths) in zip(layer, shapes, strict=True):
            assert stack.a.numel() == 2 * len(widths) * 8 * side
            assert stack.b.numel() == 2 * sum(widths) * 8
            assert stack.a.is_contiguous()
