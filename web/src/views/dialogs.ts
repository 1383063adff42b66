/** What needs an answer first: forgetting, and showing who one is where the service does not hand out names. */

import { nameIn } from "../api";
import type { App } from "../app";
import { button, h, icon, remember } from "../dom";

export function confirmForget(app: App): void {
  const field = h("input", { attrs: { type: "text", "aria-label": "Your name", autocomplete: "off", spellcheck: "false" } });
  const go = h("button", { class: "primary bad", text: "Forget everything", attrs: { type: "submit", disabled: true } });
  field.addEventListener("input", () => (go.disabled = field.value.trim() !== app.state.user.trim()));
  const dialog = h(
    "dialog",
    { class: "dialog", attrs: { "aria-labelledby": "forget-title" } },
    h(
      "form",
      {
        attrs: { method: "dialog" },
        on: {
          submit: () => void app.learning.forget(),
        },
      },
      h("h2", { text: "Forget me", attrs: { id: "forget-title" } }),
      h("p", { text: "This removes every conversation, every version of your adapter and everything kept in memory for you. It cannot be undone; export first what you want to keep." }),
      h("label", {}, h("span", { text: `Type ${app.state.user} to go on.` }), field),
      h("div", { class: "row" }, go, button({ class: "plain", label: "Keep everything", wide: true, press: () => dialog.close() })),
    ),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/** Shown in place of the conversation when the service wants a token it did not give. */
export function signIn(app: App): HTMLElement {
  const field = h("input", { attrs: { type: "password", "aria-label": "Token", placeholder: "Token", autocomplete: "off", spellcheck: "false" } });
  const why = h("p", { class: "caption" });
  const element = h(
    "form",
    {
      class: "sign-in",
      on: {
        submit: (event) => {
          event.preventDefault();
          const token = field.value.trim();
          if (!token) return;
          remember("attune.token", token, () => sessionStorage);
          void app.enter(nameIn(token) ?? app.state.user);
        },
      },
    },
    icon("mark", "mark"),
    h("h2", { text: "Who is there?" }),
    h("p", { text: "It takes a token to come in. Paste the one that “attune token NAME” printed; it stays in this tab." }),
    h("div", { class: "row" }, field, h("button", { class: "primary", text: "Come in", attrs: { type: "submit" } })),
    why,
    button({ class: "plain", label: "Try again without", wide: true, press: () => {
      remember("attune.token", null, () => sessionStorage);
      void app.enter(app.state.user);
    } }),
  );
  const update = (): void => {
    element.hidden = app.state.link !== "refused";
    why.textContent = app.state.linkDetail;
  };
  app.signals.on("link", update);
  update();
  return element;
}
