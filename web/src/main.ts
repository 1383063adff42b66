/** Puts the page together and hands the keyboard round. */

import "./styles/tokens.css";
import "./styles/base.css";
import "./styles/frame.css";
import "./styles/thread.css";
import "./styles/panel.css";
import { App, lastHere } from "./app";
import { h, installIcons, setAttr } from "./dom";
import { composer } from "./views/composer";
import { signIn } from "./views/dialogs";
import { panel } from "./views/panel";
import { sidebar } from "./views/sidebar";
import { thread } from "./views/thread";
import { toasts } from "./views/toasts";
import { topbar } from "./views/topbar";

installIcons();
const app = new App();
const live = h("div", { class: "sr-only", attrs: { "aria-live": "polite", id: "announcements" } });
app.announce = (text) => {
  live.textContent = text;
};

const write = composer(app);
const curtain = h("div", { class: "curtain", on: { click: () => app.set({ drawerOpen: false, panelOpen: false }) } });
const frame = h(
  "div",
  { class: "frame" },
  h("a", { class: "skip", text: "Skip to the message field", attrs: { href: "#message" }, on: { click: skip } }),
  sidebar(app),
  h("main", { class: "main" }, topbar(app), signIn(app), thread(app, (text) => write.fill(text)), write.element),
  panel(app),
  curtain,
  toasts(app),
  live,
);
document.querySelector("#app")?.replaceChildren(frame);

app.signals.on(["layout", "link"], layout);
layout();

function layout(): void {
  setAttr(frame, "data-panel", app.state.panelOpen);
  setAttr(frame, "data-drawer", app.state.drawerOpen);
  setAttr(frame, "data-refused", app.state.link === "refused");
}

document.addEventListener("keydown", (event) => {
  // A dialog keeps its keys to itself: the Escape that closes it stops no reply behind it.
  if (document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    app.set({ drawerOpen: true });
    document.querySelector<HTMLInputElement>("#search")?.select();
    document.querySelector<HTMLInputElement>("#search")?.focus();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    app.newChat();
    write.focus();
  } else if (event.key === "Escape") {
    if (app.state.drawerOpen) app.set({ drawerOpen: false });
    else if (app.busy) app.stop();
    else if (app.state.panelOpen && innerWidth < 1000) app.set({ panelOpen: false });
    else write.focus();
  }
});

/** The address names the conversation that is open; a way within the page must not take its place. */
function skip(event: Event): void {
  event.preventDefault();
  write.focus();
}

addEventListener("popstate", () => {
  const id = asked();
  if (id === app.state.thread.id) return;
  if (id) void app.open(id);
  else app.newChat();
});

void app.enter(lastHere(), asked());
if (matchMedia("(hover: hover)").matches) write.focus();

function asked(): string | null {
  const found = /^#c=(.+)$/.exec(location.hash);
  try {
    return found ? decodeURIComponent(found[1] ?? "") : null;
  } catch {
    return null;
  }
}
