/** Conversations by day, search, and who is speaking. */

import type { App } from "../app";
import { button, h, icon, renew, setAttr, setText } from "../dom";
import { hueOf, initials, period } from "../format";
import { GUEST, samplePerson } from "../state";

export function sidebar(app: App): HTMLElement {
  const search = h("input", {
    attrs: { type: "search", placeholder: "Search conversations", "aria-label": "Search conversations", id: "search", autocomplete: "off" },
    on: { input: () => app.set({ search: search.value }) },
  });
  const list = h("nav", { class: "conversations", attrs: { "aria-label": "Conversations" } });
  const element = h(
    "aside",
    { class: "sidebar", attrs: { id: "sidebar", "aria-label": "History" } },
    h(
      "div",
      { class: "brand" },
      icon("mark", "mark"),
      h("span", { class: "brand-name", text: "Attune" }),
      button({ class: "quiet only-narrow", icon: "close", label: "Close the history", press: () => app.set({ drawerOpen: false }) }),
    ),
    button({ class: "new-chat", icon: "new", label: "New conversation", wide: true, press: () => app.newChat() }),
    h("label", { class: "search" }, icon("search"), search, h("kbd", { text: /Mac|iP/.test(navigator.platform) ? "⌘K" : "Ctrl K" })),
    list,
    person(app),
  );

  app.signals.on(["conversations", "items"], () => fill(app, list));
  app.signals.on("layout", () => {
    if (search.value !== app.state.search) search.value = app.state.search;
  });
  fill(app, list);
  return element;
}

function fill(app: App, list: HTMLElement): void {
  const { conversations, search, thread, conversationsProblem } = app.state;
  const wanted = search.trim().toLowerCase();
  const shown = conversations.filter((one) => !wanted || one.title.toLowerCase().includes(wanted));
  const rows: HTMLElement[] = [];
  let heading = "";
  for (const one of shown) {
    const under = period(one.last_at);
    if (under !== heading) rows.push(h("h2", { text: (heading = under) }));
    const current = one.id === thread.id;
    const row = h(
      "button",
      { class: "conversation", attrs: { type: "button", "data-key": one.id, "aria-current": current ? "page" : null, title: one.title }, on: { click: () => void app.open(one.id) } },
      h("span", { text: one.title || "Untitled", attrs: { dir: "auto" } }),
      app.isRunning(one.id) && h("span", { class: "pulse", attrs: { role: "img", "aria-label": "being answered" } }),
    );
    rows.push(row);
  }
  if (conversationsProblem) {
    rows.push(
      h("p", { class: "nothing", text: conversationsProblem }),
      button({ class: "plain", label: "Try again", wide: true, press: () => void app.loadConversations() }),
    );
  } else if (rows.length === 0) {
    rows.push(h("p", { class: "nothing", text: wanted ? `Nothing is called “${search.trim()}”.` : "Your conversations will stand here." }));
  }
  renew(list, rows);
}

/** The person at the foot of the list, and the menu to become another. */
function person(app: App): HTMLElement {
  const avatar = h("span", { class: "avatar", attrs: { "aria-hidden": "true" } });
  const name = h("span", { class: "person-name" });
  const note = h("span", { class: "person-note" });
  const menu = h("div", { class: "menu", attrs: { id: "people", hidden: true } });
  const toggle = h(
    "button",
    {
      class: "person",
      attrs: { type: "button", "aria-expanded": "false", "aria-controls": "people", "aria-label": "Switch person" },
      on: { click: () => open(menu.hidden !== false) },
    },
    avatar,
    h("span", { class: "person-text" }, name, note),
    icon("chevron"),
  );
  const element = h("div", { class: "person-box", on: { keydown: escape, focusout: leave } }, menu, toggle);

  function open(wanted: boolean): void {
    menu.hidden = !wanted;
    setAttr(toggle, "aria-expanded", String(wanted));
    if (!wanted) return;
    menu.replaceChildren(...choices(app, () => open(false)));
    menu.querySelector<HTMLElement>("[aria-current], button")?.focus();
  }
  function escape(event: KeyboardEvent): void {
    if (event.key !== "Escape" || menu.hidden) return;
    event.stopPropagation();
    open(false);
    toggle.focus();
  }
  function leave(event: FocusEvent): void {
    if (event.relatedTarget instanceof Node && !element.contains(event.relatedTarget)) open(false);
  }
  function update(): void {
    const sample = samplePerson(app.state);
    setText(avatar, initials(app.state.user));
    setText(name, sample?.name ?? app.state.user);
    setText(note, sample ? `Sample: ${sample.title ?? "a person"}` : app.state.user === GUEST ? "Choose who you are" : "You");
  }
  document.addEventListener("pointerdown", (event) => {
    if (event.target instanceof Node && !element.contains(event.target)) open(false);
  });
  app.signals.on("user", update);
  update();
  return element;
}

function choices(app: App, done: () => void): HTMLElement[] {
  const { samples, user } = app.state;
  const become = (name: string): void => {
    done();
    if (name && name !== user) {
      history.replaceState(null, "", location.pathname);
      void app.enter(name);
    }
  };
  const rows = samples.map((sample) => {
    const face = h("span", { class: "avatar", text: initials(sample.name), attrs: { "aria-hidden": "true" } });
    face.style.setProperty("--hue", String(hueOf(sample.name)));
    return h(
      "button",
      { class: "choice", attrs: { type: "button", "aria-current": sample.name === user ? "true" : null }, on: { click: () => become(sample.name) } },
      face,
      h("span", {}, h("b", { text: sample.name }), h("small", { text: sample.title ?? "" })),
    );
  });
  const field = h("input", {
    attrs: { type: "text", name: "user", placeholder: "Any name", "aria-label": "Be someone else: any name", maxlength: 64, autocomplete: "off", spellcheck: "false" },
  });
  const form = h(
    "form",
    {
      class: "someone",
      on: {
        submit: (event) => {
          event.preventDefault();
          become(field.value.trim());
        },
      },
    },
    field,
    h("button", { class: "primary", text: "Go", attrs: { type: "submit" } }),
  );
  return [
    h("h2", { text: "Sample people" }),
    ...rows,
    h("h2", { text: samples.some((sample) => sample.name === user) ? "Yourself, or someone else" : `You are ${user}` }),
    form,
  ];
}
