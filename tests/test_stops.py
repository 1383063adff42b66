"""Stop strings cut text at the same place however it arrived."""

from hypothesis import example, given
from hypothesis import strategies as st

from service.stops import StopText


def test_text_without_stop_strings_passes_at_once() -> None:
    stops = StopText(())
    assert stops.push("abc") == "abc"
    assert stops.flush() == ""


def test_a_stop_string_broken_over_pieces_is_cut() -> None:
    stops = StopText(("STOP",))
    assert stops.push("go ST") == "go "
    assert stops.push("O") == ""
    assert stops.push("P and more") == ""
    assert stops.stopped
    assert stops.push("x") == ""


def test_a_false_start_is_shown_once_it_cannot_become_the_stop() -> None:
    stops = StopText(("STOP",))
    assert stops.push("a ST") == "a "
    assert stops.push("EM") == "STEM"
    assert stops.push("ST") == ""
    assert stops.flush() == "ST"
    assert not stops.stopped


@example(["a", "b", "b"], ["b", "abb"])  # the shorter is complete before the longer, which began first
@example(["abb"], ["b", "abb"])
@example(["a", "ab"], ["b", "ab"])
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_pieces_do_not_matter(pieces: list[str], stop_strings: list[str]) -> None:
    text = "".join(pieces)
    cuts = [(at + len(stop), at) for stop in stop_strings if (at := text.find(stop)) >= 0]
    expected = text[: min(cuts)[1]] if cuts else text
    stops = StopText(tuple(stop_strings))
    shown = "".join(stops.push(piece) for piece in pieces)
    assert expected.startswith(shown)
    assert shown + stops.flush() == expected
    assert stops.stopped is bool(cuts)
