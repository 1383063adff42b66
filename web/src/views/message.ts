/** One thing said: a person's words, or a reply with its badge and what can be done about it. */

import type { App } from "../app";
import { button, h, icon, setAttr, setText } from "../dom";
import { dateTime, figure, plural, seconds, versionName, words } from "../format";
import { copyText, Markdown } from "../markdown";
import type { Reply } from "../reply";
import type { PersonItem, ReplyItem } from "../state";
import type { ItemView } from "./thread";

export function personView(item: PersonItem, edit: (text: string) => void): ItemView {
  const bubble = h("div", { class: "bubble", text: item.text, attrs: { dir: "auto" } });
  const element = h(
    "article",
    { class: "item said", attrs: { "aria-label": "You said" } },
    bubble,
    h(
      "div",
      { class: "actions" },
      copyButton(() => item.text),
      button({ class: "quiet", icon: "pen", label: "Edit and send again", press: () => edit(item.text) }),
    ),
  );
  setAttr(element, "title", dateTime(item.at));
  return { element, update: () => setText(bubble, item.text) };
}

export function replyView(app: App, item: ReplyItem): ItemView {
  const prose = new Markdown();
  const waiting = h("div", { class: "thinking", attrs: { role: "img", "aria-label": "Waiting for the first word" } }, h("i"), h("i"), h("i"));
  const problem = h("div", { class: "problem", attrs: { role: "alert" } });
  const note = h("p", { class: "note" });
  const details = h("div", { class: "details", attrs: { id: `details-${item.key}`, hidden: true } });
  const badgeText = h("span", {});
  const badge = h(
    "button",
    {
      class: "badge",
      attrs: { type: "button", "aria-expanded": "false", "aria-controls": details.id, title: "How this reply came about" },
      on: { click: () => toggleDetails() },
    },
    icon("mark"),
    badgeText,
  );
  const up = button({ class: "quiet", icon: "up", label: "Good reply: learn from it", press: () => app.learning.rate(item, "up") });
  const down = button({ class: "quiet", icon: "down", label: "Bad reply", press: () => app.learning.rate(item, "down") });
  const correct = button({ class: "quiet", icon: "pen", label: "Correct this reply", press: () => openEditor() });
  const retry = button({ class: "quiet", icon: "retry", label: "Another reply", press: () => app.retry(item) });
  const copy = copyButton(() => item.text);
  const foot = h("div", { class: "foot" }, badge, h("div", { class: "actions" }, copy, up, down, correct, retry));
  const editor = h("div", { class: "editor", attrs: { hidden: true } });
  const element = h(
    "article",
    { class: "item reply", attrs: { "aria-label": "Attune replied" } },
    h("div", { class: "glyph", attrs: { "aria-hidden": "true" } }, icon("mark")),
    h("div", { class: "body" }, prose.element, waiting, editor, problem, note, foot, details),
  );
  update();
  return { element, update };

  function update(): void {
    const { reply } = item;
    const running = reply?.running ?? false;
    const failed = reply?.status === "failed";
    prose.set(item.text);
    waiting.hidden = !(running && item.text === "");
    prose.element.hidden = item.text === "" || !editor.hidden;
    setAttr(element, "data-running", running);
    setAttr(element, "aria-busy", running ? "true" : null);
    setAttr(element, "data-which", item.version ? "me" : "base");
    problem.hidden = !failed;
    if (failed && problem.childElementCount === 0) {
      problem.replaceChildren(
        icon("warn"),
        h("span", { text: reply?.error?.message ?? "The reply failed." }),
      );
      if (reply?.error?.code !== "context_length_exceeded") { // which would be too long again
        problem.append(button({ class: "plain", icon: "retry", label: "Try again", wide: true, press: () => app.retry(item) }));
      }
    }
    setText(note, noteOf(app, item));
    note.hidden = note.textContent === "";
    foot.hidden = running || failed;
    setText(badgeText, badgeOf(item));
    const lasting = item.id !== null;
    for (const one of [up, down, correct]) one.hidden = !lasting || item.author === "person";
    correct.hidden = !lasting;
    setAttr(up, "aria-pressed", String(item.rating === "up"));
    setAttr(down, "aria-pressed", String(item.rating === "down"));
    const last = app.state.thread.items.findLast((one) => one.kind !== "compare");
    retry.hidden = last !== item || item.author === "person";
    if (!details.hidden) details.replaceChildren(facts(app, item));
  }

  function toggleDetails(): void {
    details.hidden = !details.hidden;
    setAttr(badge, "aria-expanded", String(!details.hidden));
    if (details.hidden) return;
    details.replaceChildren(facts(app, item));
    details.scrollIntoView({ block: "nearest" });
  }

  function openEditor(): void {
    const field = h("textarea", { attrs: { "aria-label": "What it should have said", rows: 3, dir: "auto" } });
    field.value = item.text;
    const close = (): void => {
      editor.hidden = true;
      editor.replaceChildren();
      update();
      correct.focus();
    };
    const save = (): void => {
      const text = field.value.trim();
      if (text && text !== item.text) app.learning.correct(item, text);
      close();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    editor.replaceChildren(
      h("p", { text: "Write what you would rather have read. It is what the next refresh learns." }),
      field,
      h(
        "div",
        { class: "row" },
        button({ class: "primary", label: "Save correction", wide: true, press: save }),
        button({ class: "plain", label: "Cancel", wide: true, press: close }),
      ),
    );
    editor.hidden = false;
    prose.element.hidden = true;
    field.style.height = `${Math.min(320, field.scrollHeight + 4)}px`;
    field.focus();
    editor.scrollIntoView({ block: "nearest" });
  }
}

export function copyButton(text: () => string): HTMLButtonElement {
  const copy = button({
    class: "quiet",
    icon: "copy",
    label: "Copy",
    press: () => {
      void copyText(text()).then((ok) => {
        copy.replaceChildren(icon(ok ? "check" : "warn"));
        setTimeout(() => copy.replaceChildren(icon("copy")), 1400);
      });
    },
  });
  return copy;
}

function noteOf(app: App, item: ReplyItem): string {
  const { reply } = item;
  if (reply?.running && app.state.link === "resuming") return "The connection was lost; the reply goes on when it is back.";
  if (item.original !== null) return "Put right by you."; // whatever became of the words before
  if (reply?.status === "stopped") return "Stopped.";
  if (reply?.status === "incomplete") return "Cut off at the longest reply allowed.";
  const notice = reply?.facts.metadata["notice"];
  if (notice) return notice.charAt(0).toUpperCase() + notice.slice(1) + ".";
  return "";
}

function badgeOf(item: ReplyItem): string {
  const { reply } = item;
  if (item.author === "person") return "your words";
  if (!reply) return item.version === null ? "imported" : versionName(item.version);
  return badgeOfReply(reply);
}

/** `v3 · 12 history turns · 41 tok/s` */
export function badgeOfReply(reply: Reply): string {
  const parts = [versionName(reply.facts.version)];
  const turns = Number(reply.facts.metadata["history_turns"]);
  if (Number.isFinite(turns)) parts.push(plural(turns, "history turn"));
  if (reply.speed) parts.push(`${Math.round(reply.speed)} tok/s`);
  return parts.join(" · ");
}

/** How the service's facts about a reply are called here; what is not listed is shown under its own name. */
const NAMES: Record<string, string> = {
  history_turns: "Read of your history",
  seed: "Seed",
  queue_s: "Waited in the queue",
  adapter_load_s: "Adapter fetched in",
  adapter_tier: "Adapter came from",
  first_token_s: "First word after",
  tokens_per_s: "Tokens a second",
};
const TOLD_ELSEWHERE = new Set(["adapter_version", "history_saved", "history_truncated", "user_turn_id", "notice"]);

function facts(app: App, item: ReplyItem): HTMLElement {
  const { reply } = item;
  const rows: [string, string][] = [];
  rows.push(["Answered by", item.author === "person" ? "you, as a correction" : item.version ? `your adapter, ${versionName(item.version)}` : "the bare base model"]);
  const base = reply?.facts.metadata["base"] ?? app.state.me?.adapter.base;
  if (base) rows.push(["Base model", base]);
  rows.push(["When", dateTime(item.at)]);
  if (reply) rows.push(...replyFacts(reply));
  const trained = item.version ? app.state.versions?.find((one) => one.version === item.version) : undefined;
  if (trained) {
    if (trained.created_at) rows.push(["Trained", dateTime(trained.created_at)]);
    if (trained.turns) rows.push(["Learned from", plural(trained.turns, "turn")]);
    for (const [key, value] of Object.entries(trained.numbers ?? {})) rows.push([words(key), figure(value)]);
  }
  return factList(rows);
}

export function replyFacts(reply: Reply): [string, string][] {
  const { facts: told } = reply;
  const rows: [string, string][] = [];
  if (told.inputTokens !== null) {
    const cached = told.cachedTokens ? `, ${plural(told.cachedTokens, "token")} already read` : "";
    rows.push(["Read", plural(told.inputTokens, "token") + cached]);
  }
  if (told.outputTokens !== null) rows.push(["Wrote", plural(told.outputTokens, "token")]);
  for (const [key, value] of Object.entries(told.metadata)) {
    if (TOLD_ELSEWHERE.has(key) || value === "" || (key === "adapter_tier" && value === "none")) continue;
    const name = NAMES[key] ?? words(key);
    const amount = Number(value);
    if (key.endsWith("_s") && key !== "tokens_per_s" && Number.isFinite(amount)) rows.push([name, seconds(amount)]);
    else rows.push([name, key === "history_turns" ? plural(amount, "turn") : value]);
  }
  if (told.metadata["first_token_s"] === undefined && reply.firstTokenSeconds !== null) {
    rows.push(["First word after", seconds(reply.firstTokenSeconds)]);
  }
  return rows;
}

export function factList(rows: [string, string][]): HTMLElement {
  const list = h("dl", { class: "facts" });
  for (const [name, value] of rows) list.append(h("div", {}, h("dt", { text: name }), h("dd", { text: value })));
  return list;
}
