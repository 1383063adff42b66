from datetime import UTC, datetime, timedelta

from personalization.history import Turn
from personalization.store import Store

START = datetime(2026, 5, 1, 12, tzinfo=UTC)


def turn(name, minute=0, role="user", author=None, text=None, conversation="c", **more):
    return Turn(
        id=name,
        conversation=conversation,
        at=START + timedelta(minutes=minute),
        role=role,
        text=text or f"text of {name}",
        author=author or ("person" if role == "user" else "model"),
        **more,
    )


async def test_x(store: Store):
    assert await store.append("ann", [turn("a"), turn("b", 1, "assistant"), turn("c", 0)]) == 3
    assert [t.id for t in await store.turns("ann")] == ["a", "c", "b"]
    assert [t.id for t in await store.recent("ann", 2)] == ["c", "b"]
    c = await store.correct("ann", "b", "better")
    print(await store.conversations("ann"), await store.turns("ann"))
    print(await store.learned_count("ann"), await store.pointer("ann"))
    async with store.events() as ev:
        assert await store.compare_and_set("ann", 0, await store.next_version("ann"))
        print(await anext(ev))
        print(await store.forget("ann"))
        print(await anext(ev))
    assert await store.create_response("ann", "r1", b"{}", holder="g", lease_s=5, ttl_s=100)
    await store.append_response_events("r1", 0, [b"a", b"b"], holder="g", ttl_s=100)
    await store.append_response_events("r1", 0, [b"a", b"b", b"c"], holder="g", ttl_s=100)
    assert await store.read_response_events("r1", 0) == [(1, b"b"), (2, b"c")]
    assert await store.read_response_events("r1") == [(0, b"a"), (1, b"b"), (2, b"c")]
    await store.finish_response("r1", "completed", b"x", holder="g", ttl_s=100)
    print(await store.response("ann", "r1"), await store.orphans())
    print([u async for u in store.users()])
