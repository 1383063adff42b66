/** The conversation: keyed views, so that streaming touches one element and leaves the rest alone. */

import type { App } from "../app";
import { arrange, button, h } from "../dom";
import { hueOf, initials } from "../format";
import { GUEST, samplePerson, type Item } from "../state";
import { compareView } from "./compare";
import { personView, replyView } from "./message";

export interface ItemView {
  element: HTMLElement;
  update: () => void;
}

const NEAR_END_PX = 120;

export function thread(app: App, edit: (text: string) => void): HTMLElement {
  const views = new Map<string, ItemView>();
  const list = h("div", { class: "items", attrs: { role: "log", "aria-label": "Conversation", "aria-live": "off" } });
  const notice = h("div", { class: "notice" });
  const scroller = h("div", { class: "scroller", attrs: { tabindex: -1 }, on: { scroll: () => showJump() } }, list, notice);
  const jump = button({ class: "jump", icon: "arrow", label: "To the newest", press: () => toEnd("smooth") });
  let shownThread = "";
  let lastKey = "";
  let frame = 0;

  app.signals.on("thread", rebuild);
  app.signals.on("user", () => app.state.thread.items.length === 0 && rebuild());
  app.signals.on("items", () => {
    frame ||= requestAnimationFrame(refresh);
  });
  rebuild();
  return h("div", { class: "thread" }, scroller, jump);

  function rebuild(): void {
    const { thread: current } = app.state;
    // What was just asked for here is shown, wherever the person had scrolled to; not what comes from elsewhere.
    const last = current.items.at(-1);
    const ours = last?.kind === "compare" || (last?.kind === "reply" && last.reply !== null);
    const asked = ours && last.key !== lastKey;
    lastKey = last?.key ?? "";
    const follow = asked || nearEnd() || current.id !== shownThread;
    if (current.id !== shownThread) {
      views.clear();
      list.replaceChildren();
      shownThread = current.id;
    }
    const keys = new Set(current.items.map((item) => item.key));
    for (const key of views.keys()) if (!keys.has(key)) views.delete(key);
    const elements = current.items.map((item) => {
      let view = views.get(item.key);
      if (!view) views.set(item.key, (view = make(item)));
      else view.update();
      return view.element;
    });
    arrange(list, elements);
    showNotice();
    if (follow) requestAnimationFrame(() => toEnd("instant"));
    showJump();
  }

  function make(item: Item): ItemView {
    if (item.kind === "person") return personView(item, edit);
    if (item.kind === "compare") return compareView(app, item);
    return replyView(app, item);
  }

  function refresh(): void {
    frame = 0;
    const follow = nearEnd();
    for (const item of app.touched) views.get(item.key)?.update();
    app.touched.clear();
    if (follow) toEnd("instant");
    showJump();
  }

  function showNotice(): void {
    const { thread: current, link } = app.state;
    notice.hidden = false;
    if (current.state === "loading" && current.items.length === 0) {
      notice.replaceChildren(h("div", { class: "skeleton", attrs: { "aria-label": "Loading" } }, h("i"), h("i"), h("i")));
    } else if (current.state === "failed") {
      notice.replaceChildren(
        h("p", { text: current.problem }),
        button({ class: "plain", label: "Try again", wide: true, press: () => void app.loadThread(current) }),
      );
    } else if (current.items.length === 0 && link !== "refused") notice.replaceChildren(empty(app, edit));
    else {
      notice.hidden = true;
      notice.replaceChildren();
    }
  }

  function nearEnd(): boolean {
    return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;
  }

  function toEnd(behavior: ScrollBehavior): void {
    scroller.scrollTo({ top: scroller.scrollHeight, behavior });
  }

  function showJump(): void {
    jump.hidden = nearEnd();
  }
}

/** What to say first: things everyone can talk about, so that a voice shows in how they are answered. */
const OPENERS = [
  "What is a good way to spend a rainy Sunday?",
  "I just finished a book I loved. Ask me about it.",
  "What music do you put on when you cook?",
  "Tell me something about dogs.",
];

function empty(app: App, edit: (text: string) => void): HTMLElement {
  const sample = samplePerson(app.state);
  const list = h("div", { class: "openers" });
  for (const text of OPENERS) {
    list.append(h("button", { class: "opener", text, attrs: { type: "button" }, on: { click: () => edit(text) } }));
  }
  return h(
    "div",
    { class: "empty" },
    h("div", { class: "waves", attrs: { "aria-hidden": "true" } }, ...waves()),
    h("h2", { text: sample ? `Talk as ${sample.name}` : "Say something. It learns how you like to be answered." }),
    h("p", {
      text: sample
        ? (sample.blurb ?? "A sample person with a history of their own.")
        : "Rate a reply, put one right, or just talk. Then refresh your adapter, and the next reply is a little more yours.",
    }),
    list,
    app.state.user === GUEST && app.state.samples.length > 0 && people(app),
  );
}

/** For who comes for the first time: people whose adapters already differ. */
function people(app: App): HTMLElement {
  return h(
    "div",
    { class: "meet" },
    h("span", { text: "Or be someone it already knows" }),
    ...app.state.samples.map((sample) => {
      const face = h("span", { class: "avatar", text: initials(sample.name), attrs: { "aria-hidden": "true" } });
      face.style.setProperty("--hue", String(hueOf(sample.name)));
      return h(
        "button",
        { class: "meet-person", attrs: { type: "button", title: sample.blurb }, on: { click: () => void app.enter(sample.name) } },
        face,
        h("span", { text: sample.name }),
      );
    }),
  );
}

/** Bars that settle into one line: a voice being tuned to. */
function waves(): HTMLElement[] {
  return Array.from({ length: 28 }, (_, at) => {
    const bar = h("i");
    const height = 0.18 + 0.82 * Math.abs(Math.sin(at * 0.9) * Math.cos(at * 0.33 + 0.6)) * (1 - at / 34);
    bar.style.setProperty("--h", height.toFixed(3));
    bar.style.setProperty("--d", `${(at * 0.045).toFixed(2)}s`);
    return bar;
  });
}
