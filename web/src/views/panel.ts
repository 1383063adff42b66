/** The person's adapter: which version answers, learning now, every version, what it learned from, and their data. */

import type { App } from "../app";
import { button, h, icon, renew, setAttr, setText } from "../dom";
import { ago, plural, sentence, versionName } from "../format";
import { ended, type Refresh } from "../state";
import { confirmForget } from "./dialogs";
import { FIRST_SHOWN, gainOf, turnRow, versions, whenSomeoneElse } from "./versions";

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
          ? `${plural(fresh, "new turn")} to learn from.`
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
  if (!refresh.published && refresh.to !== refresh.from) {
    return [h("b", { text: `${versionName(refresh.to)} answers again` }), h("p", { text: sentence(refresh.reason) })];
  }
  const plain = refresh.published ? "It does better on turns it had not seen." : "The version before stays.";
  if (refresh.trial) {
    return [h("b", { text: `${versionName(refresh.to)} is on trial` }), gain ?? h("p", { text: "It answers some of your replies; your ratings decide." })];
  }
  const unchanged = refresh.reason.startsWith("worse")
    ? "Not better: the version before stays"
    : refresh.reason.startsWith("refused")
      ? "Refused: the version before stays"
      : "No measurable change yet";
  return [
    h("b", { text: refresh.published ? `${versionName(refresh.to)} answers from now on` : unchanged }),
    gain && !refresh.reason.startsWith("refused") ? gain : h("p", { text: refresh.reason || plain }),
  ];
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

// ---------------------------------------------------------------- what it learns from

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
    const rows = newest.slice(0, shown).map((turn) => turnRow(app, turn));
    if (turns.length === 0 && app.state.learned) rows.push(h("li", { class: "nothing", text: "Nothing yet." }));
    renew(list, rows);
    more.hidden = turns.length <= shown;
  }
  app.signals.on("panel", update);
  whenSomeoneElse(app, () => (shown = FIRST_SHOWN));
  update();
  return section;
}

// ---------------------------------------------------------------- their data

function data(app: App): HTMLElement {
  const told = h("div", { class: "outcome", attrs: { role: "status", hidden: true } });
  const file = h("input", {
    class: "sr-only",
    attrs: { type: "file", accept: ".jsonl,.ndjson,.json,text/plain", tabindex: -1, "aria-label": "History file" },
    on: { change: () => void take() },
  });
  function tellNothing(): void {
    told.hidden = true;
    told.replaceChildren();
  }
  async function take(): Promise<void> {
    const chosen = file.files?.[0];
    if (!chosen) return;
    told.hidden = false;
    setAttr(told, "data-tone", "plain");
    told.replaceChildren(h("b", { text: `Reading ${chosen.name}…` }));
    const { user } = app.state;
    const result = await app.learning.import(chosen);
    file.value = "";
    if (!result || user !== app.state.user) return tellNothing();
    setAttr(told, "data-tone", result.errors.length ? "bad" : "good");
    told.replaceChildren(
      h("b", { text: result.imported ? `${plural(result.imported, "turn")} brought in` : result.known ? "Nothing new in that file" : "No turn of yours in that file" }),
      ...result.errors.slice(0, 5).map((error) => h("p", { text: error.line ? `Line ${error.line}: ${error.message}` : error.message })),
      result.errors.length > 5 ? h("p", { text: `and ${result.errors.length - 5} more` }) : h("span"),
    );
    told.scrollIntoView({ block: "nearest" }); // it stands at the panel's end, below what is seen of a long one
  }
  whenSomeoneElse(app, tellNothing);
  return h(
    "details",
    { class: "fold" },
    h("summary", {}, h("span", { text: "Your data" }), icon("chevron")),
    h("p", { class: "caption", text: "JSON Lines, one turn a line, as an export has them. Bringing in the same file twice changes nothing." }),
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
