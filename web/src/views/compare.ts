/** The proof: base and mine on the same prompt and seed, written at the same time. */

import type { App } from "../app";
import { button, h, icon, setAttr, setText } from "../dom";
import { plural } from "../format";
import { Markdown } from "../markdown";
import type { CompareItem, Side } from "../state";
import { badgeOfReply, copyButton } from "./message";
import type { ItemView } from "./thread";

export function compareView(app: App, item: CompareItem): ItemView {
  const cards = item.order.map((side, at) => card(app, item, side, at === 0 ? "A" : "B"));
  const result = h("p", { class: "verdict", attrs: { role: "status" } });
  const same = button({ class: "plain", label: "No difference", wide: true, press: () => app.vote(item, "same") });
  const again = button({
    class: "plain",
    icon: "dice",
    label: "Another seed",
    wide: true,
    press: () => app.compare(item.prompt),
  });
  const element = h(
    "article",
    { class: "item compare", attrs: { "aria-label": "Side by side" } },
    h(
      "header",
      {},
      icon("sides"),
      h("p", { class: "asked", text: item.prompt, attrs: { dir: "auto" } }),
      h("p", { class: "terms", text: `Same prompt, same seed (${item.seed}). Not saved, not learned from.` }),
    ),
    h("div", { class: "pair" }, ...cards.map((one) => one.element)),
    h("div", { class: "pair-foot" }, result, same, again),
  );
  update();
  return { element, update };

  function update(): void {
    for (const one of cards) one.update();
    const running = item.replies.base.running || item.replies.me.running;
    const equal = !running && item.replies.base.text === item.replies.me.text;
    same.hidden = item.vote !== null || running;
    again.hidden = running;
    setAttr(element, "data-voted", item.vote ?? null);
    setText(result, verdict());
    if (equal && item.vote === null) setText(result, "Word for word the same.");
  }

  function verdict(): string {
    if (item.vote === null) return "";
    const { score } = app.state;
    const total = score.base + score.me + score.same;
    return `Yours chosen ${score.me} of ${plural(total, "time")}, base ${score.base}, no difference ${score.same}.`;
  }
}

function card(app: App, item: CompareItem, side: Side, letter: string): ItemView {
  const reply = item.replies[side];
  const prose = new Markdown();
  const name = h("h3", {});
  const waiting = h("div", { class: "thinking", attrs: { role: "img", "aria-label": "Waiting for the first word" } }, h("i"), h("i"), h("i"));
  const problem = h("p", { class: "problem", attrs: { role: "alert" } });
  const foot = h("span", { class: "badge-still" });
  const choose = button({ class: "plain choose", label: "Better", wide: true, press: () => app.vote(item, side) });
  const element = h(
    "section",
    { class: "card" },
    h("div", { class: "card-head" }, name, copyButton(() => reply.text)),
    prose.element,
    waiting,
    problem,
    h("div", { class: "card-foot" }, foot, choose),
  );
  update();
  return { element, update };

  function update(): void {
    const hidden = item.blind && item.vote === null;
    setAttr(element, "data-side", hidden ? null : side);
    setAttr(element, "data-running", reply.running);
    setText(name, hidden ? `Reply ${letter}` : side === "base" ? "Base" : "Yours");
    prose.set(reply.text);
    waiting.hidden = !(reply.running && reply.text === "");
    problem.hidden = reply.status !== "failed";
    setText(problem, reply.error?.message ?? "");
    const ended = !reply.running && reply.status !== "failed";
    setText(foot, hidden || !ended ? "" : reply.status === "stopped" ? "stopped" : badgeOfReply(reply));
    const bothEnded = !item.replies.base.running && !item.replies.me.running;
    choose.hidden = item.vote !== null || !bothEnded;
    setAttr(element, "data-chosen", item.vote === side);
  }
}
