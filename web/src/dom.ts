/** Small helpers to build elements. Text always enters as text nodes: there is no path from data to markup here. */

import sprite from "./icons.svg?raw";

type Child = Node | string | null | undefined | false;

interface Props {
  class?: string;
  text?: string;
  attrs?: Record<string, string | number | boolean | null | undefined>;
  on?: { [K in keyof HTMLElementEventMap]?: (event: HTMLElementEventMap[K]) => void };
}

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (props.class) element.className = props.class;
  if (props.text !== undefined) element.textContent = props.text;
  for (const [name, value] of Object.entries(props.attrs ?? {})) setAttr(element, name, value);
  for (const [name, listener] of Object.entries(props.on ?? {})) {
    element.addEventListener(name, listener as EventListener);
  }
  append(element, children);
  return element;
}

export function append(element: Element, children: Child[]): void {
  for (const child of children) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** `false`, null and undefined remove the attribute; `true` sets it empty. */
export function setAttr(element: Element, name: string, value: string | number | boolean | null | undefined): void {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else element.setAttribute(name, value === true ? "" : String(value));
}

/** Show these rows, of which each names itself by `data-key` or its text, and leave alone those that are there already:
 * a press that began on a row, and the keyboard in it, would be lost with it. */
export function renew(parent: Element, rows: Element[]): void {
  const nameOf = (row: Element): string | null => row.getAttribute("data-key") ?? row.textContent;
  const there = new Map([...parent.children].map((row) => [nameOf(row), row]));
  const wanted = rows.map((row) => {
    const known = there.get(nameOf(row));
    return known?.isEqualNode(row) ? known : row;
  });
  arrange(parent, wanted);
}

/** Let these be the children, in this order; what is in its place already is not moved. */
export function arrange(parent: Element, wanted: Element[]): void {
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((child, at) => {
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] ?? null);
  });
}

/** Write only what changed, so that screen readers and the caret are left alone. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name: string, extra = ""): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", `icon ${extra}`.trim());
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** The symbols that `icon` refers to, put into the page once. */
export function installIcons(): void {
  const svg = new DOMParser().parseFromString(sprite, "image/svg+xml").documentElement;
  svg.setAttribute("class", "sprite");
  svg.setAttribute("aria-hidden", "true");
  document.body.prepend(document.importNode(svg, true));
}

interface ButtonProps extends Props {
  icon?: string;
  label: string;
  /** Show the label beside the icon instead of only naming it. */
  wide?: boolean;
  press: (event: MouseEvent) => void;
}

export function button(props: ButtonProps): HTMLButtonElement {
  const { icon: name, label, wide, press, ...rest } = props;
  const attrs: Props["attrs"] = { type: "button", ...rest.attrs };
  if (!wide) {
    attrs["aria-label"] = label;
    attrs["title"] = label;
  }
  const element = h("button", { ...rest, attrs, on: { ...rest.on, click: press } });
  if (name) element.append(icon(name));
  if (wide) element.append(h("span", { class: "label", text: label }));
  return element;
}

/** Ids that need no secure context: a page opened over plain http on a home network has no crypto.randomUUID. */
export function newId(prefix: string): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return prefix + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A value of storage, or the fallback when storage is off or holds something else. */
export function remembered<T>(key: string, fallback: T, storage: () => Storage = () => localStorage): T {
  try {
    const raw = storage().getItem(key);
    return raw === null ? fallback : (JSON.parse(raw) as T);
  } catch {
    return fallback;
  }
}

export function remember(key: string, value: unknown, storage: () => Storage = () => localStorage): void {
  try {
    if (value === null || value === undefined || value === "") storage().removeItem(key);
    else storage().setItem(key, JSON.stringify(value));
  } catch {
    // Storage is full or off: the page works on, it only forgets on reload.
  }
}
