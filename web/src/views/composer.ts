/** Where the person writes. The draft of every conversation is kept until it is sent. */

import type { App } from "../app";
import { button, h, icon, remember, remembered, setAttr, setText } from "../dom";

const TYPING_EVERY_MS = 8_000;

export interface Composer {
  element: HTMLElement;
  focus: () => void;
  fill: (text: string) => void;
}

export function composer(app: App): Composer {
  let draftKey = "";
  let typedAt = 0;
  const field = h("textarea", {
    attrs: { id: "message", rows: 1, "aria-label": "Message", placeholder: "Write a message", enterkeyhint: "send", autocomplete: "off", dir: "auto" },
    on: { input: changed, keydown: keyed },
  });
  const go = h("button", { class: "go", attrs: { type: "submit", "aria-label": "Send" } }, icon("send"));
  const sides = button({
    class: "toggle",
    icon: "sides",
    label: "Side by side",
    wide: true,
    attrs: { title: "Ask the base model and your own with the same seed; nothing of it is saved" },
    press: () => app.set({ comparing: !app.state.comparing }),
  });
  const blind = h("input", { attrs: { type: "checkbox" }, on: { change: () => app.set({ blind: blind.checked }) } });
  const blindLabel = h("label", { class: "blind" }, blind, h("span", { text: "Hide which is which" }));
  const hint = h("span", { class: "hint" });
  const form = h(
    "form",
    { class: "composer", on: { submit: pressed } },
    field,
    h("div", { class: "composer-row" }, sides, blindLabel, hint, go),
  );

  app.signals.on("thread", () => {
    restore();
    show();
  });
  app.signals.on(["items", "layout", "link"], show);
  restore();
  show();
  return { element: h("div", { class: "composer-frame" }, form), focus: () => field.focus(), fill };

  function pressed(event: Event): void {
    event.preventDefault();
    if (app.busy) return app.stop();
    submit();
  }

  function submit(): void {
    const text = field.value.trim();
    if (!text || app.busy || app.state.link === "refused") return;
    field.value = "";
    remember(draftKey, null);
    app.send(text);
    changed();
    field.focus();
  }

  function keyed(event: KeyboardEvent): void {
    // Enter that ends an input method's composition is part of writing a word.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && field.value === "") {
      const last = app.state.thread.items.findLast((item) => item.kind === "person");
      if (last?.kind !== "person") return;
      event.preventDefault();
      fill(last.text);
    }
  }

  function fill(text: string): void {
    field.value = text;
    changed();
    field.focus();
    field.setSelectionRange(text.length, text.length);
  }

  function changed(): void {
    remember(draftKey, field.value);
    grow();
    show();
    if (field.value && performance.now() - typedAt > TYPING_EVERY_MS) {
      typedAt = performance.now();
      app.typing();
    }
  }

  function grow(): void {
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, 220)}px`;
  }

  function restore(): void {
    const { user, thread } = app.state;
    const key = `attune.draft.${user}.${thread.state === "new" ? "new" : thread.id}`;
    if (key === draftKey) return;
    draftKey = key;
    field.value = remembered(key, "");
    requestAnimationFrame(grow);
  }

  function show(): void {
    const { comparing, link } = app.state;
    const { busy } = app;
    setAttr(sides, "aria-pressed", String(comparing));
    blindLabel.hidden = !comparing;
    blind.checked = app.state.blind;
    setAttr(form, "data-comparing", comparing);
    setAttr(field, "placeholder", comparing ? "Ask both the same thing" : "Write a message");
    const label = busy ? "Stop" : "Send";
    if (go.getAttribute("aria-label") !== label) {
      setAttr(go, "aria-label", label);
      setAttr(go, "title", busy ? "Stop (Esc)" : "Send (Enter)");
      go.replaceChildren(icon(busy ? "stop" : "send"));
    }
    go.disabled = !busy && (!field.value.trim() || link === "refused");
    setText(hint, busy ? "Esc to stop" : comparing ? "" : "Enter to send · Shift + Enter for a new line");
  }
}
