/** Every version of the person's adapter: what it gained, what it learned from, turn by turn, and how to go back to it. */

import type { App } from "../app";
import { button, h, icon, renew } from "../dom";
import { day, figure, plural, sentence, shortTime, versionName, words } from "../format";
import type { Turn, Version } from "../protocol";

export const FIRST_SHOWN = 12;

export function versions(app: App): HTMLElement {
  const list = h("ul", { class: "versions" });
  const opened = new Opened();
  const section = h("details", { class: "fold", attrs: { open: true } }, h("summary", {}, h("span", { text: "Versions" }), icon("chevron")), list);
  const update = (): void => {
    const { versions: known, me } = app.state;
    const serving = me?.adapter.version ?? 0;
    const rows = (known ?? []).filter((one) => one.version > 0).map((one) => versionRow(app, one, serving, opened));
    const base = versionRow(app, { version: 0, accepted: true, reason: "The model as it came, nothing learned." }, serving, opened);
    renew(list, [...rows, base]);
  };
  app.signals.on(["panel", "me"], update);
  whenSomeoneElse(app, () => opened.names.clear());
  update();
  return section;
}

/** Do this when another person has come; the signal alone is also raised when more is known of the same one. */
export function whenSomeoneElse(app: App, act: () => void): void {
  let { user } = app.state;
  app.signals.on("user", () => {
    if (user === app.state.user) return;
    user = app.state.user;
    act();
  });
}

/** Which folds are open, and which lists shown whole: the rows are made anew whenever something changes. */
class Opened {
  readonly names = new Set<string>();

  fold(name: string, summary: string, shown: () => void, ...inner: (Node | false)[]): HTMLElement {
    const element = h("details", { class: "numbers", attrs: { open: this.names.has(name) } }, h("summary", { text: summary }), ...inner);
    element.addEventListener("toggle", () => {
      if (element.open) shown();
      this.names[element.open ? "add" : "delete"](name);
    });
    return element;
  }
}

function versionRow(app: App, one: Version, serving: number, opened: Opened): HTMLElement {
  const current = one.version === serving;
  const facts = [one.created_at ? shortTime(one.created_at) : "", one.population ? `began with what everyone begins with (${one.population})` : ""];
  const gain = gainOf(one.numbers ?? {});
  const numbers = Object.entries(one.numbers ?? {});
  return h(
    "li",
    { class: "version", attrs: { "data-key": one.version, "data-version": one.version, "data-current": current, "data-refused": !one.accepted } },
    h(
      "div",
      { class: "version-line" },
      h("b", { text: one.version ? versionName(one.version) : "base" }),
      current
        ? h("span", { class: "tag", text: "answers now" })
        : one.on_trial
          ? h("span", { class: "tag", text: "on trial" })
          : one.accepted
          ? button({ class: "plain", icon: "back", label: one.version > serving ? "Use this" : "Go back to this", wide: true, press: () => void app.learning.rollback(one.version) })
          : h("span", { class: "tag still", text: "not published" }),
    ),
    h("p", { text: facts.filter(Boolean).join(" · ") }),
    ...trialOf(app, one, serving),
    one.marked ? h("p", { class: "taken-out" }, icon("warn"), h("span", { text: markOf(one.marked) })) : null,
    // The sentence repeats the numbers: beside the picture its first words do, or none when it was published.
    one.reason && !(gain && one.accepted) && h("p", { class: "reason", text: sentence(gain ? (one.reason.split(":")[0] ?? "") : one.reason) }),
    gain,
    one.turns ? turnsOf(app, one, opened) : null,
    numbers.length > 0 &&
      opened.fold(
        `numbers ${one.version}`,
        "All numbers",
        () => undefined,
        h("p", { text: sentence(one.reason ?? "") }),
        h("dl", { class: "facts" }, ...numbers.map(([key, value]) => h("div", {}, h("dt", { text: words(key) }), h("dd", { text: figure(value) })))),
      ),
  );
}

/** A trial that goes on, with what decides it and a way to decide by hand; or how one ended. */
function trialOf(app: App, one: Version, serving: number): HTMLElement[] {
  const { trial } = app.state;
  if (!one.on_trial || trial?.version !== one.version) {
    const told = one.trial && ENDED[one.trial.outcome];
    return told ? [h("p", { class: "reason", text: told(one.trial?.numbers ?? {}) })] : [];
  }
  const before = `${versionName(serving)} has ${trial.before_up} up, ${trial.before_down} down`;
  return [
    h("p", { class: "reason", text: `Answers ${Math.round(trial.share * 100)} % of your messages, until your ratings or ${trial.needed} replies decide.` }),
    h("p", { class: "tally", text: `${trial.replies} of ${trial.needed} replies · ${trial.up} up, ${trial.down} down · ${before}` }),
    h(
      "div",
      { class: "row" },
      button({ class: "plain", icon: "check", label: "Use it for all", wide: true, press: () => void app.learning.rollback(one.version) }),
      button({ class: "plain", icon: "back", label: "End the trial", wide: true, press: () => void app.learning.rollback(serving) }),
    ),
  ];
}

const ENDED: Record<string, (numbers: Record<string, number>) => string> = {
  promoted: (counted) => `Answers since its trial: ${plural(counted["replies"] ?? 0, "reply", "replies")}, ${votes(counted)}.`,
  "rolled back": (counted) => `Taken back on trial: ${votes(counted)}, less than the version before.`,
  "by hand": () => "Its trial was ended by hand.",
  replaced: () => "Its trial ended when a newer version came.",
  "taken out": () => "Its trial ended: turns it learned from were taken out.",
};

function votes(counted: Record<string, number>): string {
  return `${counted["up"] ?? 0} rated up, ${counted["down"] ?? 0} down`;
}

function markOf(turns: number): string {
  return `Learned from ${plural(turns, "turn")} that you took out since. The next refresh starts without ${turns === 1 ? "it" : "them"}.`;
}

/** What one version was trained on, asked for when it is opened. */
function turnsOf(app: App, one: Version, opened: Opened): HTMLElement {
  const turns = app.state.versionTurns[one.version];
  const whole = `whole ${one.version}`;
  const list = h("ul", { class: "learned" });
  const all = button({ class: "plain", label: "Show all", wide: true, press: () => (opened.names.add(whole), show()) });
  const show = (): void => {
    const most = opened.names.has(whole) ? Infinity : FIRST_SHOWN;
    list.replaceChildren(...(turns ?? []).toReversed().slice(0, most).map((turn) => turnRow(app, turn)));
    all.hidden = (turns?.length ?? 0) <= most;
  };
  show();
  const ask = (): void => {
    if (!app.state.versionTurns[one.version]) void app.learning.loadTurns(one.version);
  };
  return opened.fold(`turns ${one.version}`, `${one.accepted ? "Learned from" : "Trained on"} ${plural(one.turns ?? 0, "turn")}`, ask, list, all);
}

/** A turn that is learned from, with the way to take it out; or one that was taken out since. */
export function turnRow(app: App, turn: Turn): HTMLElement {
  const what = turn.role === "user" ? "You wrote" : turn.author === "person" ? "You put right" : "You liked";
  const gone = turn.learned === false;
  return h(
    "li",
    { attrs: { "data-key": turn.id, "data-gone": gone } },
    h("div", {}, h("small", { text: `${what} · ${day(turn.at)}${gone ? " · taken out" : ""}` }), h("p", { text: turn.text, attrs: { dir: "auto" } })),
    !gone && button({ class: "quiet", icon: "close", label: "Do not learn from this", press: () => void app.learning.unlearn(turn.id) }),
  );
}

/** What the gate measured on turns that were held back: the change in loss, and how sure it is of it. */
export function gainOf(numbers: Record<string, unknown>): HTMLElement | null {
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
