/** Where we are: the conversation's title, the state of the connection, the theme, and the way to the adapter. */

import type { App } from "../app";
import { button, h, icon, remember, setAttr, setText } from "../dom";
import { versionName } from "../format";
import { ended } from "../state";

export function topbar(app: App): HTMLElement {
  const title = h("h1", { class: "title", attrs: { dir: "auto" } });
  const dot = h("span", { class: "dot", attrs: { "aria-hidden": "true" } });
  const words = h("span", {});
  const again = button({ class: "plain", label: "Try now", wide: true, press: () => app.hurry() });
  const link = h("div", { class: "link", attrs: { role: "status" } }, dot, words, again);
  const chipText = h("span", {});
  const chip = h(
    "button",
    {
      class: "chip",
      attrs: { type: "button", "aria-controls": "panel", id: "adapter-chip" },
      on: { click: () => app.set({ panelOpen: !app.state.panelOpen }) },
    },
    icon("tune"),
    chipText,
  );
  const theme = button({ class: "quiet", icon: dark() ? "sun" : "moon", label: "Light or dark", press: () => switchTheme(theme) });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme.replaceChildren(icon(dark() ? "sun" : "moon")));

  app.signals.on(["conversations", "thread"], showTitle);
  app.signals.on("link", showLink);
  app.signals.on(["me", "layout", "refresh"], showChip);
  showTitle();
  showLink();
  showChip();
  return h(
    "header",
    { class: "topbar" },
    button({
      class: "quiet only-narrow",
      icon: "menu",
      label: "Show the history",
      attrs: { "aria-controls": "sidebar" },
      press: () => app.set({ drawerOpen: true }),
    }),
    title,
    link,
    theme,
    chip,
  );

  function showTitle(): void {
    const { thread, conversations } = app.state;
    const first = thread.items.find((item) => item.kind === "person");
    const known = conversations.find((one) => one.id === thread.id)?.title;
    const name = thread.state === "new" ? "New conversation" : (known ?? (first?.kind === "person" ? first.text : "Conversation"));
    setText(title, name);
    document.title = thread.state === "new" ? "Attune" : `${name} · Attune`;
  }

  function showLink(): void {
    const { link: state, linkDetail, historySaved } = app.state;
    const told =
      state === "live"
        ? historySaved
          ? "Live"
          : "History is not being saved"
        : state === "connecting"
          ? "Connecting"
          : state === "resuming"
            ? "Resuming"
            : "Not connected";
    setAttr(link, "data-state", state === "live" && !historySaved ? "unsaved" : state);
    setAttr(link, "title", linkDetail || null);
    setText(words, told);
    again.hidden = state !== "resuming" && state !== "refused";
  }

  function showChip(): void {
    const version = app.state.me?.adapter.version;
    const working = app.state.refresh && !ended(app.state.refresh.stage);
    setText(chipText, version === undefined ? "Adapter" : version ? versionName(version) : "base");
    setAttr(chip, "aria-expanded", String(app.state.panelOpen));
    setAttr(chip, "data-working", Boolean(working));
    setAttr(chip, "aria-label", `Your adapter: ${version ? `version ${version}` : "none yet"}${working ? ", learning now" : ""}`);
  }
}

function dark(): boolean {
  const chosen = document.documentElement.dataset["theme"];
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme(toggle: HTMLElement): void {
  const next = dark() ? "light" : "dark";
  document.documentElement.dataset["theme"] = next;
  // theme.js reads the bare word before the first paint.
  try {
    localStorage.setItem("attune.theme", next);
  } catch {
    remember("attune.theme", null);
  }
  toggle.replaceChildren(icon(dark() ? "sun" : "moon"));
}
