"""Puts the built page into the wheel: `web/dist` becomes `service/page`."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PageHook(BuildHookInterface):  # type: ignore[type-arg]
    """A wheel without the page would install and then serve nothing, so a missing page stops the build."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # a checkout serves web/dist where it lies
            return
        page = Path(self.root) / "web" / "dist"
        if not (page / "index.html").is_file():
            raise FileNotFoundError(f"{page} is not built: run `make page` first")
        build_data["force_include"][str(page)] = "service/page"
