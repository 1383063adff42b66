/**
 * Markdown to elements, made for text that is still growing: blocks that did not change keep their elements, so a
 * selection, a scrolled code block or a copy button survives while the rest streams in.
 *
 * Whatever the model or a person writes is data. Only the tags below survive; pictures become links, because loading one
 * would tell a stranger's server that the reply was read.
 */

import DOMPurify from "dompurify";
import { Marked, type Token } from "marked";
import { button, h } from "./dom";

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    html: ({ text }) => escape(text),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: (
    "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i kbd li ol p pre s strong sub sup table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["href", "class", "align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true as const,
};

export class Markdown {
  readonly element = h("div", { class: "prose", attrs: { dir: "auto" } });
  private blocks: { source: string; nodes: Node[] }[] = [];

  set(text: string): void {
    const tokens = marked.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
    let same = 0;
    while (same < tokens.length && this.blocks[same]?.source === tokens[same]?.raw) same += 1;
    for (const block of this.blocks.splice(same)) for (const node of block.nodes) node.parentNode?.removeChild(node);
    for (const token of tokens.slice(same)) {
      const nodes = render(token);
      this.element.append(...nodes);
      this.blocks.push({ source: token.raw, nodes });
    }
  }
}

function render(token: Token): Node[] {
  const fragment = DOMPurify.sanitize(marked.parser([token]), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const code of fragment.querySelectorAll("pre")) code.replaceWith(codeBlock(code));
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table-frame" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return [...fragment.childNodes];
}

function codeBlock(pre: HTMLPreElement): HTMLElement {
  const language = /language-([\w+#.-]+)/.exec(pre.querySelector("code")?.className ?? "")?.[1] ?? "";
  const copy = button({ class: "quiet copy", icon: "copy", label: "Copy", wide: true, press: () => void copied() });
  async function copied(): Promise<void> {
    const ok = await copyText(pre.textContent ?? "");
    const label = copy.querySelector(".label");
    if (label) label.textContent = ok ? "Copied" : "Not allowed";
    setTimeout(() => label && (label.textContent = "Copy"), 1600);
  }
  pre.tabIndex = 0; // a long line must be scrollable by keyboard
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", { text: language }), copy), pre.cloneNode(true));
}

/** The clipboard, also where the page is not a secure context. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "sr-only" });
    area.value = text;
    document.body.append(area);
    area.select();
    const ok = document.execCommand("copy");
    area.remove();
    return ok;
  }
}

function escape(text: string): string {
  return text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
}
