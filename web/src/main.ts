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
const main = h("main", { class: "main" }, topbar(app), signIn(app), thread(app, (text) => write.fill(text)), write.element);
const narrow = matchMedia("(max-width: 999px)");
const frame = h(
  "div",
  { class: "frame" },
  h("a", { class: "skip", text: "Skip to the message field", attrs: { href: "#message" }, on: { click: skip } }),
  sidebar(app),
  main,
  panel(app),
  curtain,
  toasts(app),
  live,
);
document.querySelector("#app")?.replaceChildren(frame);

app.signals.on(["layout", "link"], layout);
narrow.addEventListener("change", layout);
layout();

function layout(): void {
  const { panelOpen, drawerOpen, link } = app.state;
  main.inert = false;
  lay("panel", "data-panel", panelOpen);
  lay("sidebar", "data-drawer", drawerOpen);
  main.inert = narrow.matches && (panelOpen || drawerOpen);
  setAttr(frame, "data-refused", link === "refused");
}

/** The keyboard goes into what opens over the rest, and back to the button that opened it. */
function lay(id: string, attribute: string, open: boolean): void {
  const part = frame.querySelector(`#${id}`);
  const opener = frame.querySelector<HTMLElement>(`[aria-controls="${id}"]`);
  const inside = part?.contains(document.activeElement);
  const changed = frame.hasAttribute(attribute) !== open;
  setAttr(frame, attribute, open);
  if (opener) setAttr(opener, "aria-expanded", String(open));
  if (!changed) return;
  if (open && narrow.matches) part?.querySelector<HTMLElement>("button")?.focus();
  else if (!open && inside) opener?.focus();
}

document.addEventListener("keydown", (event) => {
  // A dialog keeps its keys to itself: the Escape that closes it stops no reply behind it.
  if (document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    app.set({ drawerOpen: true });
    layout(); // what is hidden takes no focus
    document.querySelector<HTMLInputElement>("#search")?.select();
    document.querySelector<HTMLInputElement>("#search")?.focus();
  } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    app.newChat();
    layout();
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
