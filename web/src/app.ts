/**
 * Everything the page can do, and the one place that changes its state. Views call the methods and listen to topics.
 * A reply belongs to its thread, not to what is on the screen: it goes on while another conversation is open.
 */

import { Api, ApiError, demoToken, messageOf, nameIn } from "./api";
import { hueOf } from "./format";
import { newId, remember, remembered } from "./dom";
import { Learning } from "./learning";
import type { ClientEvent, CreateEvent, ServerEvent, Which } from "./protocol";
import { Reply } from "./reply";
import { Signals } from "./signals";
import {
  emptyThread,
  GUEST,
  itemsOf,
  joined,
  type CompareItem,
  type Item,
  type PersonItem,
  type ReplyItem,
  type Side,
  type State,
  type Thread,
} from "./state";
import { Wire, type LinkState } from "./wire";

export type Topic = "user" | "link" | "conversations" | "thread" | "items" | "me" | "refresh" | "panel" | "layout" | "toasts";

/** A reply that has not ended, with all that is needed to ask for it again. */
interface Running {
  reply: Reply;
  create: CreateEvent;
  thread: Thread;
  item: ReplyItem | CompareItem;
  sent: boolean;
}

/** What a reload needs to find a running reply again. */
interface Kept {
  create: CreateEvent;
  responseId: string | null;
  prompt: string;
  startedAt: number;
}

const KEPT_FOR_MS = 10 * 60_000;
const GIVE_UP_STORING_CODES = new Set(["store_unavailable", "history_unavailable"]);

export class App {
  readonly signals = new Signals<Topic>();
  readonly learning = new Learning(this);
  /** Items whose content changed since the views last looked. */
  readonly touched = new Set<Item>();
  readonly state: State = {
    user: "",
    samples: [],
    me: null,
    link: "connecting",
    linkDetail: "",
    historySaved: true,
    conversations: [],
    conversationsProblem: "",
    search: "",
    thread: emptyThread(),
    refresh: null,
    versions: null,
    trial: null,
    learned: null,
    versionTurns: {},
    panelProblem: "",
    panelOpen: remembered("attune.panel", matchMedia("(min-width: 1180px)").matches) && innerWidth >= 1000,
    drawerOpen: false,
    comparing: false,
    blind: remembered("attune.blind", false),
    score: { base: 0, me: 0, same: 0 },
    toasts: [],
  };
  /** Said aloud to screen readers: whole sentences, when something is finished. */
  announce: (text: string) => void = () => undefined;

  api!: Api;
  private wire: Wire | null = null;
  private threads = new Map<string, Thread>();
  private running = new Map<string, Running>();
  private later = 0;
  /** Conversations in which something was said elsewhere that is not shown yet. */
  private readonly behind = new Set<Thread>();
  /** Those of which the history is on its way. */
  private readonly asked = new Set<Thread>();
  private readonly tabs = new BroadcastChannel("attune");

  constructor() {
    this.tabs.onmessage = ({ data }) => data === this.state.user && this.lookAgain();
    addEventListener("focus", () => this.lookAgain());
  }

  // ------------------------------------------------------------------ who

  /** Become this person: their token, socket, history and colour. Nothing of the person before stays in memory. */
  async enter(user: string, wanted: string | null = null): Promise<void> {
    this.wire?.close();
    this.wire = null;
    this.threads.clear();
    this.running.clear();
    this.behind.clear();
    this.asked.clear();
    this.learning.reset();
    this.touched.clear();
    // A token that was pasted is good for the person it names alone.
    if ((nameIn(pastedToken() ?? "") ?? user) !== user) remember("attune.token", null, () => sessionStorage);
    const api = new Api(user, (name) => this.authenticate(name));
    this.api = api;
    Object.assign(this.state, {
      user,
      me: null,
      link: "connecting",
      linkDetail: "",
      historySaved: true,
      conversations: [],
      conversationsProblem: "",
      search: "",
      thread: emptyThread(),
      refresh: null,
      versions: null,
      trial: null,
      learned: null,
      versionTurns: {},
      panelProblem: "",
      comparing: false,
      score: remembered(`attune.score.${user}`, { base: 0, me: 0, same: 0 }),
    });
    remember("attune.user", user);
    document.documentElement.style.setProperty("--hue", String(hueOf(user)));
    this.signals.raise("user", "link", "conversations", "thread", "me", "refresh", "panel", "layout");
    this.wire = new Wire({
      ticket: () => api.ticket(),
      onEvent: (event) => this.api === api && this.receive(event),
      onState: (state, detail) => this.api === api && this.linked(state, detail),
      onLive: () => this.api === api && this.backOnline(),
    });
    if (wanted) void this.open(wanted);
    await Promise.allSettled([this.loadMe(), this.loadConversations(), this.learning.load()]);
  }

  /** A demo session where the service gives them, else a token that was pasted into the page. */
  private async authenticate(user: string): Promise<string> {
    return pastedToken() ?? demoToken(user);
  }

  async loadMe(): Promise<void> {
    const api = this.api;
    try {
      const me = await api.me();
      if (api !== this.api) return;
      this.state.me = me;
      if (me.samples) this.state.samples = me.samples;
      this.learning.join(me.refresh ?? null);
      this.signals.raise("me", "user");
    } catch (error) {
      // While there is no connection the top of the page says so already.
      if (api === this.api && this.state.link === "live") this.toast(messageOf(error), "bad");
    }
  }

  // ------------------------------------------------------------------ conversations

  async loadConversations(): Promise<void> {
    const api = this.api;
    try {
      const conversations = await api.conversations();
      if (api !== this.api) return;
      this.state.conversations = conversations.sort((a, b) => Date.parse(b.last_at) - Date.parse(a.last_at));
      this.state.conversationsProblem = "";
    } catch (error) {
      if (api !== this.api) return;
      this.state.conversationsProblem = this.state.link === "refused" ? "" : messageOf(error);
    }
    this.signals.raise("conversations");
  }

  newChat(): void {
    this.show(emptyThread());
  }

  async open(id: string): Promise<void> {
    const known = this.threads.get(id);
    const thread = known ?? { id, items: [], state: "loading", problem: "" };
    this.threads.set(id, thread);
    this.show(thread);
    if (!known || known.state === "failed") await this.loadThread(thread);
    else await this.catchUp(thread);
  }

  /** The service tells a socket of its own replies alone: what another tab, device or command did is asked for. */
  private lookAgain(): void {
    if (this.wire?.state !== "live") return;
    void this.catchUp(this.state.thread);
    void Promise.all([this.loadMe(), this.loadConversations(), this.learning.load()]);
  }

  /** Something was said or done here: this person's other tabs look again, and so do we where we could not. */
  done(): void {
    this.tabs.postMessage(this.state.user);
    for (const thread of [...this.behind, ...this.asked]) void this.catchUp(thread);
    this.soon();
  }

  /** Show what was said elsewhere in a conversation that was read before. One question at a time: an answer is older
   * than what was said while it was on its way, which is asked for after it. */
  private async catchUp(thread: Thread): Promise<void> {
    if (thread.state !== "ready") return;
    this.behind.add(thread);
    if (this.asked.has(thread)) return;
    const { api } = this;
    const busy = (): boolean => this.isRunning(thread.id) || this.learning.waits;
    this.asked.add(thread);
    try {
      while (this.behind.has(thread) && !busy()) {
        this.behind.delete(thread);
        const { items } = thread;
        const shown = items.length;
        const turns = await api.conversation(thread.id);
        if (api !== this.api) return;
        if (busy() || thread.items !== items || items.length !== shown) this.behind.add(thread);
        if (this.behind.has(thread)) continue;
        thread.items = joined(items, turns);
        for (const item of thread.items) this.touched.add(item);
        this.signals.raise("thread", "items");
      }
    } catch {
      if (api === this.api) this.behind.add(thread); // what is shown stays
    } finally {
      this.asked.delete(thread);
    }
  }

  private show(thread: Thread): void {
    this.state.thread = thread;
    this.state.drawerOpen = false;
    const hash = thread.state === "new" ? "" : `#c=${encodeURIComponent(thread.id)}`;
    if (location.hash !== hash) history.pushState(null, "", hash || location.pathname);
    this.signals.raise("thread", "conversations", "layout");
  }

  async loadThread(thread: Thread): Promise<void> {
    const api = this.api;
    thread.state = "loading";
    thread.problem = "";
    this.signals.raise("thread");
    try {
      const turns = await api.conversation(thread.id);
      if (api !== this.api) return;
      thread.items = joined(thread.items, turns); // something may have been said before they came
      thread.state = "ready";
      this.pickUp(thread);
    } catch (error) {
      if (api !== this.api) return;
      if (error instanceof ApiError && error.status === 404) {
        // The first message of a new conversation may still be on its way when the page is reloaded.
        thread.state = "ready";
        this.pickUp(thread);
      } else {
        thread.state = "failed";
        thread.problem = messageOf(error);
      }
    }
    this.signals.raise("thread");
  }

  // ------------------------------------------------------------------ talking

  send(text: string): void {
    const { state } = this;
    const thread = state.thread;
    if (state.comparing) return this.compare(text);
    const at = new Date().toISOString();
    const person: PersonItem = { kind: "person", key: newId("p_"), id: null, text, at };
    thread.items.push(person);
    this.keepThread(thread);
    this.ask(thread, "me", text, text);
  }

  /** Another reply to what was said last; the service takes the newer one as the answer. */
  retry(item: ReplyItem): void {
    const thread = this.state.thread;
    const at = thread.items.indexOf(item);
    if (at < 0 || item.reply?.running) return;
    const unsaid = item.reply?.status === "failed" && item.id === null && item.reply.responseId === null;
    thread.items.splice(at, 1);
    // A message that never reached the service is said again; one that did is only asked about again.
    this.ask(thread, item.which, item.prompt, unsaid ? item.prompt : null);
  }

  private ask(thread: Thread, which: Which, prompt: string, input: string | null): void {
    const create = this.creation(thread, which, input, newSeed());
    const reply = new Reply(create.event_id, which, Date.now());
    const item: ReplyItem = {
      kind: "reply",
      key: create.event_id,
      id: null,
      text: "",
      at: new Date().toISOString(),
      author: "model",
      rating: null,
      version: null,
      which,
      prompt,
      original: null,
      reply,
    };
    thread.items.push(item);
    this.start({ reply, create, thread, item, sent: false });
    this.signals.raise("thread", "conversations");
  }

  /** The same prompt and seed to the bare base and to the person's own adapter; neither is saved nor learned from. */
  compare(prompt: string, seed = newSeed()): void {
    const thread = this.state.thread;
    const flip = this.state.blind && Math.random() < 0.5;
    const creates = {
      base: { ...this.creation(thread, "base", prompt, seed), store: false },
      me: { ...this.creation(thread, "me", prompt, seed), store: false },
    };
    const now = Date.now();
    const item: CompareItem = {
      kind: "compare",
      key: newId("cmp_"),
      prompt,
      seed,
      replies: { base: new Reply(creates.base.event_id, "base", now), me: new Reply(creates.me.event_id, "me", now) },
      order: flip ? ["me", "base"] : ["base", "me"],
      blind: this.state.blind,
      vote: null,
    };
    thread.items.push(item);
    this.threads.set(thread.id, thread);
    for (const side of ["base", "me"] as const) {
      this.start({ reply: item.replies[side], create: creates[side], thread, item, sent: false });
    }
    this.signals.raise("thread");
  }

  vote(item: CompareItem, choice: Side | "same"): void {
    if (item.vote !== null) return;
    item.vote = choice;
    this.state.score[choice] += 1;
    remember(`attune.score.${this.state.user}`, this.state.score);
    this.touch(item);
    this.signals.raise("me");
  }

  private creation(thread: Thread, which: Which, input: string | null, seed: number): CreateEvent {
    const id = newId("evt_");
    return { type: "response.create", event_id: id, stream_id: id, model: which, input, conversation: thread.id, seed };
  }

  private start(running: Running): void {
    this.running.set(running.create.event_id, running);
    this.request(running);
    this.keepRunning();
  }

  private request(running: Running): void {
    if (this.wire?.state !== "live") return;
    running.sent = true;
    this.wire.send(running.create);
  }

  /** Send now, or when the connection is back. */
  transmit(event: ClientEvent): void {
    this.wire?.send(event);
  }

  get busy(): boolean {
    return [...this.running.values()].some((running) => running.thread === this.state.thread);
  }

  /** Whether a reply of this conversation is being written. */
  isRunning(conversation: string): boolean {
    return [...this.running.values()].some((running) => running.thread.id === conversation);
  }

  stop(): void {
    for (const running of this.running.values()) {
      if (running.thread !== this.state.thread || running.reply.stopAsked) continue;
      running.reply.stopAsked = true;
      if (running.reply.responseId) this.cancel(running.reply.responseId);
      else if (!running.sent) this.finish(running, () => running.reply.fail("stopped", "Stopped before it was sent."));
    }
  }

  private cancel(responseId: string): void {
    this.wire?.send({ type: "response.cancel", response_id: responseId, event_id: newId("evt_") });
  }

  typing(): void {
    this.wire?.send({ type: "typing" });
  }

  // ------------------------------------------------------------------ what the service says

  private receive(event: ServerEvent): void {
    if (event.type === "session.created") {
      if (event.adapter && this.state.me) this.state.me.adapter = event.adapter;
      this.signals.raise("me");
    } else if (event.type.startsWith("adapter.")) this.learning.hear(event);
    else if (event.type === "feedback.created") this.learning.saved(event);
    else if (event.type === "error") this.refused(event);
    else if (event.type.startsWith("response.")) this.replyEvent(event);
  }

  private replyEvent(event: ServerEvent): void {
    const running = this.find(event);
    if (!running) return;
    const { reply } = running;
    const unnamed = reply.responseId === null;
    this.finish(running, () => reply.apply(event, Date.now()));
    if (unnamed && reply.responseId !== null) {
      if (reply.stopAsked && reply.running) this.cancel(reply.responseId);
      this.keepRunning();
    }
  }

  private find(event: ServerEvent): Running | undefined {
    if (event.stream_id && this.running.has(event.stream_id)) return this.running.get(event.stream_id);
    const id = event.response_id ?? event.response?.id;
    return [...this.running.values()].find((running) => running.reply.responseId === id);
  }

  /** Apply a change to a reply and, if that ended it, settle everything that hangs on it. */
  private finish(running: Running, change: () => boolean): void {
    const { reply, item } = running;
    if (!change()) return;
    if (item.kind === "reply") {
      item.text = reply.text;
      item.id = reply.itemId;
      item.version = reply.facts.version;
      const said = running.thread.items[running.thread.items.indexOf(item) - 1];
      if (said?.kind === "person") said.id ??= reply.facts.metadata["user_turn_id"] ?? null;
    }
    this.touch(item);
    if (reply.running) return;
    this.running.delete(running.create.event_id);
    this.keepRunning();
    if (!reply.historySaved) this.saved(false);
    else if (reply.status === "done" && item.kind === "reply") this.saved(true);
    if (reply.status === "failed") this.announce(`The reply failed: ${reply.error?.message ?? ""}`);
    else if (item.kind === "reply") this.announce(`Attune says: ${reply.text}`);
    this.signals.raise("thread");
    this.done();
  }

  private refused(event: ServerEvent): void {
    const code = event.code ?? event.error?.code ?? "error";
    const message = event.message ?? event.error?.message ?? "The service could not do that.";
    if (GIVE_UP_STORING_CODES.has(code)) this.saved(false);
    const key = event.event_id ?? event.stream_id ?? "";
    const running = this.running.get(key.replace(/^resume_/, "")) ?? this.find(event);
    if (running && key.startsWith("resume_")) void this.recover(running, message);
    else if (running && (key === running.create.event_id || event.stream_id)) {
      this.finish(running, () => running.reply.fail(code, message));
    } else {
      this.learning.refused(key);
      this.toast(message, "bad");
    }
  }

  /** The events of a reply are gone; its text may have been saved. */
  private async recover(running: Running, message: string): Promise<void> {
    const { thread, reply } = running;
    if (running.item.kind === "reply") {
      try {
        const turns = await this.api.conversation(thread.id);
        const last = turns.at(-1);
        if (last?.role === "assistant" && (reply.itemId === null || last.id === reply.itemId)) {
          this.running.delete(running.create.event_id);
          this.keepRunning();
          thread.items = itemsOf(turns);
          this.signals.raise("thread");
          return;
        }
      } catch {
        // Told below as the failure of the reply itself.
      }
    }
    this.finish(running, () => reply.fail("resume_expired", message));
  }

  private linked(link: LinkState, detail: string): void {
    this.state.link = link;
    this.state.linkDetail = detail;
    if (link === "refused") {
      // Everything failed for this one reason, which is shown where it can be mended.
      Object.assign(this.state, { conversationsProblem: "", panelProblem: "", toasts: [] });
      this.signals.raise("conversations", "panel", "toasts");
    }
    if (link === "resuming") for (const running of this.running.values()) this.touch(running.item);
    this.signals.raise("link");
  }

  private backOnline(): void {
    for (const running of this.running.values()) {
      const { reply, create } = running;
      if (reply.responseId === null) this.request(running);
      else {
        this.wire?.send({
          type: "response.resume",
          response_id: reply.responseId,
          starting_after: reply.lastSequence,
          event_id: `resume_${create.event_id}`,
          stream_id: create.stream_id,
        });
        // What was sent before may have been lost with the connection.
        if (reply.stopAsked) this.cancel(reply.responseId);
      }
      this.touch(running.item);
    }
    this.learning.sendAgain();
    void this.catchUp(this.state.thread);
    void this.loadMe();
    void this.loadConversations();
  }

  hurry(): void {
    this.wire?.hurry();
  }

  private saved(saved: boolean): void {
    if (this.state.historySaved === saved) return;
    this.state.historySaved = saved;
    this.signals.raise("link");
  }

  // ------------------------------------------------------------------ reload

  private keepThread(thread: Thread): void {
    this.threads.set(thread.id, thread);
    if (thread.state !== "new") return;
    thread.state = "ready";
    history.replaceState(null, "", `#c=${encodeURIComponent(thread.id)}`);
    const first = thread.items.find((item) => item.kind === "person");
    const title = first?.kind === "person" ? first.text.slice(0, 80) : "New conversation";
    this.state.conversations.unshift({ id: thread.id, title, last_at: new Date().toISOString(), turns: 1 });
    this.signals.raise("conversations", "layout");
  }

  private keepRunning(): void {
    const kept = this.notTakenUp();
    for (const { create, reply, item } of this.running.values()) {
      if (item.kind === "reply") {
        kept.push({ create, responseId: reply.responseId, prompt: item.prompt, startedAt: reply.startedAt });
      }
    }
    remember(`attune.running.${this.state.user}`, kept.length ? kept : null, () => sessionStorage);
  }

  /** Replies from before a reload whose conversations have not been opened since. */
  private notTakenUp(): Kept[] {
    const kept = remembered<Kept[]>(`attune.running.${this.state.user}`, [], () => sessionStorage);
    return kept.filter(({ create, startedAt }) => {
      const open = this.threads.get(create.conversation)?.state === "ready";
      return !open && !this.running.has(create.event_id) && Date.now() - startedAt <= KEPT_FOR_MS;
    });
  }

  /** After a reload: replies of this thread that were being written go on from where they are. */
  private pickUp(thread: Thread): void {
    const kept = remembered<Kept[]>(`attune.running.${this.state.user}`, [], () => sessionStorage);
    for (const { create, responseId, prompt, startedAt } of kept) {
      if (create.conversation !== thread.id || this.running.has(create.event_id)) continue;
      if (Date.now() - startedAt > KEPT_FOR_MS) continue;
      const asked = thread.items.findLastIndex((item) => item.kind === "person" && item.text === prompt);
      if (asked >= 0 && thread.items.slice(asked).some((item) => item.kind === "reply") && create.input !== null) continue;
      if (asked < 0) {
        thread.items.push({ kind: "person", key: newId("p_"), id: null, text: prompt, at: new Date(startedAt).toISOString() });
      }
      const reply = new Reply(create.event_id, create.model, startedAt);
      reply.responseId = responseId;
      const item: ReplyItem = {
        kind: "reply",
        key: create.event_id,
        id: null,
        text: "",
        at: new Date(startedAt).toISOString(),
        author: "model",
        rating: null,
        version: null,
        which: create.model,
        prompt,
        original: null,
        reply,
      };
      thread.items.push(item);
      this.running.set(create.event_id, { reply, create, thread, item, sent: false });
      if (this.wire?.state === "live") this.backOnline();
    }
    this.keepRunning();
  }

  // ------------------------------------------------------------------ small things

  set(change: Partial<Pick<State, "panelOpen" | "drawerOpen" | "comparing" | "blind" | "search">>): void {
    Object.assign(this.state, change);
    if (change.panelOpen !== undefined) remember("attune.panel", change.panelOpen);
    if (change.blind !== undefined) remember("attune.blind", change.blind);
    this.signals.raise("layout");
    if (change.search !== undefined) this.signals.raise("conversations");
  }

  toast(text: string, tone: "plain" | "bad" = "plain"): void {
    const key = newId("t_");
    this.state.toasts.push({ key, tone, text });
    this.signals.raise("toasts");
    setTimeout(() => this.dropToast(key), tone === "bad" ? 9000 : 5000);
  }

  dropToast(key: string): void {
    this.state.toasts = this.state.toasts.filter((toast) => toast.key !== key);
    this.signals.raise("toasts");
  }

  touch(item: Item): void {
    this.touched.add(item);
    this.signals.raise("items");
  }

  /** Counts and lists change with nearly everything; ask for them once things have calmed down. */
  soon(): void {
    clearTimeout(this.later);
    this.later = window.setTimeout(() => void Promise.all([this.loadMe(), this.loadConversations(), this.learning.load()]), 350);
  }
}

function pastedToken(): string | null {
  return remembered<string | null>("attune.token", null, () => sessionStorage);
}

/** Whose page this is: a token pasted into this tab knows, else whoever it was last in this browser. */
export function lastHere(): string {
  return nameIn(pastedToken() ?? "") ?? remembered("attune.user", GUEST);
}

/** Seeds that survive JSON and every backend: 31 bits. */
function newSeed(): number {
  return (crypto.getRandomValues(new Uint32Array(1))[0] ?? 1) >>> 1;
}
