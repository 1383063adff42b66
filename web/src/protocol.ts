/** What travels between page and service. Fields the service may leave out are optional; unknown ones are ignored. */

export type Rating = "up" | "down";
export type Which = "base" | "me";

export interface Adapter {
  version: number;
  base?: string;
  updated_at?: string | null;
}

export interface Sample {
  name: string;
  title?: string;
  blurb?: string;
}

export interface Me {
  user: string;
  adapter: Adapter;
  learned_turns?: number;
  learned_since_refresh?: number;
  limits?: Record<string, unknown>;
  samples?: Sample[];
  /** The newest word on this person's refresh, as the events tell it. */
  refresh?: { job_id?: string; state?: string; progress?: number } | null;
}

export interface ConversationSummary {
  id: string;
  title: string;
  last_at: string;
  turns: number;
}

export interface Turn {
  id: string;
  conversation?: string;
  role: "user" | "assistant";
  text: string;
  at: string;
  author: "person" | "model";
  rating: Rating | null;
  version: number | null;
  corrects?: string | null;
  /** Whether the next refresh may learn from it. */
  learned?: boolean;
}

export interface Version {
  version: number;
  parent?: number | null;
  created_at?: string | null;
  accepted: boolean;
  reason?: string;
  numbers?: Record<string, unknown>;
  /** How many turns it was trained on, and how many it has seen that are not to be learned any more. */
  turns?: number;
  marked?: number;
  /** The population adapter that it began with, 0 for none. */
  population?: number;
  on_trial?: boolean;
  /** How its trial ended, if it had one. */
  trial?: { outcome: string; share: number; numbers: Record<string, number> } | null;
}

/** The version that answers a share of the replies until enough was said of them, and what was said so far. */
export interface Trial {
  version: number;
  share: number;
  needed: number;
  replies: number;
  up: number;
  down: number;
  before_up: number;
  before_down: number;
}

/** The part of a Responses object that the page reads. */
export interface ResponseObject {
  id: string;
  status?: string;
  model?: string;
  output?: { id?: string; type?: string; content?: { type?: string; text?: string }[] }[];
  usage?: { input_tokens?: number; output_tokens?: number; input_tokens_details?: { cached_tokens?: number } } | null;
  metadata?: Record<string, string> | null;
  store?: boolean;
  error?: { code?: string; message?: string } | null;
  incomplete_details?: { reason?: string } | null;
  [extra: string]: unknown;
}

export interface ServerEvent {
  type: string;
  event_id?: string | null;
  /** Echo of what the request gave: says which of several running replies an event belongs to. */
  stream_id?: string;
  sequence_number?: number;
  response_id?: string;
  item_id?: string;
  delta?: string;
  text?: string;
  item?: { id?: string };
  response?: ResponseObject;
  error?: { code?: string; message?: string };
  code?: string;
  message?: string;
  retryable?: boolean;
  user?: string;
  adapter?: Adapter;
  limits?: Record<string, unknown>;
  job_id?: string;
  state?: string;
  progress?: number;
  from?: number;
  to?: number;
  published?: boolean;
  trial?: boolean;
  version?: number;
  share?: number;
  rating?: Rating | null;
  correction_id?: string | null;
  reason?: string;
  numbers?: Record<string, unknown>;
  [extra: string]: unknown;
}

export interface CreateEvent {
  type: "response.create";
  /** The idempotency key: sent again after a lost connection, it attaches to the reply it began. */
  event_id: string;
  stream_id: string;
  model: Which;
  /** Null asks again for a reply to the conversation's last user turn. */
  input: string | null;
  conversation: string;
  seed?: number;
  temperature?: number;
  store?: boolean;
}

export type ClientEvent =
  | CreateEvent
  | { type: "response.cancel"; response_id: string; event_id: string }
  | { type: "response.resume"; response_id: string; starting_after: number; event_id: string; stream_id: string }
  | { type: "adapter.refresh.create"; event_id: string }
  | { type: "feedback.create"; event_id: string; item_id: string; rating?: Rating | null; correction?: string }
  | { type: "typing" }
  | { type: "ping"; id: string };
