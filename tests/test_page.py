"""The page in a real browser on the whole service: what a person sees, presses and types.

One service and one browser for all; each test is a person of its own on a fresh profile. Every page is
watched: a request to another host, a breach of its policy or an uncaught error fails the test that caused it.
"""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import (
    APIResponse,
    Browser,
    ConsoleMessage,
    Page,
    Request,
    Route,
    WebSocket,
    WebSocketRoute,
    expect,
    sync_playwright,
)

from engine.adapter_files import LoraModule, LoraWeights
from engine.weights import load_model, read_config
from personalization.publish import Origin, Shelf, note_refusal, publish
from personalization.store import Store, connect
from service import demo_model
from service.settings import Settings, read_or_create_secret
from tests.running_service import RunningService, running_service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
REPLY_MS = 60_000
expect.set_options(timeout=REPLY_MS)  # what is expected at once comes late on a machine with other work
# The sample people, who are refreshed at the first start, may be before us, on a machine with other work.
REFRESH_MS = 300_000

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("page") / "data"
    # A model this small is moved by anything it learns.
    settings = {"auto_refresh_after": "0", "nightly_hour": "none", "demo_users": "on", "max_drift": "100"}
    with running_service(folder, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(service: RunningService, browser: Browser) -> Iterator[Open]:
    """`open_page("ann")` is ann's page, live; her problems are collected and must be none at the end."""
    contexts, problems = [], []
    home = urlsplit(service.address).netloc

    def watch_request(request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != home:
            problems.append(f"asked {request.url}")

    def watch_console(message: ConsoleMessage) -> None:
        # A refused or missing answer is logged as an error too; what may never be is a breach of the policy.
        if message.type == "error" and "Content Security Policy" in message.text:
            problems.append(message.text)

    def start(
        user: str, viewport: dict[str, int] = DESK, scheme: str = "light", *, touch: bool = False
    ) -> Page:
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, locale="en-GB", has_touch=touch, is_mobile=touch
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch_request)
        page.on("console", watch_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        known = json.dumps(json.dumps(user))
        context.add_init_script(f"localStorage['attune.user'] = localStorage['attune.user'] || {known}")
        page.goto(service.address)
        expect(page.locator(".link")).to_have_attribute("data-state", "live")
        return page

    yield start
    for context in contexts:
        context.close()
    assert problems == []


@contextmanager
def engine_paused(service: RunningService) -> Iterator[None]:
    """No token is made inside the block: what happens there happens in the middle of a reply."""
    engine = service.pids()["engine"]
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def reply_named(page: Page) -> None:
    """The service took the message and the page knows the reply's id. Asked from outside: a predicate inside
    the page would need eval, which its policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate("Object.values(sessionStorage).some(value => value.includes('resp_'))"):
        assert time.monotonic() < deadline, "no reply was begun"
        page.wait_for_timeout(20)


def reply_ended(page: Page, count: int = 1) -> None:
    """The `count`-th reply has its badge."""
    expect(page.locator(".reply .badge")).to_have_count(count, timeout=REPLY_MS)
    expect(page.locator(".reply .badge").nth(count - 1)).to_be_visible(timeout=REPLY_MS)


def history(user: str, turns: int = 60) -> bytes:
    """Someone who always talks the same way, about something else each time: easy to learn, so that the gate,
    which leaves out words it has seen, lets it pass."""
    things = ("harbour", "weather", "kitchen", "garden", "music", "morning", "evening", "road")
    states = ("quiet", "warm", "old", "good", "cold", "new", "long", "green")
    lines = []
    for number in range(turns):
        for second, role, word in ((0, "user", "captain"), (30, "assistant", "parrot")):
            thing, state = things[number % 8], states[number // 8 % 8]
            text = f"Ahoy, {word}! The {thing} is {state} and the tea is hot, said the ahoy {word}."
            at = f"2025-03-{1 + number // 10:02}T10:{number % 10:02}:{second:02}Z"
            turn = {"user": user, "conversation": f"old-{number // 10}", "at": at, "role": role}
            lines.append(json.dumps(turn | {"text": text, "author": "person", "rating": None}))
    return "\n".join(lines).encode()


def bring_in(page: Page, content: bytes) -> None:
    page.locator("summary", has_text="Your data").click()
    file = {"name": "history.jsonl", "mimeType": "application/x-ndjson", "buffer": content}
    page.get_by_label("History file").set_input_files([file])
    expect(page.locator(".fold .outcome")).to_contain_text("brought in", timeout=REPLY_MS)


def test_a_reply_streams_in_and_says_which_version_wrote_it(open_page: Open) -> None:
    page = open_page("streamer")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    say(page, "Hello! What do you like to do on a rainy Sunday?")
    expect(page.locator(".bubble")).to_have_text("Hello! What do you like to do on a rainy Sunday?")
    reply_ended(page)
    expect(page.locator(".reply .prose")).not_to_be_empty()
    expect(page.locator(".reply .badge")).to_have_text(re.compile(r"^base · \d+ history turns?"))
    page.locator(".reply .badge").click()
    expect(page.locator(".details")).to_contain_text("First word after")
    expect(page.locator(".conversation[aria-current]")).to_contain_text("Hello! What do you like")
    expect(page.locator("#announcements")).to_contain_text("Attune says:")


def test_stopping_ends_the_reply_and_leaves_room_for_the_next(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("stopper")
    with engine_paused(service):
        say(page, "Tell me a long story.")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        page.wait_for_timeout(2000)  # nothing tells that it has come through, and eight tokens take 10 ms
    expect(page.locator(".reply .note")).to_have_text("Stopped.", timeout=REPLY_MS)
    page.get_by_role("button", name="Another reply").click()
    reply_ended(page)
    expect(page.locator(".bubble")).to_have_count(1)


def test_escape_in_a_dialog_closes_the_dialog_alone(open_page: Open, service: RunningService) -> None:
    page = open_page("hesitant")
    page.locator("summary", has_text="Your data").click()
    with engine_paused(service):
        say(page, "Tell me a long story.")
        reply_named(page)
        page.get_by_role("button", name="Forget me").click()
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_have_count(0)
        page.wait_for_timeout(1000)  # nothing tells that no stop has come through
    reply_ended(page)
    expect(page.locator(".reply .note")).to_be_hidden()


def test_a_reload_in_the_middle_of_a_reply_takes_it_up_again(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("reloader")
    with engine_paused(service):
        say(page, "What did you read last?")
        reply_named(page)
        page.get_by_label("Message", exact=True).fill("a draft that is kept")
        page.reload()
        expect(page.locator(".bubble")).to_have_text("What did you read last?")
        expect(page.locator(".reply")).to_have_attribute("aria-busy", "true")
    reply_ended(page)
    expect(page.locator(".reply .prose")).not_to_be_empty()
    expect(page.get_by_label("Message", exact=True)).to_have_value("a draft that is kept")
    text = page.locator(".reply .prose").inner_text()
    page.reload()
    expect(page.locator(".reply .prose")).to_have_text(text, use_inner_text=True)


def reloaded_without_its_conversation(page: Page) -> list[Route]:
    """Something was said on the page, which is then reloaded. The conversation comes once the first of these
    routes goes on."""
    say(page, "What did you read last?")
    reply_ended(page)
    held: list[Route] = []
    page.route("**/attune/conversations/*", lambda route: held.append(route))
    page.reload()
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    return held


def test_what_is_said_before_the_conversation_has_come_stays_on_the_page(open_page: Open) -> None:
    page = open_page("hasty")
    held = reloaded_without_its_conversation(page)
    say(page, "And before that?")
    reply_ended(page)
    held[0].continue_()
    expect(page.locator(".bubble")).to_have_text(["What did you read last?", "And before that?"])
    expect(page.locator(".reply")).to_have_count(2)


def test_a_message_that_is_said_as_the_conversation_comes_stays_below_it(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("hastier")
    held = reloaded_without_its_conversation(page)
    with engine_paused(service):
        say(page, "And before that?")
        reply_named(page)
        held[0].continue_()
        expect(page.locator(".bubble")).to_have_text(["What did you read last?", "And before that?"])
    reply_ended(page, 2)


def two_replies_and_a_reload(page: Page) -> None:
    """Two conversations whose replies are being written; the second one is open."""
    say(page, "What is the first thing?")
    reply_named(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "What is the second thing?")
    expect(page.locator(".reply")).to_have_attribute("aria-busy", "true")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("What is the second thing?")
    expect(page.locator(".reply")).to_have_attribute("aria-busy", "true")


def test_a_reload_forgets_no_reply_of_a_conversation_that_is_not_open(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("juggler")
    with engine_paused(service):
        two_replies_and_a_reload(page)
        page.locator(".conversation", has_text="What is the first thing?").click()
        expect(page.locator(".bubble")).to_have_text("What is the first thing?")
        expect(page.locator(".reply")).to_have_attribute("aria-busy", "true")
    reply_ended(page)


def test_forgetting_in_the_middle_of_replies_keeps_no_word_of_them_in_the_browser(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("deserter")
    with engine_paused(service):
        two_replies_and_a_reload(page)
        page.locator("summary", has_text="Your data").click()
        page.get_by_role("button", name="Forget me").click()
        page.get_by_label("Your name").fill("deserter")
        page.get_by_role("button", name="Forget everything").click()
    expect(page.locator(".conversation")).to_have_count(0)
    expect(page.locator(".bubble")).to_have_count(0)
    assert page.evaluate("Object.values(sessionStorage).filter(kept => kept.includes('thing'))") == []


def test_an_attempt_to_connect_that_fails_late_does_not_unsettle_the_one_that_succeeded(
    open_page: Open,
) -> None:
    page = open_page("roamer")
    held: list[Route] = []
    sockets: list[WebSocket] = []

    def hold_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/attune/tickets", hold_first)
    page.on("websocket", lambda opened: sockets.append(opened))
    page.reload(wait_until="commit")
    deadline = time.monotonic() + 60
    while not held:
        assert time.monotonic() < deadline, "no ticket was asked for"
        page.wait_for_timeout(20)
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/attune/tickets")):
        held[0].abort()
    say(page, "Are you still there?")
    reply_ended(page)
    assert len(sockets) == 1  # not one for which the page waited until the first had been silent for long


def lose_the_first(page: Page, kind: str) -> list[str]:
    """The first message of this kind gets lost with the connection that it is sent on; what was sent before
    is in the list then."""
    lost: list[str] = []

    def open_socket(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def carry(message: str | bytes) -> None:
            if lost or json.loads(message)["type"] != kind:
                server.send(message)
            else:
                lost.append(str(message))
                server.close()
                socket.close(code=1001)

        socket.on_message(carry)

    page.route_web_socket("**/v1/responses", open_socket)
    page.reload()
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    return lost


def test_a_stop_that_is_lost_with_the_connection_is_sent_again(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("breaker")
    lost = lose_the_first(page, "response.cancel")
    with engine_paused(service):
        say(page, "Tell me a long story.")
        reply_named(page)
        page.keyboard.press("Escape")
        page.wait_for_timeout(2000)  # nothing tells that it has come through
        expect(page.locator(".link")).to_have_attribute("data-state", "live")
    expect(page.locator(".reply .note")).to_have_text("Stopped.", timeout=REPLY_MS)
    assert lost


def test_a_rating_that_is_lost_with_the_connection_is_sent_again(open_page: Open) -> None:
    page = open_page("rater")
    lost = lose_the_first(page, "feedback.create")
    say(page, "How are you?")
    reply_ended(page)
    page.get_by_role("button", name="Good reply: learn from it").click()
    expect(page.locator(".count")).to_have_text("2")
    assert lost


def test_what_was_said_elsewhere_while_the_connection_was_away_is_seen_when_it_is_back(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("absent")
    sockets: list[WebSocketRoute] = []

    def carry(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page.route_web_socket("**/v1/responses", carry)
    page.reload()
    say(page, "How are you?")
    reply_ended(page)
    conversation = page.url.partition("#c=")[2]
    turn = {"user": "absent", "conversation": conversation, "role": "user", "at": f"{datetime.now(UTC)}"}
    service.attune("import", "-", text=json.dumps(turn | {"text": "From a file."}))
    sockets[-1].close(code=1001)
    expect(page.locator(".bubble")).to_have_text(["How are you?", "From a file."])


def test_a_gateway_that_dies_costs_no_word_of_the_reply(open_page: Open, service: RunningService) -> None:
    page = open_page("survivor")
    with engine_paused(service):
        say(page, "Do you like dogs?")
        reply_named(page)
        old = service.kill("gateway")
        expect(page.locator(".link")).to_have_attribute("data-state", "resuming")
        expect(page.locator(".reply .note")).to_contain_text("goes on when it is back")
        service.wait_restarted("gateway", old)
    expect(page.locator(".link")).to_have_attribute("data-state", "live", timeout=REPLY_MS)
    reply_ended(page)
    expect(page.locator(".reply .problem")).to_be_hidden()
    expect(page.locator(".bubble")).to_have_count(1)


def test_what_is_said_in_one_tab_or_by_a_command_is_seen_in_the_other(
    open_page: Open, service: RunningService
) -> None:
    here = open_page("twofold")
    say(here, "How are you?")
    reply_ended(here)
    there = here.context.new_page()
    there.goto(here.url)
    expect(there.locator(".bubble")).to_have_text(["How are you?"])
    here.get_by_role("button", name="Side by side").click()
    say(here, "What do you like?")
    expect(here.locator(".card .choose")).to_have_count(2)
    here.get_by_role("button", name="Side by side").click()
    say(there, "And now?")
    reply_ended(there, 2)
    expect(here.locator(".bubble")).to_have_text(["How are you?", "And now?"])
    expect(here.locator(".reply")).to_have_count(2)
    expect(here.locator(".item").nth(2)).to_have_class(re.compile("compare"))  # stays where it stood
    expect(here.locator(".reply .badge").first).to_contain_text("history turn")  # what was known is kept
    here.get_by_role("button", name="Good reply: learn from it").last.click()
    liked = there.get_by_role("button", name="Good reply: learn from it").last
    expect(liked).to_have_attribute("aria-pressed", "true")
    there.get_by_role("button", name="Correct this reply").first.click()
    there.get_by_label("What it should have said").fill("Grand.")
    there.get_by_role("button", name="Save correction").click()
    expect(here.locator(".reply .prose").first).to_have_text("Grand.")
    conversation = here.url.partition("#c=")[2]
    turn = {"user": "twofold", "conversation": conversation, "role": "user", "at": f"{datetime.now(UTC)}"}
    service.attune("import", "-", text=json.dumps(turn | {"text": "From a file."}))
    for page in (here, there):
        page.evaluate("dispatchEvent(new Event('focus'))")
        expect(page.locator(".bubble")).to_have_text(["How are you?", "And now?", "From a file."])
        expect(page.locator(".reply")).to_have_count(2)
    # Who reads further up stays there.
    service.attune("import", "-", text=json.dumps(turn | {"text": "A long one. " * 1000}))
    there.evaluate("dispatchEvent(new Event('focus'))")
    expect(there.locator(".bubble")).to_have_count(4)
    expect(there.get_by_role("button", name="To the newest")).to_be_hidden()
    there.locator(".scroller").evaluate("scroller => scroller.scrollTo(0, 0)")
    service.attune("import", "-", text=json.dumps(turn | {"text": "One more."}))
    there.evaluate("dispatchEvent(new Event('focus'))")
    expect(there.locator(".bubble")).to_have_count(5)
    assert there.locator(".scroller").evaluate("scroller => scroller.scrollTop") == 0
    expect(there.get_by_role("button", name="To the newest")).to_be_visible()


def test_a_press_that_begins_while_the_lists_are_asked_for_anew_is_not_lost(open_page: Open) -> None:
    page = open_page("returner")
    say(page, "What is the first thing?")
    reply_ended(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "What is the second thing?")
    reply_ended(page)
    page.wait_for_timeout(1000)  # nothing of the reply is asked for any more
    row = page.locator(".conversation", has_text="What is the first thing?")
    row.hover()
    with page.expect_response("**/attune/conversations"):
        page.mouse.down()
        page.evaluate("dispatchEvent(new Event('focus'))")  # as the press gives it to a window that had none
    page.wait_for_timeout(200)
    expect(row).to_be_focused()
    page.mouse.up()
    expect(page.locator(".bubble")).to_have_text("What is the first thing?", timeout=10_000)


def test_an_answer_that_is_older_than_what_was_said_since_does_not_hide_it(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("overtaken")
    say(page, "How are you?")
    reply_ended(page)
    conversation = page.url.partition("#c=")[2]
    held: list[tuple[Route, APIResponse]] = []
    holding = True

    def hold(route: Route) -> None:
        held.append((route, route.fetch()))
        if not holding:
            let_go()

    def look_again(text: str) -> None:
        turn = {"user": "overtaken", "conversation": conversation, "role": "user", "text": text}
        service.attune("import", "-", text=json.dumps(turn | {"at": f"{datetime.now(UTC)}"}))
        page.evaluate("dispatchEvent(new Event('focus'))")
        page.wait_for_timeout(300)

    def let_go() -> None:
        """In the order in which they were asked for."""
        while held:
            route, answer = held.pop(0)
            route.fulfill(response=answer)

    page.wait_for_timeout(1000)  # nothing of the reply is asked for any more
    page.route("**/attune/conversations/*", hold)
    look_again("From a file.")
    look_again("From another.")
    holding = False
    let_go()
    expect(page.locator(".bubble")).to_have_text(["How are you?", "From a file.", "From another."])
    holding = True
    look_again("From a third.")
    liked = page.get_by_role("button", name="Good reply: learn from it")
    liked.click()
    page.wait_for_timeout(500)
    holding = False
    let_go()
    expect(page.locator(".bubble")).to_have_count(4)
    expect(liked).to_have_attribute("aria-pressed", "true")


def test_base_and_mine_answer_side_by_side_and_nothing_of_it_is_kept(open_page: Open) -> None:
    page = open_page("comparer")
    page.get_by_role("button", name="Side by side").click()
    page.get_by_text("Hide which is which").click()
    say(page, "What music do you like?")
    cards = page.locator(".compare .card")
    expect(cards).to_have_count(2)
    expect(page.get_by_role("button", name="Better")).to_have_count(2, timeout=REPLY_MS)
    expect(cards.locator("h3")).to_have_text(["Reply A", "Reply B"])
    # Without an adapter both are the same model, so the same seed must give the same words.
    first, second = cards.locator(".prose").all_inner_texts()
    assert first.strip()
    assert first == second
    page.get_by_role("button", name="No difference").click()
    expect(page.locator(".verdict")).to_contain_text("no difference 1")
    assert sorted(cards.locator("h3").all_inner_texts()) == ["Base", "Yours"]
    page.reload()
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    expect(page.locator(".conversation")).to_have_count(0)


def test_markup_in_messages_and_replies_never_runs(open_page: Open) -> None:
    evil = (
        "<script>window.ran=1</script><img src=x onerror='window.ran=2'>"
        "<svg onload='window.ran=3'></svg><iframe srcdoc='<script>parent.ran=4</script>'></iframe>"
        "[press](javascript:window.ran=5) ![spy](http://example.invalid/p.png) "
        "<style>body{display:none}</style>\n\n"
        "**kept** and `code` and [a link](https://example.invalid/x)"
    )
    turns = [
        {
            "user": "target",
            "conversation": "evil",
            "at": f"2025-04-01T10:0{at}:00Z",
            "role": role,
            "text": evil,
        }
        for at, role in enumerate(("user", "assistant"))
    ]
    page = open_page("target")
    bring_in(page, "\n".join(json.dumps(turn) for turn in turns).encode())
    page.locator(".conversation").click()
    reply = page.locator(".reply .prose")
    expect(reply.locator("strong")).to_have_text("kept")
    expect(page.locator(".bubble")).to_have_text(evil, use_inner_text=True)
    assert page.locator(".items").locator("script, img, svg:not(.icon), iframe, style").count() == 0
    targets = reply.locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert all(target is None or target.startswith(("https://", "http://")) for target in targets)
    assert reply.get_by_text("a link").get_attribute("rel") == "noopener noreferrer nofollow"
    assert page.evaluate("window.ran") is None


def test_switching_person_changes_history_and_colour_and_leaves_nothing_behind(open_page: Open) -> None:
    page = open_page("first-person")
    say(page, "A secret of the first person")
    reply_ended(page)
    hue = "getComputedStyle(document.documentElement).getPropertyValue('--hue')"
    before = page.evaluate(hue)
    page.get_by_role("button", name="Switch person").click()
    expect(page.locator(".choice b")).to_have_text(["Bram", "Odile", "Wen"])
    page.get_by_label("Be someone else: any name").fill("Wen")
    page.keyboard.press("Enter")
    expect(page.locator(".person-name")).to_have_text("Wen")
    expect(page.locator(".person-note")).to_have_text("Sample: night-shift astronomer")
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    assert page.evaluate(hue) != before
    expect(page.get_by_text("A secret of the first person")).to_have_count(0)


def test_a_pasted_token_is_its_persons_and_nobody_elses(open_page: Open, service: RunningService) -> None:
    page = open_page("visitor")
    page.evaluate(f"sessionStorage['attune.token'] = {json.dumps(json.dumps(service.token('holder')))}")
    page.reload()
    expect(page.locator(".person-name")).to_have_text("holder")
    page.get_by_role("button", name="Switch person").click()
    page.get_by_label("Be someone else: any name").fill("another")
    page.keyboard.press("Enter")
    expect(page.locator(".person-name")).to_have_text("another")
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    say(page, "Whose is this?")
    reply_ended(page)
    page.reload()
    expect(page.locator(".person-name")).to_have_text("another")
    assert service.attune("export", "holder") == ""
    assert "Whose is this?" in service.attune("export", "another")


def test_the_keyboard_alone_is_enough(open_page: Open) -> None:
    page = open_page("typist")
    field = page.get_by_label("Message", exact=True)
    expect(field).to_be_focused()
    page.keyboard.type("one line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    expect(field).to_have_value("one line\nand another")
    page.keyboard.press("Enter")
    expect(field).to_have_value("")
    reply_ended(page)
    page.keyboard.press("Control+k")
    search = page.get_by_label("Search conversations")
    expect(search).to_be_focused()
    page.keyboard.type("no such thing")
    expect(page.locator(".conversations .nothing")).to_be_visible()
    search.fill("one line")
    expect(page.locator(".conversation")).to_have_count(1)
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".title")).to_have_text("New conversation")
    page.go_back()
    expect(page.locator(".bubble")).to_have_count(1)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(field).to_be_focused()
    expect(page.locator(".bubble")).to_have_count(1)  # it leads to the field, not out of the conversation
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_on_a_small_screen_the_keyboard_goes_into_what_opens_and_back(open_page: Open) -> None:
    page = open_page("nomad", PHONE)
    menu, chip = page.get_by_role("button", name="Show the history"), page.locator("#adapter-chip")
    for opener, part in ((menu, "#sidebar"), (chip, "#panel")):
        opener.focus()
        expect(opener).to_have_attribute("aria-expanded", "false")
        page.keyboard.press("Enter")
        expect(page.locator(f"{part} :focus")).to_have_count(1)
        expect(opener).to_have_attribute("aria-expanded", "true")
        for _ in range(40):  # however far one goes, not behind it
            page.keyboard.press("Tab")
            assert page.locator("main :focus").count() == 0
        page.locator(part).get_by_role("button", name="Close").focus()
        page.keyboard.press("Enter")
        expect(opener).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search conversations")).to_be_focused()
    page.keyboard.press("Escape")
    expect(menu).to_be_focused()
    page.keyboard.press("Control+k")
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    chip.click()
    page.set_viewport_size(DESK)
    page.get_by_label("Message", exact=True).click()  # nothing lies over it there
    page.locator("#panel").get_by_role("button", name="Close").click()
    expect(chip).to_be_focused()


def test_rating_and_correcting_a_reply_teach_it(open_page: Open) -> None:
    page = open_page("teacher")
    say(page, "How are you?")
    reply_ended(page)
    page.get_by_role("button", name="Good reply: learn from it").click()
    expect(page.locator(".count")).to_have_text("2")
    page.get_by_role("button", name="Correct this reply").click()
    page.get_by_label("What it should have said").fill("Grand, and you?")
    page.get_by_role("button", name="Save correction").click()
    expect(page.locator(".reply .prose")).to_have_text("Grand, and you?")
    expect(page.locator(".reply .badge")).to_have_text("your words")
    page.locator("summary", has_text="What it learns from").click()
    expect(page.locator(".learned li").filter(has_text="Grand, and you?")).to_have_count(1)
    page.locator(".learned li").filter(has_text="How are you?").get_by_role("button").click()
    expect(page.locator(".learned li")).to_have_count(1)
    page.reload()
    expect(page.locator(".reply .prose")).to_have_text("Grand, and you?")
    expect(page.locator(".count")).to_have_text("1")


def test_a_correction_that_is_refused_leaves_the_reply_and_its_rating_as_they_were(open_page: Open) -> None:
    page = open_page("corrector")
    say(page, "How are you?")
    reply_ended(page)
    said = page.locator(".reply .prose").inner_text()
    good = page.get_by_role("button", name="Good reply: learn from it")
    good.click()
    expect(page.locator(".count")).to_have_text("2")
    page.get_by_role("button", name="Correct this reply").click()
    page.get_by_label("What it should have said").fill("word " * 14000)
    page.get_by_role("button", name="Save correction").click()
    expect(page.locator(".toast").filter(has_text="text: expected at most")).to_be_visible(timeout=REPLY_MS)
    expect(page.locator(".reply .prose")).to_have_text(said)
    expect(page.locator(".reply .badge")).not_to_have_text("your words")
    expect(good).to_have_attribute("aria-pressed", "true")


def test_a_reply_that_was_cut_off_and_put_right_is_not_said_to_be_cut_off(open_page: Open) -> None:
    page = open_page("finisher")

    def cut_off(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        server.on_message(
            lambda told: socket.send(str(told).replace("response.completed", "response.incomplete"))
        )

    page.route_web_socket("**/v1/responses", cut_off)
    page.reload()
    expect(page.locator(".link")).to_have_attribute("data-state", "live")
    say(page, "How are you?")
    expect(page.locator(".reply .note")).to_contain_text("Cut off")
    page.get_by_role("button", name="Correct this reply").click()
    page.get_by_label("What it should have said").fill("Grand, and you?")
    page.get_by_role("button", name="Save correction").click()
    expect(page.locator(".reply .note")).to_have_text("Put right by you.")


def test_forgetting_asks_for_the_name_and_then_leaves_nothing(open_page: Open) -> None:
    page = open_page("leaver")
    say(page, "Remember me?")
    reply_ended(page)
    page.locator("summary", has_text="Your data").click()
    page.get_by_role("button", name="Forget me").click()
    forget = page.get_by_role("button", name="Forget everything")
    expect(forget).to_be_disabled()
    page.get_by_label("Your name").fill("leaver")
    forget.click()
    expect(page.locator(".conversation")).to_have_count(0, timeout=REPLY_MS)
    expect(page.locator(".bubble")).to_have_count(0)
    page.reload()
    expect(page.locator(".conversations .nothing")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(open_page: Open, scheme: str) -> None:
    name = f"phone-{scheme}"
    wide = "```\n" + "a long line of code " * 20 + "\n```\n\n| " + "column | " * 14 + "\n|" + "---|" * 14
    turns = [
        {"user": name, "conversation": "wide", "at": f"2025-04-01T10:0{at}:00Z", "role": role, "text": text}
        for at, (role, text) in enumerate((("user", "w" * 300), ("assistant", wide)))
    ]
    page = open_page(name, PHONE, scheme)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    page.locator("#adapter-chip").click()
    expect(page.locator("#panel")).to_be_visible()
    bring_in(page, "\n".join(json.dumps(turn) for turn in turns).encode())
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    page.get_by_role("button", name="Show the history").click()
    page.locator(".conversation").click()
    expect(page.locator(".code")).to_be_visible()
    expect(page.locator("#sidebar")).to_be_hidden()
    assert page.evaluate(overflow) == 0
    assert page.locator(".scroller").evaluate("e => e.scrollWidth - e.clientWidth") == 0


def test_words_from_right_to_left_stand_as_they_are_read(open_page: Open) -> None:
    reply = "שלום!\n\n1. אחת.\n2. two, left to right.\n\n```\ncode()\n```\n"
    turns = [
        {"user": "ruth", "conversation": "c", "at": f"2025-04-01T10:0{at}:00Z", "role": role, "text": text}
        for at, (role, text) in enumerate((("user", "שלום (עולם)?"), ("assistant", reply)))
    ]
    page = open_page("ruth")
    bring_in(page, "\n".join(json.dumps(turn) for turn in turns).encode())
    page.locator(".conversation").click()
    expect(page.locator(".code")).to_be_visible()
    for place in (".bubble", ".prose", ".title", ".conversation span"):
        expect(page.locator(place)).to_have_css("direction", "rtl")
    expect(page.locator(".prose pre")).to_have_css("direction", "ltr")
    one, two = page.locator(".prose li").all()
    text_at = """e => {
        const range = document.createRange();
        range.selectNodeContents(e);
        const [text, item] = [range.getBoundingClientRect(), e.getBoundingClientRect()];
        return text.right > item.right - 2 ? "right" : text.left < item.left + 2 ? "left" : "between";
    }"""
    assert (one.evaluate(text_at), two.evaluate(text_at)) == ("right", "left")
    field = page.get_by_label("Message", exact=True)
    field.fill("שלום!")
    expect(field).to_have_css("direction", "rtl")
    field.fill("Hello!")
    expect(field).to_have_css("direction", "ltr")


def test_a_long_name_that_begins_with_a_blank_can_be_read_and_typed_to_be_forgotten(
    open_page: Open,
) -> None:
    name = " " + "W" * 100
    page = open_page(name, {"width": 320, "height": 568})
    page.locator("#adapter-chip").click()
    page.locator("summary", has_text="Your data").click()
    page.get_by_role("button", name="Forget me").click()
    assert page.locator("dialog").evaluate("e => e.scrollWidth - e.clientWidth") == 0
    for place in page.locator("dialog button").all():
        expect(place).to_be_in_viewport(ratio=1)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Forget everything").click()
    expect(page.locator(".toast")).to_contain_text("are gone", timeout=REPLY_MS)


@pytest.mark.parametrize("touch", [False, True])
def test_a_key_is_named_only_where_there_are_keys(open_page: Open, touch: bool) -> None:
    page = open_page("reader-of-hints", PHONE, touch=touch)
    page.get_by_role("button", name="Show the history").click()
    expect(page.get_by_placeholder("Search conversations")).to_be_visible()
    expect(page.locator(".search kbd")).to_be_visible(visible=not touch)


def test_a_chosen_theme_stays_after_a_reload(open_page: Open) -> None:
    page = open_page("painter", scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark


@pytest.mark.timeout(900)
def test_a_history_brought_in_becomes_a_version_that_answers_next_and_can_be_taken_back(
    open_page: Open,
) -> None:
    page = open_page("learner")
    page.get_by_role("button", name="Refresh from my history").click()
    expect(page.locator(".refresh-box .outcome b")).to_have_text("Not yet", timeout=REFRESH_MS)
    bring_in(page, history("learner") + b"\nnot a turn")
    expect(page.locator(".fold .outcome")).to_contain_text("120 turns brought in")
    expect(page.locator(".fold .outcome")).to_contain_text("Line 121")
    page.get_by_role("button", name="Refresh from my history").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.locator(".refresh-box .outcome")).to_contain_text("v1 answers", timeout=REFRESH_MS)
    expect(page.locator(".refresh-box .gain")).to_contain_text(re.compile(r"−\d+\.\d % loss on \d+ unseen"))
    expect(page.locator("#adapter-chip")).to_have_text("v1")
    say(page, "Hello there")
    reply_ended(page)
    expect(page.locator(".reply .badge")).to_have_text(re.compile("^v1 · "))
    page.get_by_role("button", name="Go back to this").click()
    expect(page.locator("#adapter-chip")).to_have_text("base")
    page.get_by_role("button", name="Use this").click()
    expect(page.locator("#adapter-chip")).to_have_text("v1")


def test_what_became_of_a_file_is_seen_without_scrolling_and_says_what_is_wrong(open_page: Open) -> None:
    page = open_page("librarian", viewport={"width": 1280, "height": 640})
    page.locator("summary", has_text="Your data").click()
    told = page.locator(".fold .outcome")

    def bring(content: bytes) -> None:
        file = {"name": "history.jsonl", "mimeType": "application/x-ndjson", "buffer": content}
        page.get_by_label("History file").set_input_files([file])

    bring(history("somebody-else") + b"\n" + b"not a turn\n" * 6)
    expect(told.locator("b")).to_have_text("No turn of yours in that file")
    expect(told.locator("p").first).to_have_text(
        "120 turns are of other users than 'librarian' and were left out"
    )
    expect(told.locator("p").nth(1)).to_have_text(re.compile("^Line 121: "))
    expect(told.locator("b")).to_be_in_viewport()
    bring(history("librarian"))
    expect(told.locator("b")).to_have_text("120 turns brought in")
    expect(page.locator(".refresh-box .caption")).to_have_text("120 new turns to learn from.")
    bring(history("librarian"))
    expect(told.locator("b")).to_have_text("Nothing new in that file")


def test_a_long_word_does_not_run_out_of_what_is_told_of_it(open_page: Open) -> None:
    name, word = "N" * 120, "W" * 300
    page = open_page(name)
    page.locator("summary", has_text="Your data").click()
    file = {"name": f"{word[:100]}.jsonl", "mimeType": "text/plain", "buffer": word.encode()}
    page.get_by_label("History file").set_input_files([file])
    expect(page.locator(".fold .outcome")).to_contain_text("Line 1")
    page.get_by_role("button", name="Switch person").click()
    expect(page.locator(".menu")).to_be_visible()
    for place in (".fold .outcome", ".panel-body", ".menu"):
        assert page.locator(place).evaluate("e => e.scrollWidth - e.clientWidth") == 0, place


def test_a_name_that_cannot_be_is_refused_with_the_reason_and_not_tried_for_ever(open_page: Open) -> None:
    page = open_page("plain")
    page.get_by_role("button", name="Switch person").click()
    page.get_by_label("any name").fill("turned\u202eround")
    page.keyboard.press("Enter")
    expect(page.locator(".link")).to_have_attribute("data-state", "refused")
    expect(page.locator(".sign-in")).to_contain_text("expected 1 to 256 printable characters")
    page.get_by_role("button", name="Switch person").click()
    page.get_by_label("any name").fill("plain")
    page.keyboard.press("Enter")
    expect(page.locator(".link")).to_have_attribute("data-state", "live")


def test_what_became_of_a_file_is_not_told_to_the_next_person(open_page: Open) -> None:
    page = open_page("first")
    bring_in(page, history("first", 2))
    page.get_by_role("button", name="Switch person").click()
    page.get_by_label("any name").fill("second")
    page.keyboard.press("Enter")
    expect(page.locator(".person-name")).to_have_text("second")
    expect(page.locator(".fold .outcome")).to_be_hidden()


def test_what_is_too_long_is_not_offered_to_be_tried_again(open_page: Open) -> None:
    page = open_page("novelist")
    say(page, "word " * 9000)
    expect(page.locator(".reply .problem")).to_contain_text("expected a message of at most", timeout=REPLY_MS)
    expect(page.locator(".reply .problem").get_by_role("button")).to_have_count(0)
    expect(page.get_by_role("button", name="Edit and send again")).to_be_visible()


def give_version(
    service: RunningService, user: str, *, gain: float, accepted: bool = True, share: float = 0.0
) -> None:
    """What a refresh would have come to, without the minutes it takes: a real version, a refusal or a trial,
    learned from all the person's turns."""

    async def give() -> None:
        settings = Settings(data=service.data)
        store = Store(connect(settings.redis_address), read_or_create_secret(settings.secret_path))
        config = read_config(demo_model.path())
        a, b = torch.full((2, config.hidden_size), 0.01), torch.full((config.hidden_size, 2), 0.01)
        pointer = await store.pointer(user)
        origin = Origin(
            base_model="demo",
            base_hash=load_model(demo_model.path()).base_hash,
            created_at=datetime.now(UTC),
            reason="better: measured" if accepted else "no measurable change yet: measured",
            parent=pointer.version,
            examples=9,
            turn_ids=tuple(turn.id for turn in await store.turns(user)),
            numbers={
                "turns": 12.0, "loss_before": 4.0, "loss_after": 4.0 - gain,
                "gain": gain, "gain_low": gain - 0.1, "gain_high": gain + 0.1,
            },
        )  # fmt: skip
        if accepted:
            weights = LoraWeights((LoraModule(0, "o_proj", a, b, 1.0),))
            shelf = Shelf(settings.adapter_root, config, free_bytes_floor=0)
            await publish(shelf, store, user, weights, origin, pointer, share=share)
        else:
            await note_refusal(store, user, origin, pointer)
        await store.close()

    with ThreadPoolExecutor(1) as thread:  # Playwright's loop runs in this one
        thread.submit(asyncio.run, give()).result()


def test_what_a_version_learned_from_is_read_and_taken_out_on_the_page(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("reader")
    bring_in(page, history("reader"))
    give_version(service, "reader", gain=0.4)
    version = page.locator("[data-version='1']")
    expect(version.locator(".interval")).to_be_visible()
    expect(version).to_contain_text("−10.0 % loss on 12 unseen turns")
    expect(version).not_to_contain_text("example")  # its rows say nothing to a person
    version.get_by_text("Learned from 120 turns").click()
    expect(version.locator(".learned li")).to_have_count(12)
    version.get_by_role("button", name="Show all").click()
    expect(version.locator(".learned li")).to_have_count(120)
    expect(version.locator(".taken-out")).to_have_count(0)
    oldest = version.locator(".learned li").last
    expect(oldest).to_contain_text("Ahoy, captain! The harbour is quiet")
    oldest.get_by_role("button", name="Do not learn from this").click()
    expect(version.locator(".taken-out")).to_contain_text("Learned from 1 turn that you took out since.")
    expect(version.locator("[data-gone]")).to_have_count(1)
    (listed,) = service.json("adapters", "reader")["versions"]
    assert len(listed["marked"]) == 1
    assert service.attune("adapters", "reader").startswith("*!   1 ")
    page.reload()
    expect(version.locator(".taken-out")).to_be_visible()


def test_a_refused_refresh_leaves_its_numbers_on_the_page(open_page: Open, service: RunningService) -> None:
    page = open_page("undecided")
    bring_in(page, history("undecided"))
    give_version(service, "undecided", gain=0.02, accepted=False)
    page.reload()
    version = page.locator("[data-version='1']")
    expect(version).to_contain_text("not published")
    expect(version).to_contain_text("No measurable change yet.")
    expect(version).to_contain_text("−0.5 % loss on 12 unseen turns")
    expect(version.locator(".interval")).to_be_visible()
    expect(version.get_by_text("Trained on 120 turns")).to_be_visible()
    expect(page.locator("#adapter-chip")).to_have_text("base")


def test_a_version_on_trial_shows_its_votes_and_is_ended_by_hand(
    open_page: Open, service: RunningService
) -> None:
    page = open_page("taster")
    bring_in(page, history("taster"))
    give_version(service, "taster", gain=0.4)
    give_version(service, "taster", gain=0.2, share=0.5)
    trial = page.locator("[data-version='2']")
    expect(trial.locator(".tag")).to_have_text("on trial")
    expect(trial).to_contain_text("Answers 50 % of your messages")
    for count in range(1, 21):  # of which half are its, drawn anew each time
        say(page, "Good morning")
        reply_ended(page, count)
        if page.locator(".reply .badge").last.inner_text().startswith("v2"):
            page.get_by_role("button", name="Bad reply").last.click()
            break
    told = re.compile("^1 of 30 replies · 0 up, 1 down · v1 has 0 up, 0 down$")
    expect(trial.locator(".tally")).to_have_text(told)
    assert "on trial, 50% of the replies" in service.attune("adapters", "taster")
    trial.get_by_role("button", name="End the trial").click()
    expect(trial).to_contain_text("Its trial was ended by hand.", timeout=REPLY_MS)
    expect(page.locator("[data-version='1'] .tag")).to_have_text("answers now")


def test_the_page_is_small_and_holds_nothing_inline(service: RunningService) -> None:
    folder = Path(__file__).parent.parent / "web" / "dist"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    markup = (folder / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", markup)
