"""Log lines of all processes in one form: `12:03:44 info    engine   engine.ready model=demo`, or JSON."""

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

NAME_WIDTH, LEVEL_WIDTH = 8, 7
# Below a warning these only repeat us.
QUIET = (
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
    "saq",
    "httpx",
    "urllib3",
    "filelock",
    "huggingface_hub",
)


def _line(_: WrappedLogger, __: str, event: EventDict) -> str:
    """time level process event key=value…; a traceback, when there is one, on the lines below."""
    trace = event.pop("exception", None)
    head = f"{event.pop('timestamp')} {event.pop('level'):{LEVEL_WIDTH}} {event.pop('process'):{NAME_WIDTH}}"
    event.pop("color_message", None)  # uvicorn's own copy of the event
    pairs = "".join(f" {key}={value}" for key, value in event.items() if key != "event")
    line = f"{head} {event['event']}{pairs}"
    return f"{line}\n{trace}" if trace else line


def configure(process: str, level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Send our log lines and those of the libraries to `stream` (standard error), one line each."""

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    as_json = form == "json"
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        name_process,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
        structlog.processors.format_exc_info,
    ]
    last: Processor = structlog.processors.JSONRenderer() if as_json else _line
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
