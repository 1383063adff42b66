"""Stop strings: text in, text out, cut before the stop string that is complete first. Pure."""

from collections.abc import Sequence


class StopText:
    """Cuts a stream of text before the stop string that is complete first (of those complete at the same
    character, the longest), wherever the pieces were broken.

    A tail that could still become a stop string is held back until it cannot. What has come out after a
    number of pushes depends on the joined text alone, so a reply can be taken up again from its tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of everything held and `text` that is safe to show. Nothing after the stop."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
