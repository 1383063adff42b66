/**
 * One reply as a state machine: events in, text and facts out. No socket, no clock of its own, no document.
 *
 *     waiting ──created/delta──► streaming ──completed──► done
 *                                   │  ├──incomplete──► incomplete | stopped (status cancelled)
 *                                   │  └──failed──────► failed
 *     waiting ──error──► failed
 *
 * An event at or below the last sequence number is a repeat (a resume overlaps) and changes nothing.
 */

import type { ResponseObject, ServerEvent, Which } from "./protocol";

export type ReplyStatus = "waiting" | "streaming" | "done" | "stopped" | "incomplete" | "failed";

export interface ReplyFacts {
  version: number | null;
  model: string | null;
  inputTokens: number | null;
  cachedTokens: number | null;
  outputTokens: number | null;
  /** Everything the service says about the reply, as it says it. */
  metadata: Record<string, string>;
}

export class Reply {
  responseId: string | null = null;
  itemId: string | null = null;
  text = "";
  status: ReplyStatus = "waiting";
  error: { code: string; message: string } | null = null;
  lastSequence = -1;
  stopAsked = false;
  historySaved = true;
  firstTokenAt: number | null = null;
  lastTokenAt: number | null = null;
  private deltas = 0;
  readonly facts: ReplyFacts = {
    version: null,
    model: null,
    inputTokens: null,
    cachedTokens: null,
    outputTokens: null,
    metadata: {},
  };

  constructor(
    readonly eventId: string,
    readonly which: Which,
    readonly startedAt: number,
  ) {}

  get running(): boolean {
    return this.status === "waiting" || this.status === "streaming";
  }

  /** Tokens per second after the first one, from the service's count when it gave one. */
  get speed(): number | null {
    const told = Number(this.facts.metadata["tokens_per_s"]);
    if (Number.isFinite(told) && told > 0) return told;
    if (this.firstTokenAt === null || this.lastTokenAt === null) return null;
    const spent = (this.lastTokenAt - this.firstTokenAt) / 1000;
    const tokens = (this.facts.outputTokens ?? this.deltas) - 1;
    return spent > 0.05 && tokens > 1 ? tokens / spent : null;
  }

  get firstTokenSeconds(): number | null {
    const told = Number(this.facts.metadata["first_token_s"]);
    if (this.facts.metadata["first_token_s"] !== undefined && Number.isFinite(told)) return told;
    return this.firstTokenAt === null ? null : (this.firstTokenAt - this.startedAt) / 1000;
  }

  /** Take one event that belongs to this reply. Returns whether anything changed. */
  apply(event: ServerEvent, now: number): boolean {
    if (event.type === "error") return this.fail(event.code ?? "error", event.message ?? "The reply failed.");
    if (event.sequence_number !== undefined) {
      if (event.sequence_number <= this.lastSequence) return false;
      this.lastSequence = event.sequence_number;
    }
    if (!this.running) return false;
    if (event.response) this.read(event.response);
    switch (event.type) {
      case "response.created":
      case "response.in_progress":
        return true;
      case "response.output_item.added":
        this.itemId = event.item?.id ?? this.itemId;
        return true;
      case "response.output_text.delta":
        this.itemId = event.item_id ?? this.itemId;
        this.status = "streaming";
        this.firstTokenAt ??= now;
        this.lastTokenAt = now;
        this.deltas += 1;
        this.text += event.delta ?? "";
        return true;
      case "response.output_text.done":
        if (typeof event.text === "string") this.text = event.text;
        return true;
      case "response.completed":
        this.status = "done";
        return true;
      case "response.incomplete":
        this.status = event.response?.status === "cancelled" ? "stopped" : "incomplete";
        return true;
      case "response.failed":
        return this.fail(event.response?.error?.code ?? "error", event.response?.error?.message ?? "The reply failed.");
      default:
        return false;
    }
  }

  fail(code: string, message: string): boolean {
    if (!this.running) return false;
    this.status = this.stopAsked ? "stopped" : "failed";
    this.error = { code, message };
    return true;
  }

  private read(response: ResponseObject): void {
    this.responseId = response.id;
    this.facts.model = response.model ?? this.facts.model;
    const metadata = response.metadata ?? {};
    for (const [key, value] of Object.entries(metadata)) {
      if (value !== null && value !== undefined) this.facts.metadata[key] = String(value);
    }
    const version = Number(this.facts.metadata["adapter_version"]);
    if (this.facts.metadata["adapter_version"] !== undefined && Number.isInteger(version)) this.facts.version = version;
    // A comparison is not meant to be saved; only a reply that was is a reason to worry.
    if (response.store !== false) this.historySaved = this.facts.metadata["history_saved"] !== "false";
    const usage = response.usage;
    if (usage) {
      this.facts.inputTokens = usage.input_tokens ?? null;
      this.facts.cachedTokens = usage.input_tokens_details?.cached_tokens ?? null;
      this.facts.outputTokens = usage.output_tokens ?? null;
    }
    const message = response.output?.find((item) => item.type === undefined || item.type === "message");
    if (message) {
      this.itemId = message.id ?? this.itemId;
      const full = message.content?.map((part) => part.text ?? "").join("");
      if (full && response.status !== "in_progress") this.text = full;
    }
  }
}
