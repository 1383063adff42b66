/** The person's adapter: which version answers, learning now, every version, what it learned from, and their data. */

import type { App } from "../app";
import { button, h, icon, setAttr, setText } from "../dom";
import { ago, day, figure, plural, shortTime, versionName, words } from "../format";
import type { Turn, Version } from "../protocol";
import { ended, type Refresh } from "../state";
import { confirmForget } from "./dialogs";

export function panel(app: App): HTMLElement {
  const element = h(
    "aside",
    { class: "panel", attrs: { id: "panel", "aria-label": "Your adapter" } },
    h(
      "div",
      { class: "panel-head" },
      h("h2", { text: "Your adapter" }),
      button({ class: "quiet", icon: "close", label: "Close", press: () => app.set({ panelOpen: false }) }),
    ),
    h("div", { class: "panel-body" }, summary(app), learning(app), problem(app), versions(app), learnedFrom(app), data(app)),
  );
  return element;
}

// ---------------------------------------------------------------- which version answers

function summary(app: App): HTMLElement {
  const number = h("span", { class: "version-number" });
  const about = h("p", {});
  const element = h("section", { class: "summary" }, h("div", { class: "version-face" }, number, tuning()), about);
  const update = (): void => {
    const { me } = app.state;
    const version = me?.adapter.version ?? 0;
    setText(number, me ? (version ? versionName(version) : "base") : "…");
    setAttr(element, "data-tuned", version > 0);
    const turns = me?.learned_turns ?? 0;
    const base = me?.adapter.base ? ` on ${me.adapter.base}` : "";
    setText(
      about,
      version
        ? `Yours${base}, changed ${ago(me?.adapter.updated_at) || "some time ago"}. Your history holds ${plural(turns, "turn")} to learn from.`
        : `Nothing learned yet${base}. Your history holds ${plural(turns, "turn")} to learn from.`,
    );
  };
  app.signals.on("me", update);
  update();
  return element;
}

/** Two waves: far apart on the bare base, in step once there is an adapter. */
function tuning(): Element {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", "0 0 160 44");
  svg.setAttribute("class", "tuning");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, phase, size] of [["theirs", 0, 11], ["mine", 0.9, 15]] as const) {
    const path = document.createElementNS(ns, "path");
    const points = Array.from({ length: 81 }, (_, at) => {
      const fade = Math.sin((Math.PI * at) / 80);
      return `${at * 2},${(22 + Math.sin(at * 0.27 + phase) * size * fade).toFixed(1)}`;
    });
    path.setAttribute("d", `M${points.join("L")}`);
    path.setAttribute("class", name);
    svg.append(path);
  }
  return svg;
}

// ---------------------------------------------------------------- a refresh, from the button to its outcome

const STAGES = ["queued", "training", "gating", "completed"] as const;
const STAGE_WORDS = { queued: "Queued", training: "Learning", gating: "Checking", completed: "Done", failed: "Failed" };

function learning(app: App): HTMLElement {
  const caption = h("p", { class: "caption" });
  const press = button({ class: "primary refresh", icon: "retry", label: "Refresh from my history", wide: true, press: () => void app.learning.refresh() });
  const bar = h("div", {
    class: "progress",
    attrs: { role: "progressbar", "aria-label": "Refresh", "aria-valuemin": 0, "aria-valuemax": 100 },
  }, h("i"));
  const steps = h("ol", { class: "steps" }, ...STAGES.map((stage) => h("li", { text: STAGE_WORDS[stage] })));
  const live = h("div", { class: "learning" }, bar, steps);
  const outcome = h("div", { class: "outcome", attrs: { role: "status" } });
  let timer = 0;
  const update = (): void => {
    const { refresh, me } = app.state;
    const working = refresh !== null && !ended(refresh.stage);
    press.disabled = working || app.state.link === "refused";
    live.hidden = !working;
    outcome.hidden = refresh === null || working;
    if (refresh) {
      const done = share(refresh);
      bar.style.setProperty("--done", String(done));
      setAttr(bar, "aria-valuenow", Math.round(done * 100));
      setAttr(bar, "aria-valuetext", STAGE_WORDS[refresh.stage]);
      [...steps.children].forEach((step, at) => {
        const now = STAGES.indexOf(refresh.stage as (typeof STAGES)[number]);
        setAttr(step, "data-state", at < now ? "done" : at === now ? "now" : null);
      });
      if (!working) outcome.replaceChildren(...told(refresh));
      setAttr(outcome, "data-tone", refresh.stage === "failed" && refresh.code !== "not_enough_turns" ? "bad" : refresh.published ? "good" : "plain");
    }
    const fresh = me?.learned_since_refresh ?? 0;
    setText(
      caption,
      working && refresh
        ? `${STAGE_WORDS[refresh.stage]}${refresh.stage === "training" ? ` ${Math.round(refresh.progress * 100)} %` : "…"} · ${elapsed(refresh)}`
        : fresh
          ? `${plural(fresh, "new turn")} since the last refresh.`
          : me?.learned_turns
            ? "Nothing new since the last refresh."
            : "Talk a little first, or bring in a history below.",
    );
    clearTimeout(timer);
    if (working) timer = window.setTimeout(update, 1000);
  };
  app.signals.on(["refresh", "me", "link"], update);
  update();
  return h("section", { class: "refresh-box" }, press, caption, live, outcome);
}

/** How far along a refresh is, 0 to 1, over all its stages. */
function share(refresh: Refresh): number {
  switch (refresh.stage) {
    case "queued":
      return 0.04;
    case "training":
      return 0.08 + 0.74 * Math.min(1, refresh.progress);
    case "gating":
      return 0.9;
    default:
      return 1;
  }
}

function elapsed(refresh: Refresh): string {
  const spent = Math.max(0, Math.round((Date.now() - refresh.startedAt) / 1000));
  return spent < 60 ? `${spent} s` : `${Math.floor(spent / 60)} min ${spent % 60} s`;
}

function told(refresh: Refresh): HTMLElement[] {
  if (refresh.stage === "failed") {
    const title = refresh.code === "not_enough_turns" ? "Not yet" : "The refresh failed";
    return [h("b", { text: title }), h("p", { text: sentence(refresh.reason) })];
  }
  const gain = gainOf(refresh.numbers);
  const plain = refresh.published ? "It does better on turns it had not seen." : "The version before stays.";
  return [
    h("b", { text: refresh.published ? `${versionName(refresh.to)} answers from now on` : "No measurable change yet" }),
    gain ?? h("p", { text: refresh.reason || plain }),
  ];
}

/** What the gate measured on turns that were held back: the change in loss, and how sure it is of it. */
function gainOf(numbers: Record<string, unknown>): HTMLElement | null {
  const [before, after] = [finite(numbers["loss_before"]), finite(numbers["loss_after"])];
  if (before === null || after === null || before <= 0) return null;
  const percent = ((after - before) / before) * 100;
  const turns = finite(numbers["turns"]);
  const on = turns === null ? "unseen turns" : `${turns.toLocaleString()} unseen turns`;
  const sign = percent <= 0 ? "−" : "+";
  return h(
    "div",
    { class: "gain" },
    h("p", {}, h("b", { text: `${sign}${Math.abs(percent).toFixed(1)} %` }), h("span", { text: ` loss on ${on}` })),
    interval(finite(numbers["gain"]), finite(numbers["gain_low"]), finite(numbers["gain_high"])),
  );
}

/** A dot for the gain and a line for its interval, against zero: right of it is better. */
function interval(gain: number | null, low: number | null, high: number | null): HTMLElement | null {
  if (gain === null || low === null || high === null) return null;
  const reach = Math.max(Math.abs(low), Math.abs(high), 1e-6) * 1.12;
  const at = (value: number): string => `${(50 + (50 * value) / reach).toFixed(2)}%`;
  const dot = h("i", { class: "interval-dot" });
  const line = h("i", { class: "interval-line" });
  dot.style.left = at(gain);
  line.style.left = at(low);
  line.style.right = `${(50 - (50 * high) / reach).toFixed(2)}%`;
  const words = `gain ${gain.toFixed(3)} nats per token, between ${low.toFixed(3)} and ${high.toFixed(3)}`;
  return h("div", { class: "interval", attrs: { role: "img", "aria-label": words, title: words } }, h("i", { class: "interval-zero" }), line, dot);
}

function finite(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

function problem(app: App): HTMLElement {
  const text = h("span", {});
  const element = h(
    "div",
    { class: "problem", attrs: { role: "alert" } },
    icon("warn"),
    text,
    button({ class: "plain", label: "Try again", wide: true, press: () => void app.learning.load() }),
  );
  const update = (): void => {
    setText(text, app.state.panelProblem);
    element.hidden = app.state.panelProblem === "";
  };
  app.signals.on("panel", update);
  update();
  return element;
}

// ---------------------------------------------------------------- every version

function versions(app: App): HTMLElement {
  const list = h("ul", { class: "versions" });
  const section = h("details", { class: "fold", attrs: { open: true } }, h("summary", {}, h("span", { text: "Versions" }), icon("chevron")), list);
  const update = (): void => {
    const { versions: known, me } = app.state;
    const serving = me?.adapter.version ?? 0;
    const rows = (known ?? []).filter((one) => one.version > 0).map((one) => versionRow(app, one, serving));
    const base = versionRow(app, { version: 0, accepted: true, reason: "The model as it came, nothing learned." }, serving);
    list.replaceChildren(...rows, base);
  };
  app.signals.on(["panel", "me"], update);
  update();
  return section;
}

function sentence(text: string): string {
  const whole = text.trim();
  return whole && whole.charAt(0).toUpperCase() + whole.slice(1) + (/[.!?]$/.test(whole) ? "" : ".");
}

function versionRow(app: App, one: Version, serving: number): HTMLElement {
  const current = one.version === serving;
  const facts = [one.created_at ? shortTime(one.created_at) : "", one.examples ? plural(one.examples, "example") : ""];
  const gain = gainOf(one.numbers ?? {});
  const numbers = Object.entries(one.numbers ?? {});
  return h(
    "li",
    { class: "version", attrs: { "data-current": current, "data-refused": !one.accepted } },
    h(
      "div",
      { class: "version-line" },
      h("b", { text: one.version ? versionName(one.version) : "base" }),
      current
        ? h("span", { class: "tag", text: "answers now" })
        : one.accepted
          ? button({ class: "plain", icon: "back", label: one.version > serving ? "Use this" : "Go back to this", wide: true, press: () => void app.learning.rollback(one.version) })
          : h("span", { class: "tag still", text: "not published" }),
    ),
    h("p", { text: facts.filter(Boolean).join(" · ") }),
    // The sentence repeats the numbers: beside the picture its first words do, or none when it was published.
    one.reason && !(gain && one.accepted) && h("p", { class: "reason", text: sentence(gain ? (one.reason.split(":")[0] ?? "") : one.reason) }),
    gain,
    numbers.length > 0 &&
      h(
        "details",
        { class: "numbers" },
        h("summary", { text: "All numbers" }),
        h("p", { text: sentence(one.reason ?? "") }),
        h("dl", { class: "facts" }, ...numbers.map(([key, value]) => h("div", {}, h("dt", { text: words(key) }), h("dd", { text: figure(value) })))),
      ),
  );
}

// ---------------------------------------------------------------- what it learned from

const FIRST_SHOWN = 12;

function learnedFrom(app: App): HTMLElement {
  const count = h("span", { class: "count" });
  const list = h("ul", { class: "learned" });
  const more = button({ class: "plain", label: "Show all", wide: true, press: () => ((shown = Infinity), update()) });
  let shown = FIRST_SHOWN;
  const section = h(
    "details",
    { class: "fold" },
    h("summary", {}, h("span", { text: "What it learns from" }), count, icon("chevron")),
    h("p", { class: "caption", text: "What you wrote, and replies you rated up or put right. Take out what it should not learn; it counts from the next refresh." }),
    list,
    more,
  );
  function update(): void {
    const turns = app.state.learned ?? [];
    setText(count, app.state.learned ? turns.length.toLocaleString() : "");
    const newest = turns.toSorted((a, b) => Date.parse(b.at) - Date.parse(a.at));
    list.replaceChildren(...newest.slice(0, shown).map((turn) => learnedRow(app, turn)));
    if (turns.length === 0 && app.state.learned) list.replaceChildren(h("li", { class: "nothing", text: "Nothing yet." }));
    more.hidden = turns.length <= shown;
  }
  app.signals.on("panel", update);
  app.signals.on("user", () => (shown = FIRST_SHOWN));
  update();
  return section;
}

function learnedRow(app: App, turn: Turn): HTMLElement {
  const what = turn.role === "user" ? "You wrote" : turn.author === "person" ? "You put right" : "You liked";
  return h(
    "li",
    {},
    h("div", {}, h("small", { text: `${what} · ${day(turn.at)}` }), h("p", { text: turn.text })),
    button({ class: "quiet", icon: "close", label: "Do not learn from this", press: () => void app.learning.unlearn(turn.id) }),
  );
}

// ---------------------------------------------------------------- their data

function data(app: App): HTMLElement {
  const told = h("div", { class: "outcome", attrs: { role: "status", hidden: true } });
  const file = h("input", {
    class: "sr-only",
    attrs: { type: "file", accept: ".jsonl,.ndjson,.json,text/plain", tabindex: -1, "aria-label": "History file" },
    on: { change: () => void take() },
  });
  async function take(): Promise<void> {
    const chosen = file.files?.[0];
    if (!chosen) return;
    told.hidden = false;
    setAttr(told, "data-tone", "plain");
    told.replaceChildren(h("b", { text: `Reading ${chosen.name}…` }));
    const result = await app.learning.import(chosen);
    file.value = "";
    if (!result) {
      told.hidden = true;
      return;
    }
    setAttr(told, "data-tone", result.errors.length ? "bad" : "good");
    told.replaceChildren(
      h("b", { text: result.imported ? `${plural(result.imported, "turn")} brought in` : "Nothing new in that file" }),
      ...result.errors.slice(0, 5).map((error) => h("p", { text: `Line ${error.line}: ${error.message}` })),
      result.errors.length > 5 ? h("p", { text: `and ${result.errors.length - 5} more` }) : h("span"),
    );
  }
  return h(
    "details",
    { class: "fold" },
    h("summary", {}, h("span", { text: "Your data" }), icon("chevron")),
    h("p", { class: "caption", text: "JSON Lines, one turn a line. Bringing in the same file twice changes nothing." }),
    h(
      "div",
      { class: "column" },
      file,
      button({ class: "plain line", icon: "upload", label: "Import a history", wide: true, press: () => file.click() }),
      button({ class: "plain line", icon: "download", label: "Export everything", wide: true, press: () => void app.learning.export() }),
      button({ class: "plain line bad", icon: "bin", label: "Forget me", wide: true, press: () => confirmForget(app) }),
    ),
    told,
  );
}
