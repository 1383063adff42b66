import type { App } from "../app";
import { button, h } from "../dom";

export function toasts(app: App): HTMLElement {
  const element = h("div", { class: "toasts", attrs: { role: "status", "aria-live": "polite" } });
  app.signals.on("toasts", () => {
    element.replaceChildren(
      ...app.state.toasts.map((toast) =>
        h(
          "div",
          { class: "toast", attrs: { "data-tone": toast.tone } },
          h("span", { text: toast.text }),
          button({ class: "quiet", icon: "close", label: "Dismiss", press: () => app.dropToast(toast.key) }),
        ),
      ),
    );
  });
  return element;
}
