"""Log lines: one form for ours and the libraries', text or JSON."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog

from service import logs


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers, root.level
    yield
    root.handlers, root.level = before
    structlog.reset_defaults()


def test_a_line_says_when_how_bad_who_what_and_the_facts() -> None:
    out = io.StringIO()
    logs.configure("engine", stream=out)
    structlog.get_logger().info("engine.loaded", model="demo", seconds=1.5)
    when, rest = out.getvalue().split(" ", 1)
    assert len(when.split(":")) == 3
    assert rest == "info    engine   engine.loaded model=demo seconds=1.5\n"


def test_the_libraries_lines_look_the_same_and_say_less() -> None:
    out = io.StringIO()
    logs.configure("gateway", stream=out)
    logging.getLogger("uvicorn.error").warning("port %d is %s", 80, "busy")
    logging.getLogger("uvicorn.access").info("GET /")
    assert out.getvalue().endswith("warning gateway  port 80 is busy\n")
    assert out.getvalue().count("\n") == 1


def test_json_lines_carry_the_same_facts_and_the_traceback() -> None:
    out = io.StringIO()
    logs.configure("worker", form="json", stream=out)
    try:
        raise ValueError("no")
    except ValueError:
        structlog.get_logger().error("job.failed", job="j1", exc_info=sys.exc_info())
    line = json.loads(out.getvalue())
    assert (line["event"], line["process"], line["level"], line["job"]) == (
        "job.failed",
        "worker",
        "error",
        "j1",
    )
    assert "ValueError: no" in line["exception"]


def test_what_is_below_the_level_is_not_written() -> None:
    out = io.StringIO()
    logs.configure("engine", level="warning", stream=out)
    structlog.get_logger().info("quiet")
    assert out.getvalue() == ""
