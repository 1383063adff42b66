"""Waiting for what another task, thread or process brings about, where there is no event to wait on."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Return once it is true. Raises TimeoutError after so long, which only a hang takes."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
