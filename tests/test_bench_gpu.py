"""The GPU benchmark, all of it on a tiny model on the CPU: its rows run, its checks can fail, it survives."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_gpu, bench_profile, bench_start, gpu_rows
from benchmarks.bench_gpu import Record, run_rows, supervise, table
from benchmarks.bench_profile import Ran, layers
from benchmarks.driving import Budget, OverBudget, Work, WrongReply, changes, make_work
from benchmarks.gpu_rows import ROWS, Bench, Measured, Row, drop_from_page_cache, popularity
from benchmarks.plain_path import Passage, plain_logits
from benchmarks.random_model import (
    ALL_16,
    ATTENTION_8_TO_64,
    ATTENTION_16,
    KINDS,
    LLAMA_3_1_8B,
    QV_8,
    TINY,
    RandomAdapters,
    kv_bytes,
    random_model,
    save_model,
    weight_bytes,
)
from engine.adapter_files import read_adapter, version_folder
from engine.packing import pack_adapter
from engine.weights import load_model

BY_NAME = {row.name: row for row in ROWS}


def tiny_bench(**settings: float) -> Bench:
    return Bench("cpu", tiny=True, say=lambda _: None, **settings)


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    """Every row once."""
    return {each["row"]: each for each in run_rows(tiny_bench(), ROWS) if "row" in each}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_measures_something(records: dict[str, Record], row: Row) -> None:
    record = records[row.name]
    assert "error" not in record, record["error"]
    assert record["figure"] == record["figure"]
    json.dumps(record, allow_nan=False)
    if record["unit"] in ("ms", "tok/s"):
        assert record["figure"] > 0
        assert record["ratio"] > 1, "faster than its bytes allow"


def test_outputs_hold_and_adapters_matter(records: dict[str, Record]) -> None:
    outputs = records["outputs"]
    assert outputs["reached"]
    assert records["logits"]["reached"]
    rows = outputs["details"]["rows"]
    assert outputs["details"]["replies_equal"] == outputs["details"]["distinct_replies"] == rows


def test_rows_find_adapters_where_they_say(records: dict[str, Record]) -> None:
    assert records["files-cold"]["details"]["adapters_found"] == {"disk": 12}
    assert records["files-cold"]["details"]["read_bytes_per_s_alone"] > 0
    assert records["host-warm"]["details"]["adapters_found"]["host"] > 0
    found = records["first-token"]["details"]["found"]
    assert {name: set(tiers) for name, tiers in found.items()} == {
        "device": {"device"},
        "host": {"host"},
        "disk": {"disk"},
        "prefetched": {"device"},
    }


class WrongAdapters(RandomAdapters):
    """Gives the engine another adapter's weights than it asks for."""

    def read(self, ref):  # type: ignore[no-untyped-def]
        kind = KINDS[int(ref.id[:2], 16)]
        return super().read(self.ref(kind, int(ref.id[2:], 16) + len(kind.ranks)))


@pytest.mark.parametrize("name", ["outputs", "logits"])
def test_an_engine_that_mixes_up_adapters_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny_bench()
    bench._adapters["8b"] = WrongAdapters(TINY, torch.float32)
    bench.engine()
    bench._adapters["8b"] = RandomAdapters(TINY, torch.float32)
    measured = BY_NAME[name].run(bench)
    assert not measured.reached
    assert measured.figure > 100 * measured.target


def test_a_row_that_raises_is_an_error_and_the_others_go_on() -> None:
    def broken(bench: Bench) -> Measured:
        bench.engine()
        raise ValueError("no such luck")

    rows = [Row("broken", "raises", "–", broken), BY_NAME["decode32"]]
    records = [each for each in run_rows(tiny_bench(), rows) if "row" in each]
    assert records[0]["error"] == "ValueError: no such luck"
    assert records[1]["figure"] > 0
    text = table(records, outputs_hold=True)
    assert "broken: ValueError: no such luck" in text
    assert "decode32" in text


def test_a_row_over_its_budget_is_an_error() -> None:
    records = [r for r in run_rows(tiny_bench(budget_s=0.0), [BY_NAME["throughput64"]]) if "row" in r]
    assert "expected to be done within 0 s" in records[0]["error"]


def test_a_target_is_missed_on_the_wrong_side_or_if_a_condition_fails() -> None:
    assert Measured(4.0, "ms", 5.0).reached
    assert not Measured(6.0, "ms", 5.0).reached
    assert Measured(6.0, "tok/s", 5.0, lower_is_better=False).reached
    assert not Measured(4.0, "tok/s", 5.0, lower_is_better=False).reached
    assert not Measured(4.0, "ms", 5.0, holds=False).reached
    assert not Measured(float("nan"), "ms", 5.0).reached


def test_wrong_outputs_take_back_what_was_reached() -> None:
    record: Record = {
        "row": "decode32",
        "title": "",
        "peer": "–",
        "reached": True,
        "ratio": 1.2,
        "floor": 3.5,
    }
    record |= {"figure": 4.2, "unit": "ms", "target": 4.6, "lower_is_better": True}
    assert table([record], outputs_hold=True).splitlines()[-1].endswith("yes")
    assert table([record], outputs_hold=False).splitlines()[-1].endswith("no")


CHILD = """
import json, os, signal, sys, time
with open(sys.argv[1], "a") as lines:
    for name in sys.argv[2].split(","):
        print(json.dumps({"began": name}), file=lines, flush=True)
        if name == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "hangs":
            time.sleep(60)
        print(json.dumps({"row": name, "figure": 1.0}), file=lines, flush=True)
        if name == "last of this process":
            break
"""


def supervised(program: str, names: Sequence[str]) -> dict[str, Record]:
    def command(rows: Sequence[str], lines: Path) -> list[str]:
        return [sys.executable, "-c", program, str(lines), ",".join(rows)]

    found = list(supervise(names, command, start_s=60.0, row_s=5.0))
    assert [each["row"] for each in found] == list(names)
    return {each["row"]: each for each in found}


def test_rows_survive_a_crash_a_hang_and_an_early_end_of_others() -> None:
    found = supervised(CHILD, ["a", "crashes", "b", "hangs", "last of this process", "c"])
    assert found["crashes"]["error"] == "its process ended with -11"
    assert found["hangs"]["error"] == "did not come back and was ended"
    assert all(found[name] == {"row": name, "figure": 1.0} for name in ("a", "b", "c"))


def test_a_child_that_cannot_begin_costs_its_rows_once() -> None:
    found = supervised("raise SystemExit(3)", ["a", "b"])
    assert {each["error"] for each in found.values()} == {"its process ended with 3"}


def test_the_command_writes_what_it_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "run.json"
    bench_gpu.main(["--tiny", "--rows", "decode32", "--out", str(out), "--commit", "abc1234"])
    printed = capfd.readouterr().out
    written = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == written
    assert written["commit"] == "abc1234"
    assert written["rows"]["decode32"]["figure"] > 0
    assert written["copy_bytes_per_s"] > 0
    assert "decode32" in printed.split("best peer")[1]


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main(["--tiny", "--rows", "decode33"])
    assert "decode33" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_gpu.main(["--only-write"])
    assert "expected --files" in capsys.readouterr().err
    bench_gpu.main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)


def test_a_profile_names_what_was_run_with_adapters_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tiny", "--requests", "8", "--adapters", "4", "--lines", "2", "--layer", "aten::scaled_dot"]
    bench_profile.main(flags)
    *shown, last = capsys.readouterr().out.splitlines()
    runs = json.loads(last)["runs"]
    assert list(runs) == ["without adapters", "4 adapters"]
    for run in runs.values():
        assert run["steps"] > 0
        times = [kernel["ms_per_step"] for kernel in run["kernels"]]
        assert times == sorted(times, reverse=True)
        assert any("linear" in kernel["kernel"] for kernel in run["kernels"])
        assert any(run["kernels"][0]["kernel"] in line for line in shown)
        assert len(run["layers"]) == 3
        for layer in run["layers"]:
            assert layer[0]["kernel"].startswith("aten::scaled_dot")
            assert layer[0]["at"] == 0
            assert layer[-1]["kernel"] in " ".join(shown)


def test_layers_are_cut_out_of_what_ran_by_their_first_kernel() -> None:
    ran = [Ran("a", 0, 1, 7), Ran("b", 9, 1, 7), Ran("c", 4, 2, 8), Ran("a", 10, 1, 7), Ran("a", 13, 1, 7)]
    assert layers(ran, "a", (0.0, 0.5)) == [
        [Ran("a", 0, 1, 7)],
        [Ran("a", 0, 1, 7), Ran("c", 4, 2, 8), Ran("b", 9, 1, 7)],
    ]
    assert layers(ran, "b", (0.5,)) == []


def test_a_start_is_measured_phase_by_phase(tmp_path: Path) -> None:
    bench_start.main(["--tiny", "--starts", "1", "--where", str(tmp_path), "--out", str(tmp_path / "s.json")])
    phases = json.loads((tmp_path / "s.json").read_text())["starts"][0]
    assert list(phases) == ["imports", "model", "engine", "first_token", "eighth_token"]
    assert sorted(phases.values()) == list(phases.values())
    assert not list(tmp_path.glob("model-*"))


def test_a_saved_random_model_loads_as_it_was(tmp_path: Path) -> None:
    config = replace(LLAMA_3_1_8B, vocab_size=96, hidden_size=32, num_layers=9, num_heads=4, num_kv_heads=2)
    config = replace(config, head_dim=8, intermediate_size=48)
    model = random_model(config, device="cpu", dtype=torch.bfloat16)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.config == config
    ours, theirs = model.decoder.state_dict(), loaded.decoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_adapters_are_distinct_and_written_as_they_are_read(tmp_path: Path) -> None:
    adapters = RandomAdapters(TINY, torch.bfloat16)
    one, other = (adapters.read(ref) for ref in adapters.refs(ATTENTION_16, 2))
    for left, right in zip(one.modules, other.modules, strict=True):
        assert not torch.equal(left.a, right.a)
        assert not torch.equal(left.b, right.b)
        assert left.b.any()
    refs = adapters.refs(ATTENTION_8_TO_64, 4)
    assert [adapters.read(ref).modules[0].rank for ref in refs] == [64, 32, 16, 8]
    adapters.write(tmp_path, refs, threads=2)
    for ref in refs:
        stored = read_adapter(version_folder(tmp_path, ref.id, 1), TINY)
        for left, right in zip(adapters.read(ref).modules, stored.modules, strict=True):
            assert torch.equal(left.a.float(), right.a.float())
            assert torch.equal(left.b.float(), right.b.float())
            assert left.scale == pytest.approx(right.scale)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_bytes_of_an_adapter_are_those_of_its_tiles(kind) -> None:  # type: ignore[no-untyped-def]
    adapters = RandomAdapters(TINY, torch.bfloat16)
    ref = adapters.ref(kind, 1)
    packed = pack_adapter(adapters.read(ref), TINY, 1 << 14, torch.bfloat16)
    assert adapters.nbytes(ref) == packed.layout.tile_elems * 2


def test_bytes_of_the_8b_shape() -> None:
    adapters = RandomAdapters(LLAMA_3_1_8B, torch.bfloat16)
    assert kv_bytes(LLAMA_3_1_8B, 2) == 128 << 10
    assert weight_bytes(LLAMA_3_1_8B, 2) == pytest.approx(15.0e9, rel=0.01)
    assert adapters.nbytes(adapters.ref(ATTENTION_16, 0)) == 26 << 20
    assert adapters.nbytes(adapters.ref(ALL_16, 0)) == 80 << 20
    assert adapters.nbytes(adapters.ref(QV_8, 0)) == pytest.approx(6.8e6, rel=0.01)


def test_the_plain_path_is_causal_and_knows_adapters() -> None:
    model = random_model(TINY, device="cpu", dtype=torch.float32)
    adapters = RandomAdapters(TINY, torch.float32)
    lora = adapters.read(adapters.ref(ALL_16, 0))
    tokens = tuple(range(1, 20))
    whole, begin, adapted = plain_logits(
        model,
        [Passage(tokens, None, 19), Passage(tokens[:10], None, 1), Passage(tokens, lora, 19)],
        torch.float32,
    )
    torch.testing.assert_close(begin[0], whole[9])
    assert (whole - adapted).abs().amax(-1).min() > 0.5
    assert 0.5 < whole.std() < 2


def test_popularities_are_punicas() -> None:
    assert [len(set(popularity(name, 64))) for name in ("distinct", "uniform", "skewed", "identical")] == [
        64, 8, 9, 1,
    ]  # fmt: skip
    assert len(set(popularity("skewed", 1024))) == 16
    assert all(len(popularity(name, 37)) == 37 for name in ("distinct", "uniform", "skewed", "identical"))


def test_a_reply_that_ends_otherwise_than_asked_for_gives_no_figure() -> None:
    bench = tiny_bench()
    driven = bench.engine()
    missing = bench.adapters().ref(ATTENTION_16, 0)
    driven.engine._adapters._load = lambda ref: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(WrongReply, match="ZeroDivisionError"):
        driven.run([Work((1, 2, 3), 2, missing)])


def test_a_budget_ends() -> None:
    Budget(60.0).check()
    with pytest.raises(OverBudget):
        Budget(0.0).check()


def test_work_is_the_same_for_the_same_seed_and_shares_no_beginning() -> None:
    work = make_work(512, [(8, 2)] * 50, [None], seed=3)
    assert work == make_work(512, [(8, 2)] * 50, [None], seed=3)
    assert len({each.prompt[:3] for each in work}) == 50


def test_changes_are_differences_of_numbers() -> None:
    assert changes({"a": 1, "b": {"c": 2.0}}, {"a": 4, "b": {"c": 2.5}, "d": "x"}) == {
        "a": 3, "b": {"c": 0.5}, "d": "x",
    }  # fmt: skip


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    with path.open("rb") as file:
        cached = gpu_rows._in_page_cache(file.fileno(), 1 << 20)
    assert cached == (256, 256)
    assert 0.0 <= drop_from_page_cache([path]) <= 1.0
