"""A gateway as a process of its own, for tests that kill it: python -m tests.gateway_program '{…}'.

Prints its port when it serves. The arguments are paths and addresses, as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from engine.client import EngineClient
from personalization.prompt import Renderer
from personalization.store import Store, connect
from service.app import GatewayDeps, GatewayOptions, build_app
from service.gateway import Server, server_config
from service.replies import Patience


async def unused(*_: Any) -> Any:
    raise AssertionError("not part of these tests")


async def main(given: dict[str, str]) -> None:
    store = Store(connect(given["redis"]), given["secret"].encode())
    engine = await EngineClient.connect(Path(given["engine"]))
    options = GatewayOptions(
        token_key=given["token_key"].encode(),
        base_model="tiny",
        adapter_root=Path(given["adapters"]),
        page_folder=Path(given["adapters"]),
        patience=Patience(orphan=60.0, keep=5.0, lease=1.0, follow=0.02, ttl=60.0),
    )
    app = build_app(
        GatewayDeps(
            store=store,
            engine=engine,
            renderer=Renderer(Path(given["model"]), engine.info.context_length),
            options=options,
            refresh=unused,
            rollback=unused,
            forget=unused,
            refreshes=unused,
        )
    )
    server = Server(server_config(app, host="127.0.0.1", port=0))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done(), serving.exception()
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
