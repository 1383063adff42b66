"""The engine on a real tiny Llama with real adapters: what a reply says depends on
nothing but its request.
"""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from engine.adapter_files import (
    META_FILE,
    LoraModule,
    LoraWeights,
    StoredWeights,
    read_stored,
    version_folder,
    write_adapter,
)
from engine.config import ConfigError, EngineConfig
from engine.engine import (
    ContextExceeded,
    DuplicateRequest,
    Engine,
    MakeDevice,
    Overloaded,
    TokenOutOfRange,
    error_code,
    make_runner,
)
from engine.model import MODULES, ModelConfig, module_shape
from engine.pages import BrokenBooks
from engine.request import AdapterRef, Event, FinishedEvent, Request, SamplingParams, TokensEvent
from engine.runner import Ran, Runner
from engine.scheduler import ArenaExceeded
from engine.weights import LoadedModel, load_model
from tests.late_device import COPY_STEPS, BesideHost, Late
from tests.tiny_models import VOCAB, save_random

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=12, ignore_eos=True)
ADA, ADA2, BOB, CYD = (
    AdapterRef("ada0", 1),
    AdapterRef("ada0", 2),
    AdapterRef("b0b0", 1),
    AdapterRef("c1d0", 1),
)
BAD = AdapterRef("bad0", 1)
SLAB_BYTES = 3 * 2 * 2 * 12 * 4 * 16  # layers × (K, V) × heads × head_dim × fp32 × block of 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    save_random(folder, shape)
    return load_model(folder)


def random_adapter(
    config: ModelConfig, seed: int, rank: int = 4, modules: Iterable[str] = MODULES
) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for layer in range(config.num_layers):
        for module in MODULES:
            if module in modules:
                outputs, inputs = module_shape(config, module)
                a = torch.randn(rank, inputs, generator=generator) * 0.2
                b = torch.randn(outputs, rank, generator=generator) * 0.2
                made.append(LoraModule(layer, module, a, b, 2.0))
    return LoraWeights(tuple(made))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: LoadedModel) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for ref, weights in {
        ADA: random_adapter(model.config, 1),
        ADA2: random_adapter(model.config, 2),
        BOB: random_adapter(model.config, 3, rank=16, modules=("q_proj", "v_proj")),
        CYD: random_adapter(model.config, 4, rank=9, modules=("down_proj", "o_proj")),
        BAD: random_adapter(model.config, 5),
    }.items():
        write_adapter(version_folder(root, ref.id, ref.version), weights, model.config, base_model="tiny")
    (version_folder(root, BAD.id, BAD.version) / "adapter_model.safetensors").write_bytes(b"not safetensors")
    return root


Build = Callable[..., Engine]


@pytest.fixture(params=[make_runner, BesideHost], ids=["at once", "one step ahead"])
def build(model: LoadedModel, adapters: Path, request: pytest.FixtureRequest) -> Iterator[Build]:
    """Engines of this test; each must end with clean books."""
    engines: list[Engine] = []

    def make(
        root: Path = adapters,
        make_device: MakeDevice = request.param,
        read: Callable[[AdapterRef], LoraWeights] | None = None,
        **config: object,
    ) -> Engine:
        settings = {"arena_bytes": 200 * SLAB_BYTES, "max_tokens_per_step": 64, "max_running": 32, **config}
        checked = EngineConfig.from_mapping(settings)
        engines.append(Engine(checked, model, root, read=read, make_device=make_device))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(VOCAB) for _ in range(length))


def ask(
    id: str, length: int = 20, sampling: SamplingParams = GREEDY, adapter: AdapterRef | None = None
) -> Request:
    return Request(id, prompt(length, seed=sum(map(ord, id))), sampling, adapter, user_key=id)


class Replies:
    """Collects events; checks that output indices are gapless and that nothing follows the end."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self.tokens = {request.id: list(request.generated) for request in requests}
        self.finished: dict[str, FinishedEvent] = {}

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            assert event.request_id not in self.finished
            if isinstance(event, TokensEvent):
                written = self.tokens.setdefault(event.request_id, [])
                assert event.first_index == len(written)
                written += event.token_ids
            else:
                self.finished[event.request_id] = event


def answer(engine: Engine, *requests: Request) -> Replies:
    replies = Replies(requests)
    for request in requests:
        engine.submit(request)
    replies.take(engine.drain())
    assert not engine.has_work
    engine.check_integrity()
    return replies


def alone(build: Build, request: Request) -> list[int]:
    """The reference: this request by itself on a fresh engine that works step by step."""
    return answer(build(make_device=make_runner), request).tokens[request.id]


MIXED = [
    ask("base", 5),
    ask("ada", 33, adapter=ADA),
    ask("ada2", 33, adapter=ADA2),
    ask("bob", 70, SEEDED, BOB),
    ask("cyd", 1, SEEDED, CYD),
    ask("base seeded", 40, SEEDED),
    ask("long", 130, adapter=BOB),
]


# Independence


def test_each_reply_of_a_mixed_batch_is_the_one_it_gets_alone(build: Build) -> None:
    together = answer(build(), *MIXED)
    for request in MIXED:
        assert together.tokens[request.id] == alone(build, request), request.id
        assert len(together.tokens[request.id]) == request.sampling.max_tokens
        assert together.finished[request.id].reason == "length"


def test_the_adapter_and_its_version_change_what_is_said(build: Build) -> None:
    asked = [replace(MIXED[1], id=str(ref), adapter=ref) for ref in (None, ADA, ADA2, BOB)]
    replies = answer(build(), *asked)
    assert len({tuple(tokens) for tokens in replies.tokens.values()}) == 4


def test_greedy_tokens_are_those_of_transformers(build: Build, model: LoadedModel, tmp_path: Path) -> None:
    save_random(tmp_path, transformers.LlamaConfig(**_reference_shape(model.config)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = list(MIXED[0].prompt)
    with torch.inference_mode():
        for _ in range(12):
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert alone(build, MIXED[0]) == tokens[5:]


def _reference_shape(config: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def test_prompt_chunks_of_any_size_change_no_token(build: Build) -> None:
    expected = alone(build, MIXED[6])
    for budget in (1, 7, 200):
        engine = build(max_tokens_per_step=budget, max_running=1)
        assert answer(engine, MIXED[6]).tokens["long"] == expected


def test_preemption_under_a_tiny_arena_changes_no_token(build: Build) -> None:
    requests = [
        ask(f"r{i}", 30, replace(SEEDED if i % 2 else GREEDY, max_tokens=40), (None, ADA, BOB)[i % 3])
        for i in range(6)
    ]
    reference = answer(build(), *requests)
    for prefix_cache in (True, False):
        engine = build(arena_bytes=24 * SLAB_BYTES, prefix_cache=prefix_cache)
        answer(engine, *(ask(f"load {ref}", 1, replace(GREEDY, max_tokens=1), ref) for ref in (ADA, BOB)))
        replies = answer(engine, *requests)  # the adapters are there, so all six meet
        assert engine.stats().queue["preemptions"] > 0
        assert replies.tokens == reference.tokens


def test_a_prefix_hit_changes_no_token(build: Build) -> None:
    engine = build()
    for request in (MIXED[1], MIXED[3], MIXED[5]):
        first = answer(engine, request)
        again = answer(engine, replace(request, id="again"))
        assert again.tokens["again"] == first.tokens[request.id]
        assert first.finished[request.id].usage.cached_tokens == 0
        assert again.finished["again"].usage.cached_tokens == (len(request.prompt) - 1) // 16 * 16
    assert engine.stats().prefix["hit_tokens"] == 32 + 64 + 32


def test_the_next_turn_finds_the_reply_before_it_in_the_prefix_cache(build: Build) -> None:
    engine = build()
    first = ask("turn 1", 30, replace(GREEDY, max_tokens=40), ADA)
    written = answer(engine, first).tokens["turn 1"]
    second = replace(first, id="turn 2", prompt=(*first.prompt, *written, *prompt(5)))
    assert answer(engine, second).finished["turn 2"].usage.cached_tokens == 64


def test_what_a_reply_that_goes_on_had_written_before_is_no_part_of_its_cached_prompt(build: Build) -> None:
    engine = build()
    first = ask("first", 30, replace(GREEDY, max_tokens=40), ADA)
    written = answer(engine, first).tokens["first"]
    usage = answer(engine, replace(first, id="again", generated=tuple(written[:-2]))).finished["again"].usage
    assert engine.stats().prefix["hit_tokens"] == 64
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (30, 30, 40)


def test_no_prefix_is_shared_with_another_version(build: Build) -> None:
    engine = build()
    answer(engine, MIXED[1])
    other = replace(MIXED[1], adapter=ADA2)
    replies = answer(engine, other)
    assert replies.finished["ada"].usage.cached_tokens == 0
    assert replies.tokens["ada"] == alone(build, other)


def test_a_running_reply_finishes_on_its_version_while_the_next_uses_the_new_one(build: Build) -> None:
    engine = build()
    old = replace(MIXED[1], id="old", sampling=replace(GREEDY, max_tokens=30))
    new = replace(old, id="new", adapter=ADA2)
    replies = Replies([old, new])
    engine.submit(old)
    while len(replies.tokens["old"]) < 10:
        replies.take(engine.step())
    engine.prefetch(ADA2)
    engine.submit(new)
    replies.take(engine.drain())
    assert replies.tokens["old"] == alone(build, old)
    assert replies.tokens["new"] == alone(build, new)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("already", [1, 5, 11])
def test_a_reply_resumed_on_another_engine_goes_on_the_same(
    build: Build, already: int, sampling: SamplingParams
) -> None:
    request = ask("ada", 40, sampling, ADA)
    whole = alone(build, request)
    resumed = answer(build(), replace(request, generated=tuple(whole[:already])))
    assert resumed.tokens["ada"] == whole
    assert resumed.finished["ada"].usage.completion_tokens == len(whole)


def test_a_reply_lost_between_its_last_token_and_its_end_only_ends(build: Build) -> None:
    engine = build()
    engine.submit(replace(MIXED[0], generated=tuple(range(12))))
    (event,) = engine.drain()
    assert isinstance(event, FinishedEvent)
    assert (event.reason, event.usage.completion_tokens) == ("length", 12)


# Ending


def test_a_stop_token_ends_the_reply_and_is_not_part_of_it(build: Build) -> None:
    whole = alone(build, MIXED[5])
    stop = whole[6]
    request = replace(MIXED[5], sampling=replace(SEEDED, stop_token_ids=(stop,)))
    replies = answer(build(), request)
    assert replies.tokens[request.id] == whole[: whole.index(stop)]
    assert replies.finished[request.id].reason == "stop"
    assert replies.finished[request.id].timings.first_token_s is not None
    at_once = replace(request, sampling=replace(SEEDED, stop_token_ids=(whole[0],)))
    replies = answer(build(), at_once)
    assert replies.tokens[request.id] == []
    assert replies.finished[request.id].timings.first_token_s is None


def test_the_models_own_end_token_ends_the_reply_unless_ignored(
    model: LoadedModel, adapters: Path, build: Build
) -> None:
    whole = alone(build, MIXED[5])
    ending = replace(model, config=replace(model.config, eos_token_ids=(whole[3],)))
    engine = Engine(EngineConfig(arena_bytes=100 * SLAB_BYTES), ending, adapters)
    heeding = replace(MIXED[5], id="heeding", sampling=replace(SEEDED, ignore_eos=False))
    replies = answer(engine, MIXED[5], heeding)
    assert replies.tokens["heeding"] == whole[: whole.index(whole[3])]
    assert replies.finished["heeding"].reason == "stop"
    assert replies.tokens["base seeded"] == whole
    engine.close()


def test_a_top_p_that_no_float32_holds_takes_the_likeliest_token(build: Build) -> None:
    greedy = alone(build, replace(MIXED[5], sampling=GREEDY))
    engine = build()
    tiny = replace(MIXED[5], sampling=replace(SEEDED, top_p=1e-50))
    assert answer(engine, tiny).tokens[tiny.id] == greedy
    assert engine.stats().step["failed_batches"] == 0


def test_cancel_frees_pages_and_unpins_the_adapter(build: Build) -> None:
    engine = build(prefix_cache=False)
    engine.submit(MIXED[6])
    other = Replies([MIXED[0]])
    engine.submit(MIXED[0])
    while engine.stats().queue["running"] != 2:
        other.take(engine.step())
    assert engine.stats().pages["kv"] >= 9
    engine.cancel("long")
    engine.cancel("never was")
    assert engine.stats().pages["kv"] == 1
    assert engine.stats().pages["adapter"] == engine.stats().pages["adapter_idle"] > 0
    other.take(engine.drain())
    assert other.finished["long"].reason == "cancelled"
    assert other.tokens["base"] == alone(build, MIXED[0])


# Refusals and failures


def test_a_request_longer_than_the_context_is_refused_at_submit(build: Build) -> None:
    engine = build()
    with pytest.raises(ContextExceeded, match=r"prompt of 250 tokens \+ max_tokens 12: expected at most 256"):
        engine.submit(ask("long", 250))
    assert not engine.has_work


def test_a_request_larger_than_the_arena_is_refused_at_submit(build: Build) -> None:
    with pytest.raises(ArenaExceeded, match="needs 13 slabs of device memory, the arena has 8"):
        build(arena_bytes=8 * SLAB_BYTES).submit(ask("long", 190))


def test_a_token_outside_the_vocabulary_is_refused_at_submit(build: Build) -> None:
    with pytest.raises(TokenOutOfRange, match="expected 0 to 96, got 97"):
        build().submit(Request("a", (1, 97), GREEDY))


def test_an_id_in_use_is_refused_and_a_used_one_is_not(build: Build) -> None:
    engine = build()
    engine.submit(MIXED[0])
    with pytest.raises(DuplicateRequest):
        engine.submit(MIXED[0])
    list(engine.drain())
    assert answer(engine, MIXED[0]).finished["base"].reason == "length"


def test_a_full_queue_refuses(build: Build) -> None:
    engine = build(max_waiting=2)
    engine.submit(ask("a"))
    engine.submit(ask("b"))
    with pytest.raises(Overloaded, match="fewer than 2"):
        engine.submit(ask("c"))
    list(engine.drain())


@pytest.mark.parametrize("broken", [BAD, AdapterRef("ada0", 9), AdapterRef("not hex", 1)], ids=str)
def test_a_bad_adapter_hurts_only_its_own_request(build: Build, broken: AdapterRef) -> None:
    engine = build()
    replies = answer(engine, *MIXED, ask("broken", adapter=broken))
    assert replies.finished["broken"].reason == "error"
    assert replies.finished["broken"].error_code == "adapter_unavailable"
    assert str(broken) in (replies.finished["broken"].message or "")
    assert replies.tokens["broken"] == []
    assert all(replies.finished[request.id].reason == "length" for request in MIXED)


def test_an_adapter_answers_on_the_base_it_was_made_for_alone(
    build: Build, model: LoadedModel, adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    shutil.copytree(adapters / ADA.id, root / ADA.id)
    meta = version_folder(root, ADA.id, ADA.version) / META_FILE
    engine = build(root, failed_load_retry_s=0.0)
    for text in ('{"base_hash": "another"}', "[]", "{"):
        meta.write_text(text)
        assert answer(engine, MIXED[1]).finished["ada"].error_code == "adapter_unavailable", text
    meta.write_text(json.dumps({"base_hash": model.base_hash}))
    assert answer(engine, MIXED[1]).tokens["ada"] == alone(build, MIXED[1])


def test_an_adapter_that_was_missing_is_found_once_it_is_there(
    build: Build, adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "adapters"
    root.mkdir()
    engine = build(root, failed_load_retry_s=0.0)
    assert answer(engine, MIXED[1]).finished["ada"].error_code == "adapter_unavailable"
    shutil.copytree(adapters / ADA.id, root / ADA.id)
    assert answer(engine, MIXED[1]).tokens["ada"] == alone(build, MIXED[1])


def test_an_error_of_the_device_fails_only_the_rows_that_cause_it(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Runner.launch

    def failing(self: Runner, batch: object) -> Ran:
        if any(adapter.ref == CYD for adapter in batch.adapters):  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("no room for c1d0")
        return launch(self, batch)  # type: ignore[arg-type]

    expected = {request.id: alone(build, request) for request in MIXED}
    monkeypatch.setattr(Runner, "launch", failing)
    engine = build()
    replies = answer(engine, *MIXED)
    assert replies.finished["cyd"].error_code == "out_of_memory"
    assert replies.finished["cyd"].message == "no room for c1d0"
    for request in MIXED:
        if request.id != "cyd":
            assert replies.tokens[request.id] == expected[request.id]
    assert engine.stats().step["failed_batches"] == 2


@pytest.mark.parametrize("tokens_per_step", [512, 16], ids=["at once", "in chunks"])
def test_logits_that_are_not_finite_end_their_own_request_and_leave_no_kv_behind(
    model: LoadedModel, build: Build, tokens_per_step: int
) -> None:
    def read(ref: AdapterRef) -> LoraWeights:
        weights = random_adapter(model.config, 1)
        if ref == ADA:
            return LoraWeights(tuple(replace(module, a=module.a * 1e36) for module in weights.modules))
        return weights

    engine = build(read=read, max_tokens_per_step=tokens_per_step)
    broken = replace(MIXED[1], id="broken")
    replies = answer(engine, MIXED[0], broken, MIXED[2])
    assert replies.finished["broken"].error_code == "engine_failure"
    assert "expected finite logits" in (replies.finished["broken"].message or "")
    for request in (MIXED[0], MIXED[2]):
        expected = answer(build(read=read, make_device=make_runner), request).tokens[request.id]
        assert replies.tokens[request.id] == expected
    again = answer(engine, replace(MIXED[1], id="again"))
    assert again.finished["again"].usage.cached_tokens == 0


def test_a_request_cancelled_before_its_logits_are_known_leaves_no_bad_kv_behind(
    model: LoadedModel, build: Build
) -> None:
    weights = LoraWeights(
        tuple(replace(module, a=module.a * 1e36) for module in random_adapter(model.config, 1).modules)
    )
    engine = build(read=lambda ref: weights)
    engine.prefetch(ADA)
    while not engine.stats().adapters["resident"]:
        engine.step()
    engine.submit(MIXED[1])
    while not engine.stats().step["steps"]:
        engine.step()
    engine.cancel(MIXED[1].id)
    list(engine.drain())
    again = answer(engine, replace(MIXED[1], id="again"))
    assert again.finished["again"].usage.cached_tokens == 0


def test_an_error_of_a_step_under_way_is_the_devices_and_ends_the_engine(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(step: object) -> list[int]:
        raise torch.AcceleratorError("the device is lost")

    monkeypatch.setattr(Ran, "tokens", lost)
    monkeypatch.setattr(Late, "tokens", lost)
    engine = build()
    engine.submit(MIXED[0])
    with pytest.raises(torch.AcceleratorError, match="the device is lost"):
        list(engine.drain())


def test_a_step_that_cannot_be_prepared_ends_the_preparing_and_not_the_engine(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [torch.AcceleratorError("the device is lost"), torch.OutOfMemoryError("full")]

    def prepare(device: object) -> bool:
        raise errors.pop(0)

    monkeypatch.setattr(Runner, "prepare", prepare)
    monkeypatch.setattr(BesideHost, "prepare", prepare)
    engine = build()
    with pytest.raises(torch.AcceleratorError):
        engine.prepare()
    assert not engine.prepare()
    assert "steps are not prepared any more" in caplog.text
    assert not engine.prepare()
    assert answer(engine, MIXED[0]).tokens == {MIXED[0].id: alone(build, MIXED[0])}


def test_errors_have_names() -> None:
    assert error_code(MemoryError()) == "out_of_memory"
    assert error_code(RuntimeError("CUDA error")) == "engine_failure"
    assert error_code(ContextExceeded(1, 1, 1)) == "context_length_exceeded"


def test_a_block_too_small_for_an_adapters_tile_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="block_size: expected 5 or more"):
        build(block_size=4)


def test_an_arena_of_less_than_two_slabs_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="arena_bytes"):
        build(arena_bytes=SLAB_BYTES)


# A device one step behind the host


def test_a_token_that_came_after_the_end_is_dropped_and_its_pages_were_free_at_once(
    build: Build,
) -> None:
    whole = alone(build, MIXED[5])
    stop = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    engine = build(make_device=BesideHost, prefix_cache=False)
    engine.submit(replace(MIXED[5], sampling=replace(SEEDED, stop_token_ids=(stop,))))
    events: list[Event] = []
    while not events or not isinstance(events[-1], FinishedEvent):
        events += engine.step()
        engine.check_integrity()
    assert engine.has_work
    assert not engine.is_stalled
    assert engine.stats().pages["kv"] == 0
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().step["rows"] == 2 + whole.index(stop)  # one more than the tokens needed


def test_no_step_is_spent_on_a_reply_whose_last_allowed_token_is_being_drawn(build: Build) -> None:
    engine = build(make_device=BesideHost)
    answer(engine, MIXED[0])
    assert engine.stats().step["rows"] == GREEDY.max_tokens


def test_a_copy_under_way_holds_up_nobody_but_who_would_be_alone(build: Build) -> None:
    engine = build(make_device=BesideHost)
    device = engine._device
    assert isinstance(device, BesideHost)
    answer(engine, MIXED[1])
    assert device.waited_for_copies == COPY_STEPS  # nobody else was there: it ran behind its copy
    engine.submit(replace(MIXED[0], sampling=replace(GREEDY, max_tokens=40)))
    engine.submit(MIXED[3])
    list(engine.drain())
    assert device.waited_for_copies == COPY_STEPS
    assert engine.stats().adapters["copies"] == 2


# Adapters between the tiers


def test_a_step_does_not_wait_for_a_load(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(folder: Path, config: ModelConfig, take: Callable[[int], torch.Tensor]) -> StoredWeights:
        assert gate.wait(30)
        return read_stored(folder, config, take)

    monkeypatch.setattr("engine.engine.read_stored", slow)
    engine = build()
    replies = Replies([MIXED[0], MIXED[1]])
    engine.submit(MIXED[1])
    engine.submit(MIXED[0])
    while "base" not in replies.finished:
        replies.take(engine.step())
    assert replies.tokens["ada"] == []
    assert engine.is_stalled
    assert engine.stats().queue["loading"] == 1
    gate.set()
    replies.take(engine.drain())
    timings = replies.finished["ada"].timings
    assert timings.adapter_tier == "disk"
    assert 0 < timings.adapter_load_s <= timings.queued_s
    assert replies.finished["base"].timings.adapter_tier == "none"


def test_a_prefetched_adapter_is_on_the_device_when_its_request_comes(build: Build) -> None:
    engine = build()
    loaded = threading.Event()
    engine.on_load = loaded.set
    engine.prefetch(ADA)
    assert loaded.wait(30)
    assert engine.has_work
    assert engine.step() == []
    timings = answer(engine, MIXED[1]).finished["ada"].timings
    assert (timings.adapter_tier, timings.adapter_load_s) == ("device", 0.0)


def test_more_adapters_than_the_arena_and_the_host_tier_hold_are_all_served(build: Build) -> None:
    requests = [ask(f"r{i}", 10, adapter=(ADA, ADA2, BOB, CYD)[i % 4]) for i in range(12)]
    reference = answer(build(), *requests)
    engine = build(arena_bytes=16 * SLAB_BYTES, host_cache_bytes=50_000)
    replies = answer(engine, *requests)
    assert replies.tokens == reference.tokens
    stats = engine.stats()
    assert stats.adapters["device_evictions"] > 0
    assert stats.adapters["host_evictions"] > 0


def test_forget_drops_copies_and_kv_and_cancels_the_adapters_replies(build: Build) -> None:
    engine = build()
    answer(engine, MIXED[1], MIXED[2], MIXED[3])
    before = engine.stats()
    running = replace(MIXED[1], id="running", user_key=ADA.id)
    base = replace(MIXED[5], id="base turn of the same person", user_key=ADA.id)
    engine.submit(running)
    engine.submit(base)
    engine.step()
    forgotten = engine.forget(ADA.id)
    assert forgotten.cancelled_requests == 2
    assert forgotten.device_slabs > 0
    assert 0 < forgotten.host_bytes < before.adapters["host_bytes"]
    assert forgotten.kv_blocks >= 4
    assert len(engine._device._kv) == 0  # nor in what the runner copied for speed
    assert {e.request_id: e.reason for e in engine.step() if isinstance(e, FinishedEvent)} == {
        "running": "cancelled",
        "base turn of the same person": "cancelled",
    }
    engine.check_integrity()
    again = answer(engine, MIXED[1]).finished["ada"]
    assert again.usage.cached_tokens == 0
    assert again.timings.adapter_tier == "disk"
    assert engine.forget("never was") == type(forgotten)()


# The books


def test_statistics_add_up(build: Build) -> None:
    engine = build()
    answer(engine, *MIXED)
    stats = engine.stats()
    assert stats.step["finished"] == {"stop": 0, "length": 7, "cancelled": 0, "error": 0}
    assert stats.step["output_tokens"] == 7 * 12
    computed = sum(len(request.prompt) for request in MIXED) + 7 * 11
    assert stats.step["tokens"] == computed
    assert stats.queue["admitted"] == 7
    assert stats.pages["free"] + stats.pages["kv"] + stats.pages["adapter"] == stats.pages["total"] == 200
    assert stats.adapters["loads"] == stats.adapters["placements"] == 4
    assert stats.adapters["found"]["disk"] == 5
    assert min(stats.step[f"{part}_s"] for part in ("schedule", "build", "launch", "apply")) > 0
    assert set(stats.as_dict()) == {"step", "queue", "pages", "prefix", "adapters"}


def test_the_integrity_check_sees_a_request_that_lost_its_pages(build: Build) -> None:
    engine = build()
    engine.submit(MIXED[0])
    engine.step()
    sequence = engine._scheduler.running[0]
    blocks, sequence.blocks = sequence.blocks, ()
    with pytest.raises(BrokenBooks):
        engine.check_integrity()
    sequence.blocks = blocks
    list(engine.drain())


def test_a_thousand_random_operations_leave_clean_books_and_true_replies(build: Build) -> None:
    dice = random.Random(5)
    engine = build(
        arena_bytes=40 * SLAB_BYTES, host_cache_bytes=60_000, max_running=6, failed_load_retry_s=0.01
    )
    shared = prompt(48, seed=99)
    asked: dict[str, Request] = {}
    replies = Replies()
    weights = {"submit": 12, "step": 77, "cancel": 5, "prefetch": 4, "forget": 2}
    for number in range(1000):
        (action,) = dice.choices(list(weights), list(weights.values()))
        if action == "submit":
            request = Request(
                id=f"r{number}",
                prompt=shared[: dice.randrange(1, 48)] + prompt(dice.randrange(1, 20), seed=number),
                sampling=replace(
                    dice.choice((GREEDY, SEEDED)),
                    max_tokens=dice.randrange(1, 25),
                    stop_token_ids=tuple(dice.sample(range(VOCAB), dice.choice((0, 4)))),
                ),
                adapter=dice.choice((None, ADA, ADA2, BOB, CYD, BAD)),
                user_key=dice.choice("uvw"),
            )
            asked[request.id] = request
            replies.tokens[request.id] = []
            engine.submit(request)
        elif action == "step":
            replies.take(engine.step())
            engine.check_integrity()
        elif action == "cancel" and asked:
            engine.cancel(dice.choice(list(asked)))
        elif action == "prefetch":
            engine.prefetch(dice.choice((ADA, BOB, CYD, BAD)))
        elif action == "forget":
            engine.forget(dice.choice((ADA, BOB, CYD)).id)
    replies.take(engine.drain())
    engine.check_integrity()
    assert set(replies.finished) == set(asked)
    whole = [r for r in asked.values() if replies.finished[r.id].reason in ("length", "stop")]
    assert len(whole) > 30
    assert {replies.finished[request.id].reason for request in whole} == {"length", "stop"}
    assert all(r.adapter == BAD for r in asked.values() if replies.finished[r.id].reason == "error")
    reference = build(make_device=make_runner)
    for request in dice.sample(whole, 12):
        assert answer(reference, request).tokens[request.id] == replies.tokens[request.id]


def test_adapters_may_come_from_a_reader_in_place_of_the_disk(model: LoadedModel, tmp_path: Path) -> None:
    weights = {ADA: random_adapter(model.config, 5), BOB: random_adapter(model.config, 6)}
    for ref, made in weights.items():
        write_adapter(version_folder(tmp_path, ref.id, ref.version), made, model.config, base_model="tiny")
    config = EngineConfig(arena_bytes=200 * SLAB_BYTES)
    replies = []
    for engine in (
        Engine(config, model, tmp_path),
        Engine(config, model, tmp_path / "nothing", read=weights.__getitem__),
    ):
        for name, ref in (("a", ADA), ("b", BOB), ("c", BAD)):
            engine.submit(Request(name, (5, 6, 7), GREEDY, ref))
        events = list(engine.drain())
        ends = {event.request_id: event.reason for event in events if isinstance(event, FinishedEvent)}
        assert ends == {"a": "length", "b": "length", "c": "error"}
        replies.append(
            sorted(
                (e for e in events if isinstance(e, TokensEvent)), key=lambda e: (e.request_id, e.first_index)
            )
        )
        engine.close()
    assert replies[0] == replies[1]
