/** What the page knows. Plain data; `App` changes it, the views read it. */

import { newId } from "./dom";
import type { ConversationSummary, Me, Rating, Sample, Trial, Turn, Version, Which } from "./protocol";
import type { Reply } from "./reply";
import type { LinkState } from "./wire";

export interface PersonItem {
  kind: "person";
  key: string;
  id: string | null;
  text: string;
  at: string;
}

export interface ReplyItem {
  kind: "reply";
  key: string;
  id: string | null;
  text: string;
  at: string;
  author: "person" | "model";
  rating: Rating | null;
  version: number | null;
  which: Which;
  /** What the person wrote before it. */
  prompt: string;
  /** What the model had said, when the person put it right. */
  original: string | null;
  /** The live reply; null for one read from the history. */
  reply: Reply | null;
}

export type Side = "base" | "me";

export interface CompareItem {
  kind: "compare";
  key: string;
  prompt: string;
  seed: number;
  replies: Record<Side, Reply>;
  /** The order on the page, and whether names are hidden until the person has chosen. */
  order: [Side, Side];
  blind: boolean;
  vote: Side | "same" | null;
}

export type Item = PersonItem | ReplyItem | CompareItem;

export interface Thread {
  id: string;
  items: Item[];
  state: "new" | "loading" | "ready" | "failed";
  problem: string;
}

export type RefreshStage = "queued" | "training" | "gating" | "completed" | "failed";

export interface Refresh {
  stage: RefreshStage;
  job: string | null;
  /** 0 to 1 within the training stage. */
  progress: number;
  startedAt: number;
  from: number | null;
  to: number | null;
  published: boolean;
  trial: boolean;
  /** Why it failed, for the page: `not_enough_turns` is no fault. */
  code: string;
  reason: string;
  numbers: Record<string, unknown>;
}

export function ended(stage: RefreshStage): boolean {
  return stage === "completed" || stage === "failed";
}

export interface Toast {
  key: string;
  tone: "plain" | "bad";
  text: string;
}

export interface State {
  user: string;
  samples: Sample[];
  me: Me | null;
  link: LinkState;
  linkDetail: string;
  historySaved: boolean;
  conversations: ConversationSummary[];
  conversationsProblem: string;
  search: string;
  thread: Thread;
  refresh: Refresh | null;
  versions: Version[] | null;
  trial: Trial | null;
  learned: Turn[] | null;
  /** What versions learned from, by their number, as far as it was asked for. */
  versionTurns: Record<number, Turn[]>;
  panelProblem: string;
  panelOpen: boolean;
  drawerOpen: boolean;
  comparing: boolean;
  blind: boolean;
  score: Record<Side | "same", number>;
  toasts: Toast[];
}

/** Who one is before saying so. */
export const GUEST = "guest";

export function emptyThread(): Thread {
  return { id: newId("conv_"), items: [], state: "new", problem: "" };
}

export function samplePerson(state: State): Sample | undefined {
  return state.samples.find((sample) => sample.name === state.user);
}

/** Turns of the history as items: a correction takes the place of the reply it corrects, another reply of ours to the
 * same words takes the place of the one before. */
export function itemsOf(turns: Turn[]): Item[] {
  const items: Item[] = [];
  const replies = new Map<string, ReplyItem>();
  let prompt = "";
  for (const turn of turns) {
    const corrected = turn.corrects ? replies.get(turn.corrects) : undefined;
    if (corrected) {
      corrected.original = corrected.original ?? corrected.text;
      corrected.text = turn.text;
      corrected.author = "person";
      corrected.rating = null;
    } else if (turn.role === "user") {
      prompt = turn.text;
      items.push({ kind: "person", key: turn.id, id: turn.id, text: turn.text, at: turn.at });
    } else {
      const item: ReplyItem = {
        kind: "reply",
        key: turn.id,
        id: turn.id,
        text: turn.text,
        at: turn.at,
        author: turn.author,
        rating: turn.rating,
        version: turn.version,
        which: "me",
        prompt,
        original: null,
        reply: null,
      };
      replies.set(turn.id, item);
      const before = items.at(-1);
      if (turn.version !== null && before?.kind === "reply" && before.version !== null) items.pop();
      items.push(item);
    }
  }
  return items;
}

/** The history's items anew, and in their places those that are here already, with all that is known of them; what is
 * on the page alone, as a comparison is, stays behind what it stood behind. */
export function joined(shown: Item[], turns: Turn[]): Item[] {
  const corrections = new Map(turns.flatMap((turn) => (turn.corrects ? [[turn.id, turn.corrects]] : [])));
  const saved = new Set(turns.map((turn) => turn.id));
  const here = new Map<string, Item>();
  const alone = new Map<string, Item[]>();
  let last = "";
  for (const item of shown) {
    if (item.kind !== "compare" && item.id !== null && saved.has(item.id)) here.set((last = corrections.get(item.id) ?? item.id), item);
    else alone.set(last, [...(alone.get(last) ?? []), item]);
  }
  const behind = (id: string): Item[] => {
    const items = alone.get(id) ?? [];
    alone.delete(id);
    return items;
  };
  const first = behind("");
  const items = itemsOf(turns).flatMap((item) => {
    const id = item.kind === "compare" ? "" : (item.id ?? "");
    const known = here.get(id);
    if (item.kind === "reply" && known?.kind === "reply") {
      Object.assign(known, { text: item.text, author: item.author, rating: item.rating, original: item.original });
    }
    return [known ?? item, ...behind(id)];
  });
  const rest = [...alone.values()].flat();
  return here.size ? [...first, ...items, ...rest] : [...items, ...first];
}
