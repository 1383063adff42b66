/**
 * The socket: opens with a single-use ticket, comes back by itself with growing pauses, and says what it is doing.
 *
 *     connecting ──session.created──► live ──close──► resuming ──(pause, new ticket)──► live
 *          └── refused: the service said that trying again will not help
 *
 * What was asked before the socket was up is kept and sent in order. The owner is told `onLive` after each (re)connection
 * and then asks for the replies that were running; the wire itself knows nothing about replies.
 */

import type { ClientEvent, ServerEvent } from "./protocol";

export type LinkState = "connecting" | "live" | "resuming" | "refused" | "closed";

/** Closes after which the same attempt would fail again (RFC 6455 and the service's own 44xx). */
const FINAL_CLOSES = new Set([1002, 1003, 1007, 4400, 4403, 4409]);
const FIRST_PAUSE_MS = 400;
const LONGEST_PAUSE_MS = 8_000;
const PING_EVERY_MS = 15_000;
const SILENCE_LIMIT_MS = 35_000;

export interface WireOptions {
  /** A new ticket for each attempt. Rejecting means: try again later, unless it is a `Refused`. */
  ticket: () => Promise<string>;
  onEvent: (event: ServerEvent) => void;
  onState: (state: LinkState, detail: string) => void;
  onLive: () => void;
}

export class Refused extends Error {}

export class Wire {
  state: LinkState = "connecting";
  private socket: WebSocket | null = null;
  private attempts = 0;
  private retryTimer = 0;
  private pingTimer = 0;
  private heardAt = 0;
  private wasLive = false;
  private readonly waiting: ClientEvent[] = [];

  constructor(private readonly options: WireOptions) {
    addEventListener("online", this.hurry);
    document.addEventListener("visibilitychange", this.hurry);
    void this.open();
  }

  /** Send now, or when the socket is up again. A lone `typing` hint is not worth keeping. */
  send(event: ClientEvent): void {
    if (this.state === "live" && this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(event));
    else if (event.type !== "typing" && event.type !== "ping" && this.state !== "closed") this.waiting.push(event);
  }

  close(): void {
    this.become("closed", "");
    removeEventListener("online", this.hurry);
    document.removeEventListener("visibilitychange", this.hurry);
    clearTimeout(this.retryTimer);
    clearInterval(this.pingTimer);
    this.socket?.close(1000);
    this.socket = null;
  }

  /** A person who presses "try again", a network that is back, or a tab that is looked at again does not wait. */
  readonly hurry = (): void => {
    if (document.visibilityState === "hidden" || this.socket || this.state === "closed") return;
    clearTimeout(this.retryTimer);
    this.attempts = 0;
    void this.open();
  };

  private async open(): Promise<void> {
    if (this.socket || this.state === "closed") return;
    let ticket: string;
    try {
      ticket = await this.options.ticket();
    } catch (error) {
      // Another attempt may have succeeded while this one hung, as when the network changed in between.
      if (this.socket || this.closed()) return;
      if (error instanceof Refused) this.become("refused", error.message);
      else this.retry("the service does not answer");
      return;
    }
    if (this.socket || this.closed()) return;
    const address = new URL("/v1/responses", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(address, ["attune.v1.json", `ticket.${ticket}`]);
    this.socket = socket;
    socket.onmessage = (message) => this.receive(socket, message);
    socket.onclose = (event) => this.dropped(socket, event);
  }

  // The check sits in a method because `state` may have changed while we awaited.
  private closed(): boolean {
    return this.state === "closed";
  }

  private receive(socket: WebSocket, message: MessageEvent): void {
    if (socket !== this.socket || typeof message.data !== "string") return;
    this.heardAt = performance.now();
    let event: ServerEvent;
    try {
      event = JSON.parse(message.data) as ServerEvent;
    } catch {
      return;
    }
    if (event.type === "pong") return;
    this.options.onEvent(event);
    if (event.type === "session.created" && this.state !== "live") this.live();
  }

  private live(): void {
    this.attempts = 0;
    this.wasLive = true;
    this.become("live", "");
    this.pingTimer = window.setInterval(() => this.ping(), PING_EVERY_MS);
    const waiting = this.waiting.splice(0);
    this.options.onLive();
    for (const event of waiting) this.send(event);
  }

  private ping(): void {
    // A half-open connection never says that it is gone; silence does.
    if (performance.now() - this.heardAt > SILENCE_LIMIT_MS) this.socket?.close(4000, "silence");
    else this.send({ type: "ping", id: String(Math.round(performance.now())) });
  }

  private dropped(socket: WebSocket, event: CloseEvent): void {
    if (socket !== this.socket) return;
    this.socket = null;
    clearInterval(this.pingTimer);
    if (this.closed()) return;
    if (FINAL_CLOSES.has(event.code)) this.become("refused", event.reason || `the service closed with ${event.code}`);
    else this.retry(event.reason || "the connection was lost");
  }

  private retry(detail: string): void {
    this.become(this.wasLive ? "resuming" : "connecting", detail);
    const pause = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this.attempts);
    this.attempts += 1;
    clearTimeout(this.retryTimer);
    this.retryTimer = window.setTimeout(() => void this.open(), pause * (0.6 + 0.4 * Math.random()));
  }

  private become(state: LinkState, detail: string): void {
    this.state = state;
    this.options.onState(state, detail);
  }
}
