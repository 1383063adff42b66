"""What can be done for a person besides talking: refresh, roll back, import an adapter, forget.

One place for the gateway and for the commands. Rooms that load torch are imported by the first action that
needs one, in a thread: the gateway's streams must not wait for that.
"""

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.request import Forgotten as EngineForgotten
from personalization.jobs import QueueStats, cancel_jobs, open_queue, queue_stats, request_refresh
from personalization.store import Store
from service.forget import EngineCaches, Removed, forget
from service.model_folder import resolve_model
from service.settings import Settings


class NotPossible(LookupError):
    """It cannot be done as asked; the message says expected and got."""


@dataclass(frozen=True)
class _Caches:
    """What the engine holds. It is looked for when it is asked: what goes before needs none."""

    engine: Callable[[], Awaitable[EngineCaches]]

    async def forget(self, adapter_id: str) -> EngineForgotten:
        return await (await self.engine()).forget(adapter_id)


class Actions:
    """Bound to one installation. `engine` gives a connected client when one is needed."""

    def __init__(
        self, settings: Settings, store: Store, redis: Any, engine: Callable[[], Awaitable[Any]]
    ) -> None:
        self._settings = settings
        self._store = store
        self._redis = redis
        self._queue = open_queue(redis)
        self._engine = engine

    async def refresh(self, user: str, reason: str) -> dict[str, Any]:
        """Queue a refresh, or join the one that is under way: `{job_id, state}`."""
        asked = await request_refresh(self._queue, self._store, user, reason)
        return {"job_id": asked.job_id, "state": asked.state}

    async def refreshes(self) -> QueueStats:
        """How many are to come, under way and ended."""
        return await queue_stats(self._queue)

    async def rollback(self, user: str, version: int) -> int:
        """Let `version` answer again (0: the base); returns the one that answered. Raises NotPossible."""
        publish = await _load("personalization.publish")
        with _told_plainly():
            before = await publish.rollback(await self._shelf(), self._store, user, version)
        return int(before.version)

    async def import_adapter(self, user: str, folder: Path) -> int:
        """Publish a PEFT folder as the person's next version; returns its number. Raises NotPossible."""
        publish = await _load("personalization.publish")
        info = (await self._engine()).info
        with _told_plainly():
            version = await publish.import_adapter(
                await self._shelf(),
                self._store,
                user,
                folder,
                base_model=info.model_name,
                base_hash=info.base_hash,
            )
        return int(version)

    async def forget(self, user: str) -> Removed:
        """Remove everything of the person, everywhere."""
        publish = await _load("personalization.publish")
        return await forget(
            user,
            store=self._store,
            redis=self._redis,
            engine=_Caches(self._engine),
            cancel_jobs=lambda who: cancel_jobs(self._queue, self._store, who),
            remove_versions=lambda adapter_id: publish.remove_versions(
                self._settings.adapter_root, adapter_id
            ),
        )

    async def _shelf(self) -> Any:
        weights, publish = await _load("engine.weights"), await _load("personalization.publish")
        folder = await asyncio.to_thread(resolve_model, self._settings.model)
        config = await asyncio.to_thread(weights.read_config, folder)
        return publish.Shelf(self._settings.adapter_root, config)


async def _load(module: str) -> Any:
    return await asyncio.to_thread(importlib.import_module, module)


@contextmanager
def _told_plainly() -> Iterator[None]:
    """What is wrong with a version or with its files, as one NotPossible."""
    from engine.adapter_files import AdapterError
    from personalization.publish import PublishError

    try:
        yield
    except (PublishError, AdapterError) as error:
        raise NotPossible(str(error)) from None
