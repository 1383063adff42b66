"""The demo model's training: one process, one device, ends when its time is up.

    python train.py --data PREPARED --out FOLDER --deadline SECONDS [--started UNIX_TIME]

`--data` is what `prepare` wrote. The file stands alone (torch, numpy, safetensors), so it can be copied with
the data to a machine with an accelerator. The clock drives everything: the learning rate is a function of the
fraction of the time that has passed, so a run is complete at any speed. Hidden matrices learn with Muon
(momentum, orthogonalised by a Newton-Schulz iteration), embeddings and norms with AdamW. Parameters are kept
in float32 and used in bfloat16. Rows are consecutive tokens of shuffled documents; every token is learned.

`--out` gets the weights as a sharded Hugging Face checkpoint in float16 (first at two thirds of the time, as
insurance, and again at the end) and `training.json`: settings, loss curve, held-out bits per byte.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, INNER = 8192, 10, 384, 6, 2, 64, 1024
EPS, ROPE_THETA, POSITIONS = 1e-5, 10000.0, 2048
BEGIN = 1  # the token that opens a document
IGNORE = -100

# Passes over each corpus in one round of the mixture; the mixture is the same from first to last step.
PASSES = {
    "self-dialogue": 2.25,
    "topical-chat": 2.25,
    "persona-chat": 2.25,
    "instruct": 2.25,
    "taskmaster": 1.5,
    "sgd": 1.0,
    "changelog": 1.0,
    "optech": 1.0,
    "books": 1.0,
}


@dataclass(frozen=True)
class Settings:
    """What a run can vary."""

    batch_tokens: int = 98_304
    short_row: int = 1024
    short_until: float = 0.5
    hold_until: float = 0.55
    warmup_steps: int = 80
    muon_rate: float = 0.02
    muon_decay: float = 0.07
    adam_rate: float = 0.005
    adam_decay: float = 0.02
    seed: int = 1


# ---- data -------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """One corpus: its training stream and the start of each document, and its held-out documents."""

    name: str
    train: NDArray[np.uint16]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    test: NDArray[np.uint16]
    test_lengths: list[int]
    test_bytes: int


def _read_shard(path: Path) -> NDArray[np.uint16]:
    raw = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint8).reshape(2, -1)
    return np.ascontiguousarray(raw.T).view("<u2").reshape(-1)


def read_corpora(folder: Path) -> list[Corpus]:
    """Decompress every shard, many at a time."""
    index = json.loads((folder / "data.json").read_text())
    names = [name for entry in index.values() for name in entry["shards"]]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 1)) as pool:
        shards = dict(zip(names, pool.map(lambda name: _read_shard(folder / name), names), strict=True))
    corpora = []
    for name, entry in index.items():
        parts: dict[str, list[NDArray[np.uint16]]] = {"train": [], "test": []}
        for shard in entry["shards"]:
            parts["test" if "-test-" in shard else "train"].append(shards[shard])
        lengths = np.array(entry["train_lengths"], dtype=np.int64)
        corpora.append(
            Corpus(
                name,
                np.concatenate(parts["train"]),
                np.cumsum(lengths) - lengths,
                lengths,
                np.concatenate([*parts["test"], np.zeros(0, dtype=np.uint16)]),
                entry["test_lengths"],
                sum(entry["test_bytes"]),
            )
        )
    return corpora


def build_round(corpora: list[Corpus], seed: int) -> Tensor:
    """One round of the mixture: documents in random order, as one stream of token ids.

    A person's conversations follow each other in time. Half of them, chosen afresh each round, continue
    without the token that opens a document: that is what a prompt with a person's history looks like.
    """
    generator = np.random.default_rng(seed)
    pieces: list[NDArray[np.uint16]] = []
    for corpus in corpora:
        count = len(corpus.lengths)
        passes = PASSES[corpus.name]
        order = [np.arange(count)] * int(passes)
        order.append(generator.permutation(count)[: round((passes - int(passes)) * count)])
        train = corpus.train
        if corpus.name == "self-dialogue":
            joined = (train == BEGIN) & (generator.random(len(train)) < 0.5)
            joined[corpus.starts] = False
            ends = corpus.starts + corpus.lengths
            kept = np.concatenate([[0], np.cumsum(~joined)])
            train, starts, stops = train[~joined], kept[corpus.starts], kept[ends]
        else:
            starts, stops = corpus.starts, corpus.starts + corpus.lengths
        for i in np.concatenate(order):
            pieces.append(train[starts[i] : stops[i]])
    shuffled = [pieces[i] for i in generator.permutation(len(pieces))]
    return torch.from_numpy(np.concatenate(shuffled).astype(np.int32))


class Batches:
    """Batches of rows, round after round; the next round is built while this one is used."""

    def __init__(self, corpora: list[Corpus], tokens: int, device: torch.device, seed: int) -> None:
        self._corpora, self._device, self._seed = corpora, device, seed
        self._long_rows = tokens // POSITIONS
        self._pool = ThreadPoolExecutor(1)
        self.rounds = -1
        self.round_tokens = 0
        self._next: Future[Tensor] = self._pool.submit(build_round, corpora, seed)
        self._offsets = torch.arange(POSITIONS + 1, device=device)
        self._open()

    def _open(self) -> None:
        self.rounds += 1
        self._stream = self._next.result().to(self._device)
        self.round_tokens = len(self._stream)
        self._next = self._pool.submit(build_round, self._corpora, self._seed + self.rounds + 1)
        generator = torch.Generator().manual_seed(self._seed + self.rounds)
        rows = (len(self._stream) - 1 - POSITIONS) // POSITIONS
        shift = int(torch.randint(0, POSITIONS, (1,), generator=generator))
        self._order = (torch.randperm(rows, generator=generator) * POSITIONS + shift).to(self._device)
        self._at = 0

    def next(self, row: int) -> tuple[Tensor, Tensor]:
        """Inputs [batch, row] and their targets."""
        if self._at + self._long_rows > len(self._order):
            self._open()
        starts = self._order[self._at : self._at + self._long_rows]
        self._at += self._long_rows
        taken = self._stream[starts[:, None] + self._offsets].long()
        return taken[:, :-1].reshape(-1, row), taken[:, 1:].reshape(-1, row)


# ---- model ------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return ((x.float() * scale) * weight.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def before_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, hidden] to rotated queries, keys and to values, [N, heads, head]."""
    mixed = (_norm(x, norm) @ qkv.t()).view(-1, HEADS + 2 * KV_HEADS, HEAD)
    q, k, v = torch.split(mixed, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()


def after_attention(
    x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The rest of a layer: output projection and gated feed-forward, both added to the stream."""
    x = x + mixed @ out.t()
    gate, up = (_norm(x, norm) @ gate_up.t()).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ down.t()


def head_loss(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Sum of the tokens' negative log-likelihoods."""
    logits = (_norm(x, norm) @ embedding.t()).float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)


class Attention:
    """Causal attention: the flash kernel where the device has it, otherwise what torch picks."""

    def __init__(self) -> None:
        self.backends: list[SDPBackend] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        tokens = q.shape[0]
        q, k, v = (t.view(rows, tokens // rows, -1, HEAD).transpose(1, 2) for t in (q, k, v))
        if self.backends:
            with sdpa_kernel(self.backends):
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(tokens, HEADS * HEAD)

    def choose(self, device: torch.device) -> str:
        """Try the flash kernel forward and backward on a little input."""
        if device.type != "cuda":
            return "default"
        shapes = ((POSITIONS, HEADS, HEAD), (POSITIONS, KV_HEADS, HEAD), (POSITIONS, KV_HEADS, HEAD))
        q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        self.backends = [SDPBackend.FLASH_ATTENTION]
        try:
            self(q, k, v, 2).sum().backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"no flash attention: {error}", flush=True)
            self.backends = []
            return "default"
        return "flash"


class Model:
    """Parameters, the layers of one kind stacked in one tensor, and the loss they give."""

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * std

        std = 0.5 / math.sqrt(HIDDEN)
        self.matrices = {
            "qkv": normal(LAYERS, (HEADS + 2 * KV_HEADS) * HEAD, HIDDEN, std=std),
            "out": torch.zeros(LAYERS, HIDDEN, HEADS * HEAD, device=device),
            "gate_up": normal(LAYERS, 2 * INNER, HIDDEN, std=std),
            "down": torch.zeros(LAYERS, HIDDEN, INNER, device=device),
        }
        self.others = {
            "embedding": normal(VOCABULARY, HIDDEN, std=0.02),
            "attention_norm": torch.ones(LAYERS, HIDDEN, device=device),
            "feed_norm": torch.ones(LAYERS, HIDDEN, device=device),
            "final_norm": torch.ones(HIDDEN, device=device),
        }
        self.parameters = {**self.matrices, **self.others}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.attention = Attention()
        self.before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        self.head: Callable[..., Tensor] = head_loss
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._device = device

    def compile(self) -> None:
        """Compile the pieces around attention once; every layer and row length uses the same code."""
        self.before = torch.compile(before_attention, dynamic=False, fullgraph=True)
        self.after = torch.compile(after_attention, dynamic=False, fullgraph=True)
        self.head = torch.compile(head_loss, dynamic=False, fullgraph=True)

    def plain(self) -> None:
        self.before, self.after, self.head = before_attention, after_attention, head_loss

    def _rotations(self, rows: int, row: int) -> tuple[Tensor, Tensor]:
        if (rows, row) not in self._tables:
            powers = torch.arange(0, HEAD, 2, device=self._device, dtype=torch.float64) / HEAD
            angles = torch.arange(row, device=self._device, dtype=torch.float64)[:, None] / ROPE_THETA**powers
            angles = angles.float().repeat(rows, 1)
            self._tables[rows, row] = (angles.cos(), angles.sin())
        return self._tables[rows, row]

    def loss(self, inputs: Tensor, targets: Tensor, chunks: int = 4) -> Tensor:
        """Sum of negative log-likelihoods of a [rows, row] batch."""
        rows, row = inputs.shape
        cos, sin = self._rotations(rows, row)
        cast = {name: parameter.bfloat16() for name, parameter in self.parameters.items()}
        qkv, out, gate_up, down = (cast[name].unbind(0) for name in ("qkv", "out", "gate_up", "down"))
        first, second = cast["attention_norm"].unbind(0), cast["feed_norm"].unbind(0)
        x = F.embedding(inputs.reshape(-1), cast["embedding"])
        for i in range(LAYERS):
            q, k, v = self.before(x, first[i], qkv[i], cos, sin)
            mixed = self.attention(q, k, v, rows)
            x = self.after(x, mixed, out[i], second[i], gate_up[i], down[i])
        total = torch.zeros((), device=self._device)
        flat = targets.reshape(-1)
        for piece, wanted in zip(x.chunk(chunks), flat.chunk(chunks), strict=True):
            total = total + self.head(piece, cast["final_norm"], cast["embedding"], wanted)
        return total

    def state(self) -> dict[str, Tensor]:
        """The tensors under their Hugging Face names, float16, on the host."""
        p = {name: parameter.detach().half().cpu() for name, parameter in self.parameters.items()}
        out = {"model.embed_tokens.weight": p["embedding"]}
        queries, keys = HEADS * HEAD, KV_HEADS * HEAD
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            q, k, v = torch.split(p["qkv"][i], [queries, keys, keys])
            gate, up = p["gate_up"][i].chunk(2)
            out |= {
                f"{layer}.input_layernorm.weight": p["attention_norm"][i],
                f"{layer}.self_attn.q_proj.weight": q,
                f"{layer}.self_attn.k_proj.weight": k,
                f"{layer}.self_attn.v_proj.weight": v,
                f"{layer}.self_attn.o_proj.weight": p["out"][i],
                f"{layer}.post_attention_layernorm.weight": p["feed_norm"][i],
                f"{layer}.mlp.gate_proj.weight": gate,
                f"{layer}.mlp.up_proj.weight": up,
                f"{layer}.mlp.down_proj.weight": p["down"][i],
            }
        out["model.norm.weight"] = p["final_norm"]
        return {name: tensor.clone().contiguous() for name, tensor in out.items()}


# ---- optimiser --------------------------------------------------------------------------------------


def orthogonalise(batch: Tensor) -> Tensor:
    """Each matrix of [B, m, n], m >= n, with its singular values brought near one."""
    x = batch.bfloat16().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.mT
        mixed = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return x.mT


class Optimiser:
    """Muon for the stacked hidden matrices, AdamW for the rest."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self.momentum = {name: torch.zeros_like(w) for name, w in model.matrices.items()}
        embedding = model.others["embedding"]
        norms = [w for name, w in model.others.items() if name != "embedding"]
        self.adam = torch.optim.AdamW(
            [
                {"params": [embedding], "weight_decay": settings.adam_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=settings.adam_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=True,
        )

    @torch.no_grad()
    def step(self, factor: float, momentum: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self._settings.adam_rate * factor
        self.adam.step()
        update: dict[str, Tensor] = {}
        for name, weight in self._model.matrices.items():
            assert weight.grad is not None
            self.momentum[name].lerp_(weight.grad, 1 - momentum)
            update[name] = weight.grad.lerp(self.momentum[name], momentum)
        queries, keys = HEADS * HEAD, KV_HEADS * HEAD
        q, k, v = torch.split(update["qkv"], [queries, keys, keys], dim=1)
        gate, up = update["gate_up"].chunk(2, dim=1)
        q, out = orthogonalise(torch.cat((q, update["out"]))).chunk(2)
        k, v = orthogonalise(torch.cat((k, v)).mT).mT.chunk(2)
        gate, up, down = orthogonalise(torch.cat((gate, up, update["down"].mT))).chunk(3)
        tall = math.sqrt(INNER / HIDDEN)  # a matrix with more outputs than inputs takes larger steps
        steps = {
            "qkv": torch.cat((q, k, v), dim=1),
            "out": out,
            "gate_up": torch.cat((gate, up), dim=1) * tall,
            "down": down.mT,
        }
        rate = self._settings.muon_rate * factor
        for name, weight in self._model.matrices.items():
            weight.mul_(1 - rate * self._settings.muon_decay)
            weight.add_(steps[name].to(weight.dtype), alpha=-rate)
        for weight in self._model.parameters.values():
            weight.grad = None

    def snapshot(self) -> dict[str, Tensor]:
        held = {f"w/{name}": w.detach().clone() for name, w in self._model.parameters.items()}
        return held | {f"m/{name}": m.clone() for name, m in self.momentum.items()}

    @torch.no_grad()
    def restore(self, held: dict[str, Tensor]) -> None:
        for name, weight in self._model.parameters.items():
            weight.copy_(held[f"w/{name}"])
            weight.grad = None
        for name, buffer in self.momentum.items():
            buffer.copy_(held[f"m/{name}"])
        self.adam.state.clear()


# ---- running ----------------------------------------------------------------------------------------


def save(model: Model, out: Path, limit: int = 14 * 2**20) -> None:
    """Sharded safetensors and their index; a reader never sees half a file."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.state().items():
        if size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(out / f"{name}.part"), metadata={"format": "pt"})
        os.replace(out / f"{name}.part", out / name)
        placed |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def evaluate(model: Model, corpora: list[Corpus], tokens: int, device: torch.device) -> dict[str, float]:
    """Held-out bits per byte: bits of every token after a document's first, over the bytes of its text.

    A document longer than the context is read in windows that do not overlap.
    """
    model.plain()
    result: dict[str, float] = {}
    rows = max(1, tokens // POSITIONS)
    for corpus in corpora:
        windows: list[NDArray[np.int64]] = []
        start = 0
        for length in corpus.test_lengths:
            document = corpus.test[start : start + length].astype(np.int64)
            start += length
            for at in range(0, length - 1, POSITIONS):
                window = document[at : at + POSITIONS + 1]
                windows.append(np.pad(window, (0, POSITIONS + 1 - len(window)), constant_values=IGNORE))
        total = 0.0
        windows.sort(key=lambda window: int((window != IGNORE).sum()))
        for at in range(0, len(windows), rows):
            batch = torch.from_numpy(np.stack(windows[at : at + rows]))
            longest = int((batch != IGNORE).sum(1).max())
            batch = batch[:, :longest].to(device)
            total += float(model.loss(batch[:, :-1].clamp(min=0).contiguous(), batch[:, 1:].contiguous()))
        if corpus.test_bytes:
            result[corpus.name] = total / math.log(2) / corpus.test_bytes
    return result


def rate_factor(progress: float, step: int, settings: Settings) -> float:
    """Warm up by steps, hold, then fall in a straight line to zero as the time runs out."""
    fall = min(1.0, (1 - progress) / (1 - settings.hold_until))
    return max(0.0, min((step + 1) / settings.warmup_steps, fall))


def _prepare_device(device: torch.device, model: Model, settings: Settings, compiled: bool) -> dict[str, Any]:
    """Choose attention, compile, and go back to uncompiled code when compiling fails."""
    notes: dict[str, Any] = {"attention": model.attention.choose(device)}
    row = settings.short_row
    inputs = torch.randint(0, VOCABULARY, (settings.batch_tokens // row, row), device=device)
    for attempt in ("compiled", "plain") if compiled else ("plain",):
        model.compile() if attempt == "compiled" else model.plain()
        try:
            (model.loss(inputs, inputs) / inputs.numel()).backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
            notes["code"] = attempt
            break
        except Exception as error:
            print(f"{attempt}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    for parameter in model.parameters.values():
        parameter.grad = None
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds from start to last file")
    parser.add_argument("--started", type=float, default=time.time(), help="when the clock began, Unix time")
    parser.add_argument("--reserve", type=float, default=6.0, help="seconds kept for evaluation and saving")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-evaluate", action="store_true")
    parser.add_argument("--max-steps", type=int, default=0, help="stop after so many steps (for trials)")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    began = options.started

    def clock() -> float:
        return time.time() - float(began)

    device = torch.device(options.device)
    cuda = device.type == "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    pool = ThreadPoolExecutor(1)

    def load() -> tuple[list[Corpus], Batches]:
        corpora = read_corpora(options.data)
        return corpora, Batches(corpora, settings.batch_tokens, device, settings.seed)

    loading = pool.submit(load)
    log: dict[str, Any] = {
        "settings": asdict(settings),
        "passes": PASSES,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "imported_at": clock(),
    }
    model = Model(device, settings.seed)
    optimiser = Optimiser(model, settings)
    log |= _prepare_device(device, model, settings, compiled=not options.no_compile)
    log["compiled_at"] = clock()
    corpora, batches = loading.result()
    log["ready_at"] = first = clock()
    last = options.deadline - options.reserve
    print(json.dumps(log), flush=True)

    held = fresh = optimiser.snapshot()  # a failure shows late, so the older of two snapshots is the good one
    spoiled, damping = 0, 1.0
    history: list[tuple[int, float, float, float]] = []
    queue: list[tuple[Any, Tensor]] = []
    recent: list[float] = []
    insurance = [0.66, 0.85]
    step = 0
    while True:
        progress = (clock() - first) / max(1e-6, last - first)
        if options.max_steps:
            progress = step / options.max_steps
        if progress >= 1:
            break
        if insurance and progress >= insurance[0]:
            insurance.pop(0)
            save(model, options.out)
            (options.out / "training.json").write_text(json.dumps(log | {"unfinished": True, "steps": step}))
        row = settings.short_row if progress < settings.short_until else POSITIONS
        inputs, targets = batches.next(row)
        loss = model.loss(inputs, targets) / inputs.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        factor = damping * rate_factor(progress, step, settings)
        optimiser.step(factor, 0.85 + 0.1 * min(1.0, step / 300))
        host = torch.empty((), pin_memory=cuda)
        host.copy_(loss.detach(), non_blocking=True)
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record()
        queue.append((event, host))
        step += 1
        if len(queue) <= 2:
            continue
        event, host = queue.pop(0)  # the clock must not run ahead of the device by more than two steps
        if event is not None:
            event.synchronize()
        value = float(host)
        usual = sorted(recent)[len(recent) // 2] if recent else math.inf
        if not math.isfinite(value) or value > usual + 1.5:
            optimiser.restore(held)
            fresh = held
            queue.clear()
            recent.clear()
            spoiled += 1
            damping *= 0.7
            print(f"step {step}: loss {value}; back to the last good weights", flush=True)
            continue
        recent = [*recent[-24:], value]
        if step % 20 == 0:
            mean = sum(recent[-20:]) / len(recent[-20:])
            history.append((step, round(clock() - first, 2), round(mean, 4), round(factor, 4)))
        if step % 200 == 0:
            held, fresh = fresh, optimiser.snapshot()
            speed = step * settings.batch_tokens / (clock() - first) / 1e3
            print(f"step {step} {clock():.1f} s loss {mean:.3f} {speed:.0f} k tokens/s", flush=True)

    if cuda:
        torch.cuda.synchronize()
    trained = clock()
    finite = all(bool(torch.isfinite(w).all()) for w in model.parameters.values())
    if not finite:
        optimiser.restore(held)
    save(model, options.out)
    tokens = step * settings.batch_tokens
    log |= {
        "steps": step,
        "tokens": tokens,
        "rounds": tokens / batches.round_tokens,
        "round_tokens": batches.round_tokens,
        "training_seconds": trained - first,
        "tokens_per_second": tokens / (trained - first),
        "rollbacks": spoiled,
        "final_finite": finite,
        "saved_at": clock(),
        "history": history,
    }
    (options.out / "training.json").write_text(json.dumps(log))
    if not options.no_evaluate:
        log["held_out_bits_per_byte"] = evaluate(model, corpora, settings.batch_tokens, device)
    log["finished_at"] = clock()
    if cuda:
        log["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    (options.out / "training.json").write_text(json.dumps(log, indent=1))
    print(json.dumps({name: value for name, value in log.items() if name != "history"}), flush=True)
    os._exit(0)  # the pools' threads may still build a round nobody needs


if __name__ == "__main__":
    main()
