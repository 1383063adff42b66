/** Numbers and times as people read them. Pure. */

const DAY = 86_400_000;

export function ago(iso: string | null | undefined, now = Date.now()): string {
  const at = iso ? Date.parse(iso) : NaN;
  if (Number.isNaN(at)) return "";
  const seconds = Math.max(0, (now - at) / 1000);
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86_400) return `${Math.round(seconds / 3600)} h ago`;
  if (seconds < 7 * 86_400) return plural(Math.round(seconds / 86_400), "day") + " ago";
  return day(iso);
}

export function day(iso: string | null | undefined): string {
  const at = iso ? new Date(iso) : null;
  if (!at || Number.isNaN(at.getTime())) return "";
  const sameYear = at.getFullYear() === new Date().getFullYear();
  return at.toLocaleDateString(undefined, { day: "numeric", month: "short", ...(sameYear ? {} : { year: "numeric" }) });
}

export function dateTime(iso: string | null | undefined): string {
  const at = iso ? new Date(iso) : null;
  if (!at || Number.isNaN(at.getTime())) return "";
  return at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** "21 Nov, 14:03" */
export function shortTime(iso: string): string {
  const at = new Date(iso);
  return `${day(iso)}, ${at.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" })}`;
}

/** The heading a conversation stands under in the list. */
export function period(iso: string, now = Date.now()): string {
  const at = Date.parse(iso);
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  if (at >= midnight) return "Today";
  if (at >= midnight - DAY) return "Yesterday";
  if (at >= midnight - 6 * DAY) return "This week";
  const date = new Date(at);
  const sameYear = date.getFullYear() === new Date(now).getFullYear();
  return date.toLocaleDateString(undefined, { month: "long", ...(sameYear ? {} : { year: "numeric" }) });
}

export function plural(count: number, word: string, many = `${word}s`): string {
  return `${count.toLocaleString()} ${count === 1 ? word : many}`;
}

export function sentence(text: string): string {
  const whole = text.trim();
  return whole && whole.charAt(0).toUpperCase() + whole.slice(1) + (/[.!?]$/.test(whole) ? "" : ".");
}

export function seconds(value: number): string {
  if (value < 0.0005) return "0 ms";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

/** "held_out_loss" → "Held out loss" */
export function words(key: string): string {
  const spaced = key.replace(/_/g, " ").trim();
  return spaced.charAt(0).toUpperCase() + spaced.slice(1);
}

export function figure(value: unknown): string {
  if (typeof value === "number") {
    if (Number.isInteger(value)) return value.toLocaleString();
    return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  return String(value);
}

export function versionName(version: number | null | undefined): string {
  return version ? `v${version}` : "base";
}

export function initials(name: string): string {
  const parts = name.trim().split(/[\s._-]+/).filter(Boolean);
  const letters = parts.length > 1 ? (parts[0]?.[0] ?? "") + (parts[1]?.[0] ?? "") : name.trim().slice(0, 2);
  return letters.toUpperCase() || "?";
}

/** A person's own colour: one of a dozen hues that stay legible in light and dark. The sample people are told apart. */
const HUES = [172, 148, 262, 28, 232, 340, 205, 58, 300, 120, 12, 190];
const CHOSEN: Record<string, number> = { guest: 172, Bram: 46, Odile: 145, Wen: 272 };

export function hueOf(name: string): number {
  const chosen = CHOSEN[name];
  if (chosen !== undefined) return chosen;
  let hash = 2166136261;
  for (const char of name.toLowerCase()) hash = Math.imul(hash ^ char.charCodeAt(0), 16777619) >>> 0;
  return HUES[hash % HUES.length] ?? 172;
}
