/**
 * What the person teaches and what became of it: ratings and corrections, the refresh from request to outcome, versions,
 * what is learned from, and the person's data. Works on the `App`'s state and socket; the conversation is not its business.
 */

import { messageOf, type Api, type ImportResult } from "./api";
import type { App } from "./app";
import { newId } from "./dom";
import { versionName } from "./format";
import type { ClientEvent, Me, Rating, ServerEvent } from "./protocol";
import { ended, type RefreshStage, type ReplyItem, type State } from "./state";

/** What was said of a reply and is shown already, and how to take it back should the service refuse it. */
interface Given {
  event: ClientEvent;
  item: ReplyItem;
  takeBack: () => void;
}

export class Learning {
  private readonly feedback = new Map<string, Given>();
  private forgetting = false;

  constructor(private readonly app: App) {}

  private get api(): Api {
    return this.app.api;
  }

  private get state(): State {
    return this.app.state;
  }

  // ------------------------------------------------------------------ teaching

  rate(item: ReplyItem, rating: Rating): void {
    if (!item.id) return;
    const before = item.rating;
    const given = before === rating ? null : rating;
    item.rating = given;
    this.sendFeedback({ rating: given }, item, () => {
      if (item.rating === given) item.rating = before; // else another one was given since
    });
  }

  correct(item: ReplyItem, text: string): void {
    if (!item.id) return;
    const { original, text: said, author, rating } = item;
    Object.assign(item, { original: original ?? said, text, author: "person", rating: null });
    this.sendFeedback({ correction: text }, item, () => {
      if (item.text === text) Object.assign(item, { original, text: said, author, rating });
    });
  }

  /** An error names the feedback it refuses; true if it was one of ours. */
  refused(eventId: string): boolean {
    const given = this.feedback.get(eventId);
    if (!given) return false;
    this.feedback.delete(eventId);
    given.takeBack();
    this.app.touch(given.item);
    return true;
  }

  /** Whether something that was said of a reply, and is shown, is not saved yet. */
  get waits(): boolean {
    return this.feedback.size > 0;
  }

  /** Someone else is here now. */
  reset(): void {
    this.feedback.clear();
  }

  private sendFeedback(
    what: { rating?: Rating | null; correction?: string },
    item: ReplyItem,
    takeBack: () => void,
  ): void {
    if (!item.id) return;
    const id = newId("fb_");
    const event: ClientEvent = { type: "feedback.create", event_id: id, item_id: item.id, ...what };
    this.feedback.set(id, { event, item, takeBack });
    if (this.state.link === "live") this.app.transmit(event);
    this.app.touch(item);
  }

  /** The connection is back: what it had not confirmed, or what was said meanwhile, is said on the new one. */
  sendAgain(): void {
    for (const { event } of this.feedback.values()) this.app.transmit(event);
  }

  /** `feedback.created`: a correction is a turn of its own from here on. */
  saved(event: ServerEvent): void {
    const item = this.feedback.get(event.event_id ?? "")?.item;
    this.feedback.delete(event.event_id ?? "");
    if (item && event.correction_id) {
      item.id = event.correction_id;
      this.app.toast("Saved. The next refresh learns from it.");
    }
    this.app.done();
  }

  // ------------------------------------------------------------------ the adapter

  async refresh(): Promise<void> {
    const { state } = this;
    if (state.refresh && !ended(state.refresh.stage)) return;
    this.stage("queued", {});
    try {
      const { job_id: job } = await this.api.refresh();
      if (job && this.state.refresh) this.state.refresh.job = job;
    } catch (error) {
      this.stage("failed", { reason: messageOf(error) });
    }
  }

  /** One `adapter.…` event. */
  hear(event: ServerEvent): void {
    switch (event.type) {
      case "adapter.refresh.queued":
        return this.stage("queued", { job: event.job_id ?? null });
      case "adapter.refresh.progress":
        return this.stage(event.state === "gating" ? "gating" : "training", { progress: event.progress ?? 0 });
      case "adapter.refresh.completed": {
        const from = event.from ?? this.state.me?.adapter.version ?? 0;
        const to = event.to ?? from;
        const published = event.published ?? to !== from;
        const trial = event.trial ?? false;
        this.stage("completed", { from, to, published, trial, reason: event.reason ?? "", numbers: event.numbers ?? {} });
        if (trial) this.app.announce(`Version ${to} is on trial.`);
        else this.app.announce(published ? `Your adapter is now version ${to}.` : "No measurable change yet.");
        break;
      }
      case "adapter.refresh.failed":
        return this.stage("failed", {
          code: event.code ?? "",
          reason: event.message ?? event.error?.message ?? "The service gave no reason.",
        });
      case "adapter.updated":
        if (this.state.me && event.to !== undefined) {
          this.state.me.adapter = { ...this.state.me.adapter, version: event.to, updated_at: new Date().toISOString() };
          this.app.signals.raise("me");
        }
        break;
      case "adapter.trial":
        if (event.state === "rolled back") {
          this.app.toast(`${versionName(event.version)} was taken back: its replies were rated lower than before.`);
        }
        break;
      case "adapter.forgotten":
        // Asked for on this page it is told there; else another page or a command did it.
        if (this.forgetting) return;
        this.leaveNothing();
        this.app.toast("Everything the service knew about you is gone.");
        void this.app.enter(this.state.user);
        return;
    }
    this.app.soon();
  }

  /** A refresh that began before the page was opened, or ended while the connection was away. */
  join(told: Me["refresh"]): void {
    const { refresh } = this.state;
    const stage = told?.state;
    const job = told?.job_id ?? null;
    if (stage === "queued" || stage === "training" || stage === "gating") {
      this.stage(stage, { job, ...(told?.progress === undefined ? {} : { progress: told.progress }) });
    } else if ((stage === "completed" || stage === "failed") && refresh && !ended(refresh.stage) && refresh.job === job) {
      this.hear({ ...told, type: `adapter.refresh.${stage}` });
    }
  }

  private stage(stage: RefreshStage, change: Partial<NonNullable<State["refresh"]>>): void {
    const before = this.state.refresh;
    const fresh = !before || ended(before.stage);
    this.state.refresh = {
      job: fresh ? null : before.job,
      progress: fresh ? 0 : before.progress,
      startedAt: fresh ? Date.now() : before.startedAt,
      from: this.state.me?.adapter.version ?? null,
      to: null,
      published: false,
      trial: false,
      code: "",
      reason: "",
      numbers: {},
      ...change,
      stage,
    };
    this.app.signals.raise("refresh");
  }

  async load(): Promise<void> {
    const api = this.api;
    const [versions, learned] = await Promise.allSettled([api.versions(), api.learned()]);
    if (api !== this.api) return;
    const problem = [versions, learned].find((result) => result.status === "rejected");
    this.state.panelProblem = problem && this.state.link !== "refused" ? messageOf(problem.reason) : "";
    if (versions.status === "fulfilled") {
      this.state.versions = versions.value.versions.sort((a, b) => b.version - a.version);
      this.state.trial = versions.value.trial;
    }
    if (learned.status === "fulfilled") {
      this.state.learned = learned.value;
      const may = new Set(learned.value.map((turn) => turn.id));
      for (const turn of Object.values(this.state.versionTurns).flat()) turn.learned = may.has(turn.id);
    }
    this.app.signals.raise("panel");
  }

  /** What one version learned from. */
  async loadTurns(version: number): Promise<void> {
    await this.attempt(async () => {
      const api = this.api;
      const turns = await api.versionTurns(version);
      if (api !== this.api) return;
      this.state.versionTurns[version] = turns;
      this.app.signals.raise("panel");
    });
  }

  async rollback(version: number): Promise<void> {
    await this.attempt(async () => {
      await this.api.rollback(version);
      if (this.state.me) this.state.me.adapter = { ...this.state.me.adapter, version };
      this.app.signals.raise("me", "panel");
      this.app.toast(version ? `${versionName(version)} answers from now on.` : "The bare base answers from now on.");
    });
  }

  async unlearn(turnId: string): Promise<void> {
    await this.attempt(async () => {
      await this.api.unlearn(turnId);
      this.state.learned = this.state.learned?.filter((turn) => turn.id !== turnId) ?? null;
      for (const turn of Object.values(this.state.versionTurns).flat()) if (turn.id === turnId) turn.learned = false;
      this.app.signals.raise("panel");
      this.app.done();
    });
  }

  // ------------------------------------------------------------------ the person's data

  async import(file: File): Promise<ImportResult | null> {
    let result: ImportResult | null = null;
    await this.attempt(async () => {
      result = await this.api.import(file);
      this.app.done();
      await Promise.all([this.app.loadMe(), this.app.loadConversations(), this.load()]);
    });
    return result;
  }

  async export(): Promise<void> {
    await this.attempt(async () => {
      const url = URL.createObjectURL(await this.api.export());
      const link = document.createElement("a");
      link.href = url;
      link.download = `attune-${this.state.user}.jsonl`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
  }

  async forget(): Promise<void> {
    this.forgetting = true;
    await this.attempt(async () => {
      await this.api.forget();
      this.leaveNothing();
      await this.app.enter(this.state.user);
      this.app.toast("Your history and every version of your adapter are gone.");
    });
    this.forgetting = false;
  }

  /** Nothing that the person wrote stays in this browser, nor is a reply to it asked for again. */
  private leaveNothing(): void {
    const user = this.state.user;
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith(`attune.draft.${user}.`) || key === `attune.score.${user}`) localStorage.removeItem(key);
    }
    sessionStorage.removeItem(`attune.running.${user}`);
    history.replaceState(null, "", location.pathname);
  }

  private async attempt(act: () => Promise<void>): Promise<void> {
    try {
      await act();
    } catch (error) {
      this.app.toast(messageOf(error), "bad");
    }
  }
}
