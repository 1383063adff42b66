"""A whole service around a tiny random model: real engine, real Redis, real uvicorn, all on this machine.

The model writes printable ASCII and never ends a reply by itself, so a reply is as long as it was asked to
be. Its text depends on the adapter, the prompt and the seed alone."""

import asyncio
import json
import string
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.adapter_files import LoraModule, LoraWeights, version_folder, write_adapter
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import MODULES, module_shape
from engine.server import serve as serve_engine
from engine.weights import LoadedModel, load_model
from personalization.jobs import open_queue, queue_stats
from personalization.prompt import Renderer
from personalization.store import Store, VersionRecord
from service.app import Gateway, GatewayDeps, GatewayOptions, build_app
from service.auth import allowed_origins
from service.gateway import Server, server_config
from service.limits import Limits
from service.replies import Patience
from service.session import SessionOptions
from service.sockets import SocketOptions

CONTEXT = 1024
SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKEN_KEY = b"a key for signing tokens in tests"
# Only what a test waits for is short: on a busy machine a reply of these tests takes some seconds.
FAST = Patience(orphan=60.0, keep=60.0, lease=1.0, follow=0.02, ttl=60.0)


def save_tiny_model(folder: Path) -> None:
    """Weights, a tokenizer of single bytes, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: at for at, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    hidden, ffn, layers, vocab = 32, 64, 2, tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id("<|end|>"),
        "bos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int, size: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * size

    printable = [tokenizer.token_to_id("Ġ" if c == " " else c) for c in string.ascii_letters + " .,"]
    head = torch.zeros(vocab, hidden)  # a logit of 0 among logits of ±5: as good as never written
    head[printable] = random(len(printable), hidden, size=0.9)
    weights = {
        "model.embed_tokens.weight": random(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": head,
    }
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden)
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = random(*shape)
    save_file(weights, folder / "model.safetensors")


def random_adapter(model: LoadedModel, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for layer in range(model.config.num_layers):
        for module in MODULES:
            wide, narrow = module_shape(model.config, module)
            a = torch.randn(4, narrow, generator=generator) * 0.3
            b = torch.randn(wide, 4, generator=generator) * 0.3
            modules.append(LoraModule(layer, module, a, b, 1.0))
    return LoraWeights(tuple(modules))


@dataclass
class TinyModel:
    """Loaded once per test session; engines share the weights."""

    folder: Path
    loaded: LoadedModel

    @classmethod
    def make(cls, folder: Path) -> "TinyModel":
        save_tiny_model(folder)
        return cls(folder, load_model(folder))

    def renderer(self) -> Renderer:
        return Renderer(self.folder, CONTEXT)


class EngineProcess:
    """An engine behind its socket, in this process, that can be killed and started again."""

    def __init__(self, model: TinyModel, adapter_root: Path, socket: Path, **settings: Any) -> None:
        self.socket = socket
        self._model = model
        self._adapter_root = adapter_root
        defaults = {"arena_bytes": 8 << 20, "disconnect_grace_s": 1.0}
        self._config = EngineConfig(**(defaults | settings))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        ready = asyncio.Event()
        engine = Engine(self._config, self._model.loaded, self._adapter_root)
        self._task = asyncio.create_task(serve_engine(engine, self.socket, on_ready=ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.is_set():
            waiting.cancel()
            await self._task

    async def ended(self) -> None:
        """Until it ends by itself, with what it ended with."""
        assert self._task is not None
        await asyncio.shield(self._task)

    async def check(self) -> None:
        """Every page is where the books say, once nothing runs."""
        if self._task is not None and not self._task.done():
            async with await EngineClient.connect(self.socket) as client:
                await client.check_integrity()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None


@contextmanager
def engine_held(after: int = 20) -> Iterator[Callable[[], None]]:
    """Engines of this process take so many steps and then none until what this gives is called: what a test
    does meanwhile it does in the middle of a reply, however fast or slow the machine is. Let an engine go
    before it is stopped; that waits for its step."""
    step, left, going = Engine.step, after, threading.Event()

    def held(engine: Engine) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            going.wait()
        return step(engine)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Engine, "step", held)
        try:
            yield going.set
        finally:
            going.set()


@dataclass
class Calls:
    """What the gateway asked of the rooms that are not part of these tests."""

    refreshes: list[tuple[str, str]] = field(default_factory=list)
    rollbacks: list[tuple[str, int]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)


class Running:
    """One gateway on a free port of loopback."""

    def __init__(self, gateway: Gateway, server: Server, port: int, calls: Calls) -> None:
        self.gateway = gateway
        self.server = server
        self.port = port
        self.calls = calls
        self.clients: list[AsyncOpenAI] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/responses"

    def token(self, user: str, seconds: float = 3600) -> str:
        return self.gateway.auth.sign(user, seconds)

    def headers(self, user: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token(user)}"}

    async def done_with(self, reply_id: str) -> None:
        """Returns when nothing follows of a reply any more: after its last event come trial and refresh."""
        task = self.gateway.replies._tasks.get(reply_id)
        if task is not None:
            await asyncio.wait({task})

    def client(self, user: str, **options: Any) -> AsyncOpenAI:
        """The official SDK, as anyone would use it."""
        settings = {"max_retries": 0} | options
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.token(user), **settings)
        self.clients.append(client)
        return client


@dataclass
class TinyService:
    """Shared by the gateways of one test: store, engine, adapters, clock."""

    model: TinyModel
    store: Store
    engine: EngineProcess
    adapter_root: Path
    page_folder: Path

    async def give_adapter(
        self, user: str, seed: int, *, good: bool = True, turn_ids: Sequence[str] = ()
    ) -> int:
        """A new version for a person, published. `good` False: a file that no engine can load. `turn_ids`:
        what it is said to be trained on."""
        version = await self.store.next_version(user)
        folder = version_folder(self.adapter_root, self.store.adapter_id(user), version)
        write_adapter(
            folder, random_adapter(self.model.loaded, seed), self.model.loaded.config, base_model="t"
        )
        if not good:
            (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
        before = (await self.store.pointer(user)).version
        record = VersionRecord(
            version, before, datetime.now(UTC), accepted=True, reason="a test", turn_ids=tuple(turn_ids)
        )
        await self.store.add_version(user, record)
        assert await self.store.compare_and_set(user, before, version)
        return version

    @asynccontextmanager
    async def gateway(
        self,
        *,
        limits: Limits | None = None,
        session: SessionOptions | None = None,
        sockets: SocketOptions | None = None,
        patience: Patience = FAST,
        demo_hours: float | None = None,
        store: Store | None = None,
        server: dict[str, Any] | None = None,
        store_patience_s: float = 3.0,
        **deps: Any,
    ) -> AsyncIterator[Running]:
        calls = Calls()
        client = await EngineClient.connect(self.engine.socket)

        async def refresh(user: str, reason: str) -> dict[str, Any]:
            calls.refreshes.append((user, reason))
            return {"job_id": f"job-{len(calls.refreshes)}", "state": "queued"}

        async def rollback(user: str, version: int) -> int:
            calls.rollbacks.append((user, version))
            return (await self.store.pointer(user)).version

        async def forget(user: str) -> dict[str, Any]:
            calls.forgotten.append(user)
            return {"turns": (await self.store.forget(user)).turns}

        options = GatewayOptions(
            token_key=TOKEN_KEY,
            base_model="tiny",
            adapter_root=self.adapter_root,
            page_folder=self.page_folder,
            origins=allowed_origins("127.0.0.1", 1),
            demo_hours=demo_hours,
            samples=({"name": "sam", "title": "Sam", "blurb": "a sample"},),
            limits=limits or Limits(),
            session=session or SessionOptions(max_output_tokens=24),
            sockets=sockets or SocketOptions(),
            patience=patience,
            store_patience_s=store_patience_s,
        )
        app = build_app(
            GatewayDeps(
                store=store or self.store,
                engine=client,
                renderer=self.model.renderer(),
                options=options,
                refresh=refresh,
                rollback=rollback,
                forget=forget,
                **{"refreshes": lambda: queue_stats(open_queue(self.store._redis)), **deps},
            )
        )
        web = Server(server_config(app, host="127.0.0.1", port=0, **(server or {})))
        serving = asyncio.create_task(web.serve())
        while not web.started:
            assert not serving.done(), serving.exception()
            await asyncio.sleep(0.01)
        port = web.servers[0].sockets[0].getsockname()[1]
        running = Running(app.state.gateway, web, port, calls)
        auth = running.gateway.auth
        auth._origins = allowed_origins("127.0.0.1", port)  # known only now
        try:
            yield running
        finally:
            for each in running.clients:
                await each.close()
            web.should_exit = True
            await serving
            await client.close()
