"""The house keeps its rules: who may import whom, and where the outside world is touched."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "engine", "personalization", "service")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# What learning shares with serving.
MODEL_SIDE = {f"engine.{name}" for name in ("model", "weights", "adapter_files", "lending")}
# A library or module and the only files that may touch it.
ONLY_IN = {
    "redis": {f"personalization/{name}.py" for name in ("store", "store_lua", "jobs", "worker")},
    "triton": {path.as_posix() for path in FILES if path.parts[0] == "kernels"},
    "asyncio": {p.as_posix() for p in FILES if p.parts[0] != "engine"}
    | {"engine/server.py", "engine/client.py"},
}
ENVIRONMENT = {"os.environ", "os.getenv", "sys.argv"}
ENTRIES = {"service/cli.py", "service/leash.py"}  # programs; everything else is given what it needs
NOT_OURS = {"node_modules", "dist", "data", "carry", "__pycache__"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module a file imports, as `room.module`; names taken from a room count as its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names] if node.module in ROOMS else [node.module]
            )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = path.parts[0]
    for module in imported(ast.parse((ROOT / path).read_text())):
        top = module.split(".")[0]
        if top in ROOMS:
            assert ROOMS.index(top) <= ROOMS.index(room), f"{path} imports {module}, which is above it"
            if (room, top) == ("personalization", "engine"):
                assert module in MODEL_SIDE, (
                    f"{path} imports {module}; it may share only {sorted(MODEL_SIDE)}"
                )
        assert path.as_posix() in ONLY_IN.get(top, {path.as_posix()}), f"{path} imports {top}"


@pytest.mark.parametrize("path", [p for p in FILES if p.as_posix() not in ENTRIES], ids=str)
def test_environment_and_arguments_are_read_at_the_entry_only(path: Path) -> None:
    used = {
        ast.unparse(n) for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Attribute)
    }
    assert not used & ENVIRONMENT


def test_the_readme_names_every_file_of_the_house_once_with_a_line() -> None:
    house = re.search(r"## The house\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    assert house
    named: list[str] = []
    for line in house[1].splitlines():
        if match := re.match(r"(\w+)/ ", line):
            room = match[1]
        elif match := re.match(r" {2,}([\w/]+\.py) +\w", line):
            named.append(f"{room}/{match[1]}")
    # A file with nothing in it but what it is for need not be named.
    expected = [path.as_posix() for path in FILES if len(ast.parse((ROOT / path).read_text()).body) > 1]
    assert sorted(named) == expected


def test_the_readme_names_what_the_wire_has() -> None:
    wire = re.search(r"## The wire\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    assert wire
    asked = re.findall(r'tag="([\w.]+)"', (ROOT / "service/protocol.py").read_text())
    assert asked
    assert [tag for tag in asked if f"`{tag}`" not in wire[1]] == []
    ours = re.findall(r'Route\(\s*"(/attune/\w+(?:/\w+)?)', (ROOT / "service/attune_api.py").read_text())
    assert ours
    assert [path for path in ours if path not in wire[1] and path != "/attune/demo/session"] == []


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = re.compile(
        rb"py" rb"pi\.org|python" rb"hosted|npm" rb"js\.(?:org|com)|deb\.debian\.|yarnpkg\.com"
    )
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in NOT_OURS and not name.startswith(".")]
        for path in (Path(folder, name) for name in files if not name.endswith(".safetensors")):
            assert not hosts.search(path.read_bytes()), f"{path.relative_to(ROOT)} names a registry host"
