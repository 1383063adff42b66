"""The process that trains and judges: a crash, a device fault or too little memory ends it, not the worker.

The parent (`Trainer`, asyncio) sends a batch and receives what happens, as msgpack frames with a 4-byte
length over the child's stdin and stdout. The child stays for the next batch, so that the model is loaded
once; it dies with its parent, and a dead one is replaced at the next batch.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import torch
from safetensors.torch import load, save
from torch import Tensor

from engine.adapter_files import META_FILE, AdapterError, LoraModule, LoraWeights, read_adapter
from engine.lending import Borrowed, NothingLent, trainer_bytes
from engine.model import ModelConfig
from engine.weights import LoadedModel, load_model
from personalization.finish import Accepted, finish
from personalization.gate import Case, Gate, GatePolicy, Verdict, scaled
from personalization.neutral import neutral_rows
from personalization.pacing import SHARE, Pacer, people_at_once
from personalization.prompt import Example, Renderer
from personalization.train import PEOPLE_AT_ONCE, Person, Recipe, Trained, best_dtype, train_stacks

_PR_SET_PDEATHSIG = 1
_MAX_FRAME = 1 << 31
_PROGRESS_EVERY_S = 0.25
_ALIVE_EVERY_S = 1.0
_LOOK_EVERY_S = 0.5
# glibc's malloc parameters. By default each large tensor is mapped and unmapped anew, and the kernel clears
# its pages each time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


class TrainerDied(RuntimeError):
    """The process ended, or fell silent, in the middle of a batch: `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the training process ended before its batch did: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """`threads` 0: what torch chooses. `device` "auto": CUDA where there is one. `silence_s`: how long the
    process may say nothing before it counts as hung.

    `lent`: by this file an engine on the same GPU lends its weights; where none does, the process loads its
    own. While that engine is busy, learning takes `share` of the time; activations, optimizer and the rest
    take at most `device_bytes` (None: a tenth of the device)."""

    model_folder: Path
    threads: int = 0
    device: str = "auto"
    people_at_once: int = PEOPLE_AT_ONCE
    silence_s: float = 300.0
    lent: Path | None = None
    share: float = SHARE
    device_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One person's refresh: rows to train on and to judge by. `rival`: the folder of the version to do better
    than; None, or what cannot be loaded: the bare base. `start`: the adapter to begin with. `newest`: rows of
    the turns held out to judge it, learned once it was accepted."""

    id: str
    train: Sequence[Example]
    gate: Sequence[Example]
    rival: Path | None
    seed: int
    start: Path | None = None
    newest: Sequence[Example] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Share of the batch's training that is done, 0 to 1."""

    share: float


@dataclass(frozen=True, slots=True)
class Judging:
    """These people's training is done; the gate looks at them now."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """One person's candidate and what the gate says. `numbers` are those of the training; `began`: with the
    task's `start`; `finished`: it has learned the task's `newest` too, after the verdict; `opposed`: it was
    judged against the task's `rival`."""

    id: str
    weights: LoraWeights
    verdict: Verdict
    numbers: dict[str, float]
    base_hash: str
    began: bool = False
    finished: bool = False
    opposed: bool = False


class Trainer:
    """The parent's side. One batch at a time."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._base_hash: str | None = None  # what the process has loaded, once it has said so
        self._starting = asyncio.Lock()
        self._loading = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._process is None else self._process.pid

    async def warm(self) -> None:
        """Start the process if there is none, so that it loads the model while a batch is being prepared."""
        await self._start()

    async def base_hash(self) -> str:
        """Which base adapters are trained for; starts the process if there is none. Raises TrainerDied."""
        process = await self._start()
        async with self._loading:
            if self._base_hash is None:
                try:
                    self._base_hash = str((await self._receive(process))["base_hash"])
                except BaseException:
                    await self.stop()
                    raise
            return self._base_hash

    async def run(
        self, tasks: Sequence[Task], recipe: Recipe, policy: GatePolicy
    ) -> AsyncGenerator[Progress | Judging | Judged, None]:
        """Train and judge `tasks`; every one of them ends in a Judged. Raises TrainerDied.

        Leaving the iterator early, or being cancelled in it, ends the process: what it computes is wanted no
        more.
        """
        request = {
            "tasks": [_pack_task(task) for task in tasks],
            "recipe": asdict(recipe),
            "policy": asdict(policy),
            "people_at_once": self._settings.people_at_once,
        }
        finished = False
        try:
            process = await self._start()
            await self.base_hash()  # nothing is read before that: a batch would wait for one that hangs
            assert process.stdin is not None
            process.stdin.write(_frame(request))
            await process.stdin.drain()
            while (message := await self._receive(process))["kind"] != "done":
                if message["kind"] != "alive":
                    yield _unpack_event(message)
            finished = True
        except (BrokenPipeError, ConnectionResetError) as error:
            raise TrainerDied(str(error) or type(error).__name__) from error
        finally:
            if not finished:
                await self.stop()

    async def stop(self) -> None:
        """End the process; the next batch starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process, self._base_hash = await self._new_process(), None
            return self._process

    async def _new_process(self) -> asyncio.subprocess.Process:
        settings = asdict(self._settings) | {
            "model_folder": str(self._settings.model_folder.absolute()),
            "lent": None if self._settings.lent is None else str(self._settings.lent.absolute()),
            "parent": os.getpid(),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "personalization.trainer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # -m looks here first: the child runs the same code as we do, wherever we were started.
            cwd=Path(__file__).parent.parent,
        )
        assert process.stdin is not None
        process.stdin.write(_frame(settings))
        return process

    async def _receive(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._settings.silence_s):
                size = int.from_bytes(await process.stdout.readexactly(4), "big")
                message: dict[str, Any] = msgpack.unpackb(
                    await process.stdout.readexactly(size), max_bin_len=_MAX_FRAME
                )
        except asyncio.IncompleteReadError as error:
            code = await process.wait()
            raise TrainerDied(f"exit status {code}") from error
        except TimeoutError as error:
            raise TrainerDied(f"silent for {self._settings.silence_s:g} s") from error
        if message["kind"] == "error":
            raise TrainerDied(message["message"])
        return message


# ---------------------------------------------------------------- the child


def main() -> None:
    """Load the model, then serve batches until stdin ends."""
    receive, send = _pipes()
    settings = receive()
    if settings is None:
        return
    _die_with(settings["parent"])
    _keep_memory()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.set_flush_denormal(True)  # second moments of weights that hardly move would cost hundreds of cycles
    device = settings["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = best_dtype(torch.device(device))
    try:
        folder = Path(settings["model_folder"])
        base = _base(settings, folder, device, dtype)
        send({"kind": "ready", "base_hash": base.model.base_hash})
        gate = Gate(base.model, neutral_rows(Renderer(folder, base.model.config.max_position_embeddings)))
        while (request := receive()) is not None:
            _run_batch(base, gate, request, send)
            send({"kind": "done"})
    except Exception as error:  # the parent says it to whoever asked; stderr has the traceback
        send({"kind": "error", "message": f"{type(error).__name__}: {error}"})
        raise


@dataclass(frozen=True, slots=True)
class _Base:
    """The frozen model, and whose it is: an engine's that lives beside us, or (None) our own."""

    model: LoadedModel
    lender: Borrowed | None = None


def _base(settings: dict[str, Any], folder: Path, device: str, dtype: torch.dtype) -> _Base:
    base = None
    if device == "cuda" and settings["lent"] is not None:
        try:
            lender = Borrowed(Path(settings["lent"]))
            base = _Base(lender.model(folder), lender)
        except NothingLent as error:
            print(f"trainer: loads a base of its own: {error}", file=sys.stderr)
        else:
            threading.Thread(target=_end_with, args=(lender,), daemon=True).start()
            Pacer(lambda: lender.is_busy, settings["share"]).pace(base.model.decoder)
    if base is None:
        base = _Base(load_model(folder, device=device, dtype=dtype))
    if device == "cuda" and settings["lent"] is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        weights = torch.cuda.memory_allocated()  # none, if they are borrowed
        granted = trainer_bytes(settings["device_bytes"], total) + weights
        torch.cuda.set_per_process_memory_fraction(min(1.0, granted / total))
    return base


def _alive(send: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """A hook for the model: each pass tells, now and then, that the process is not hung. To judge many long
    turns, and to learn them after the verdict, may take longer than one who says nothing is waited for."""
    next_word = 0.0

    def say(*_: object) -> None:
        nonlocal next_word
        if (now := time.monotonic()) >= next_word:
            next_word = now + _ALIVE_EVERY_S
            send({"kind": "alive"})

    return say


def _end_with(lender: Borrowed) -> None:
    """The next engine has weights of its own, and these must not be used any more."""
    while lender.is_there:
        time.sleep(_LOOK_EVERY_S)
    print("trainer: ends, as the engine did", file=sys.stderr)
    os._exit(1)


def _run_batch(
    base: _Base, gate: Gate, request: dict[str, Any], send: Callable[[dict[str, Any]], None]
) -> None:
    model = base.model
    recipe, policy = Recipe(**_tuples(request["recipe"])), GatePolicy(**_tuples(request["policy"]))
    at_once = request["people_at_once"]
    if base.lender is not None and base.lender.is_busy:
        at_once = people_at_once(model.config, recipe, at_once)
    learners = [_learner(model, _unpack_task(task)) for task in request["tasks"]]
    people = [learner.person() for learner in learners]
    passes = model.decoder.register_forward_hook(_alive(send))  # an error ends the process, and the hook
    for stack in train_stacks(model, people, recipe, people_at_once=at_once, on_progress=_progress(send)):
        mine, trained = [learners[index] for index in stack], list(stack.values())
        send({"kind": "judging", "ids": [learner.task.id for learner in mine]})
        verdicts = _verdicts(gate, policy, mine, trained)
        candidates = [
            scaled(each.weights, verdict.strength) for each, verdict in zip(trained, verdicts, strict=True)
        ]
        accepted = [
            learner.accepted(verdict.strength) if verdict.accepted and learner.task.newest else None
            for learner, verdict in zip(mine, verdicts, strict=True)
        ]
        finished = finish(model, gate, accepted, recipe, policy, people_at_once=at_once)
        for place, learner in enumerate(mine):
            judged = Judged(
                learner.task.id,
                finished[place] or candidates[place],
                verdicts[place],
                _numbers(trained[place], verdicts[place]),
                model.base_hash,
                began=learner.start is not None,
                finished=finished[place] is not None,
                opposed=learner.rival is not None,
            )
            send(_pack_judged(judged))
    passes.remove()


@dataclass(frozen=True, slots=True)
class _Learner:
    """A task, and the adapters of its folders, those that can be loaded."""

    task: Task
    rival: LoraWeights | None
    start: LoraWeights | None

    def person(self) -> Person:
        return Person(self.task.train, self.task.seed, self.start)

    def accepted(self, strength: float) -> Accepted:
        return Accepted(self.person(), self.task.newest, strength)


def _learner(model: LoadedModel, task: Task) -> _Learner:
    rival, start = (read_for(model.base_hash, each, model.config) for each in (task.rival, task.start))
    return _Learner(task, rival, start)


def _progress(send: Callable[[dict[str, Any]], None]) -> Callable[[float], None]:
    """Sends the share that is done, now and then, and its end always."""
    next_report = 0.0

    def report(share: float) -> None:
        nonlocal next_report
        if (now := time.monotonic()) >= next_report or share == 1.0:
            next_report = now + _PROGRESS_EVERY_S
            send({"kind": "progress", "share": share})

    return report


def _verdicts(
    gate: Gate, policy: GatePolicy, learners: Sequence[_Learner], trained: Sequence[Trained]
) -> list[Verdict]:
    """The gate's verdict on each who has learned something; on the others, why there was nothing to judge."""
    learned = [place for place, each in enumerate(trained) if each.error is None and each.steps]
    cases = [
        Case(trained[place].weights, learners[place].rival, learners[place].task.gate) for place in learned
    ]
    found = dict(zip(learned, gate.judge(cases, policy), strict=True))
    return [found.get(place) or _without_gate(each) for place, each in enumerate(trained)]


def _without_gate(trained: Trained) -> Verdict:
    """The verdict on training that left nothing to judge."""
    if trained.error is not None:
        return Verdict(False, f"refused: training broke off at {trained.error}")
    return Verdict(False, "nothing to learn from")


def _numbers(trained: Trained, verdict: Verdict) -> dict[str, float]:
    """What is kept of a training in numbers; without steps there are no losses."""
    numbers = {
        "steps": float(trained.steps),
        "trained_tokens": float(trained.tokens),
        "train_loss_first": trained.first_loss,
        "train_loss_last": trained.last_loss,
        "strength": verdict.strength,
    }
    return {name: value for name, value in numbers.items() if value == value}


def read_for(base_hash: str, folder: Path | None, config: ModelConfig) -> LoraWeights | None:
    """The adapter in `folder`, or None if there is none for this base: unreadable, or made for another."""
    if folder is None:
        return None
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if meta["base_hash"] != base_hash:
            return None
        return read_adapter(folder, config)
    except (OSError, ValueError, KeyError, AdapterError):
        return None


def _die_with(parent: int) -> None:
    """Have the kernel kill us when the parent ends, however it ends; off Linux the end of stdin does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the promise was made
            sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides


def _keep_memory() -> None:
    """Let malloc keep what it has once got from the kernel, if this is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def _pipes() -> tuple[Callable[[], dict[str, Any] | None], Callable[[dict[str, Any]], None]]:
    """Frames from stdin and to stdout; whatever else writes to stdout from now on goes to stderr."""
    source: BinaryIO = os.fdopen(os.dup(0), "rb")
    target: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def receive() -> dict[str, Any] | None:
        head = source.read(4)
        if len(head) < 4:
            return None
        message: dict[str, Any] = msgpack.unpackb(
            source.read(int.from_bytes(head, "big")), max_bin_len=_MAX_FRAME
        )
        return message

    sending = threading.Lock()  # progress comes from the threads that train

    def send(message: dict[str, Any]) -> None:
        with sending:
            target.write(_frame(message))
            target.flush()

    return receive, send


# ---------------------------------------------------------------- frames


def _frame(message: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(message)
    return len(body).to_bytes(4, "big") + body


def _pack_task(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "train": [_pack_example(example) for example in task.train],
        "gate": [_pack_example(example) for example in task.gate],
        "rival": None if task.rival is None else str(task.rival.absolute()),
        "seed": task.seed,
        "start": None if task.start is None else str(task.start.absolute()),
        "newest": [_pack_example(example) for example in task.newest],
    }


def _unpack_task(task: dict[str, Any]) -> Task:
    return Task(
        task["id"],
        [_unpack_example(example) for example in task["train"]],
        [_unpack_example(example) for example in task["gate"]],
        None if task["rival"] is None else Path(task["rival"]),
        task["seed"],
        None if task["start"] is None else Path(task["start"]),
        [_unpack_example(example) for example in task["newest"]],
    )


def _pack_example(example: Example) -> tuple[tuple[int, ...], bytes]:
    return example.token_ids, bytes(example.learn_mask)


def _unpack_example(packed: tuple[Sequence[int], bytes]) -> Example:
    ids, mask = packed
    return Example(tuple(ids), tuple(map(bool, mask)))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists of a frame as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _pack_weights(weights: LoraWeights) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for place, m in enumerate(weights.modules):
        tensors[f"{place}.a"], tensors[f"{place}.b"] = m.a.contiguous(), m.b.contiguous()
    return {"modules": [(m.layer, m.module, m.scale) for m in weights.modules], "tensors": save(tensors)}


def _unpack_weights(packed: dict[str, Any]) -> LoraWeights:
    tensors = load(packed["tensors"])
    return LoraWeights(
        tuple(
            LoraModule(layer, module, tensors[f"{place}.a"], tensors[f"{place}.b"], scale)
            for place, (layer, module, scale) in enumerate(packed["modules"])
        )
    )


def _pack_judged(judged: Judged) -> dict[str, Any]:
    return {
        "kind": "judged",
        "id": judged.id,
        "weights": _pack_weights(judged.weights),
        "verdict": asdict(judged.verdict),
        "numbers": judged.numbers,
        "base_hash": judged.base_hash,
        "began": judged.began,
        "finished": judged.finished,
        "opposed": judged.opposed,
    }


def _unpack_event(message: dict[str, Any]) -> Progress | Judging | Judged:
    if message["kind"] == "progress":
        return Progress(message["share"])
    if message["kind"] == "judging":
        return Judging(tuple(message["ids"]))
    return Judged(
        message["id"],
        _unpack_weights(message["weights"]),
        Verdict(**message["verdict"]),
        message["numbers"],
        message["base_hash"],
        message["began"],
        message["finished"],
        message["opposed"],
    )


if __name__ == "__main__":
    main()
