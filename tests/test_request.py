"""Requests refuse what could not be answered, and sequences count what is done."""

from typing import Any

import pytest

from engine.request import AdapterRef, InvalidRequest, Request, SamplingParams, Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", 2.0),
        ("seed", 2**63),
        ("max_tokens", 0),
    ],
)
def test_sampling_out_of_range_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.code == "invalid_request"


def test_an_adapter_version_starts_at_one() -> None:
    with pytest.raises(InvalidRequest, match=r"adapter\.version: expected an integer from 1, got 0"):
        AdapterRef("ada", 0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"id": ""}, "id"), ({"prompt": ()}, "prompt"), ({"generated": (1, 2, 3)}, "generated")],
)
def test_a_request_needs_an_id_a_prompt_and_room_for_what_it_has(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request(**{"id": "r", "prompt": (1,), "sampling": SamplingParams(max_tokens=2), **changes})
    assert caught.value.field == field


def test_generated_tokens_count_as_output() -> None:
    sequence = Sequence(Request("r", (1, 2, 3), generated=(4, 5)))
    assert sequence.tokens == [1, 2, 3, 4, 5]
    assert (sequence.num_prompt, sequence.num_output, sequence.num_pending) == (3, 2, 5)


def test_kv_is_labelled_with_the_adapter_and_the_user() -> None:
    assert Sequence(Request("r", (1,), adapter=AdapterRef("ada", 1), user_key="u")).labels == {"ada", "u"}
    assert Sequence(Request("r", (1,))).labels == frozenset()
