"""`tiny_model` and `service`. A test module that wants them says `pytest_plugins =
("tests.service_fixtures",)`: importing fixtures by name would hide the tests' own arguments."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from personalization.store import Store
from tests.tiny_service import EngineProcess, TinyModel, TinyService


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel.make(tmp_path_factory.mktemp("tiny") / "model")


@pytest_asyncio.fixture
async def service(tiny_model: TinyModel, store: Store, tmp_path: Path) -> AsyncIterator[TinyService]:
    """Store and engine; start as many gateways on them as the test needs. The engine's books must balance."""
    adapter_root, page = tmp_path / "adapters", tmp_path / "page"
    adapter_root.mkdir()
    (page / "assets").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>Attune</title>")
    (page / "assets" / "app-1a2b.js").write_text("1")
    with tempfile.TemporaryDirectory(prefix="attune-") as short:  # socket paths end at some 100 characters
        engine = EngineProcess(tiny_model, adapter_root, Path(short) / "engine.sock")
        await engine.start()
        yield TinyService(tiny_model, store, engine, adapter_root, page)
        await engine.check()
        await engine.stop()
