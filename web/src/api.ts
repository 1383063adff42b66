/** The service's HTTP side. One person's bearer token; every failure is an `ApiError` whose message can be shown. */

import { Refused } from "./wire";
import type { ConversationSummary, Me, Trial, Turn, Version } from "./protocol";

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

export interface ImportResult {
  imported: number;
  known: number;
  errors: { line: number; message: string }[];
}

export class Api {
  private token: Promise<string> | null = null;

  constructor(
    readonly user: string,
    /** Gets a bearer token for this person; called again when the old one has expired. */
    private readonly authenticate: (user: string) => Promise<string>,
  ) {}

  me(): Promise<Me> {
    return this.json("GET", "/attune/me");
  }

  async conversations(): Promise<ConversationSummary[]> {
    return list(await this.json("GET", "/attune/conversations"), "conversations");
  }

  async conversation(id: string): Promise<Turn[]> {
    return list(await this.json("GET", `/attune/conversations/${encodeURIComponent(id)}`), "turns");
  }

  async versions(): Promise<{ versions: Version[]; trial: Trial | null }> {
    const body = await this.json<{ trial?: Trial | null }>("GET", "/attune/versions");
    return { versions: list(body, "versions"), trial: body.trial ?? null };
  }

  async versionTurns(version: number): Promise<Turn[]> {
    return list(await this.json("GET", `/attune/versions/${version}/turns`), "turns");
  }

  async rollback(version: number): Promise<void> {
    await this.json("POST", "/attune/rollback", { version });
  }

  async learned(): Promise<Turn[]> {
    return list(await this.json("GET", "/attune/turns/learned"), "turns");
  }

  async unlearn(turnId: string): Promise<void> {
    await this.json("DELETE", `/attune/turns/${encodeURIComponent(turnId)}/learning`);
  }

  async refresh(): Promise<{ job_id?: string; state?: string }> {
    return this.json("POST", "/attune/refresh");
  }

  async import(file: Blob): Promise<ImportResult> {
    const answer = await this.request("POST", "/attune/import", file, "application/x-ndjson");
    const body = (await answer.json()) as Record<string, unknown>;
    const errors = Array.isArray(body["errors"]) ? (body["errors"] as Record<string, unknown>[]) : [];
    return {
      imported: Number(body["imported"] ?? body["added"] ?? body["turns"] ?? 0),
      known: Number(body["known"] ?? 0),
      errors: errors.map((error) => ({
        line: Number(error["line"] ?? error["number"] ?? 0),
        message: String(error["message"] ?? "not understood"),
      })),
    };
  }

  async export(): Promise<Blob> {
    return (await this.request("GET", "/attune/export")).blob();
  }

  async forget(): Promise<Record<string, unknown>> {
    return this.json("DELETE", "/attune/me");
  }

  /** A single-use ticket for the socket. */
  async ticket(): Promise<string> {
    try {
      return (await this.json<{ ticket: string }>("POST", "/attune/tickets")).ticket;
    } catch (error) {
      // 404: the service gives no one a token by name, so a person has to bring one; 400: nobody can have that name.
      if (error instanceof ApiError && [400, 401, 403, 404].includes(error.status)) throw new Refused(error.message);
      throw error;
    }
  }

  private async json<T>(method: string, path: string, body?: unknown): Promise<T> {
    const payload = body === undefined ? undefined : JSON.stringify(body);
    const answer = await this.request(method, path, payload, payload === undefined ? undefined : "application/json");
    const text = await answer.text();
    return (text ? JSON.parse(text) : {}) as T;
  }

  private async request(method: string, path: string, body?: BodyInit, type?: string): Promise<Response> {
    let answer = await this.attempt(method, path, body, type);
    if (answer.status === 401) {
      this.token = null;
      answer = await this.attempt(method, path, body, type);
    }
    if (!answer.ok) throw await failure(answer);
    return answer;
  }

  /** One token for all requests; one that could not be had is asked for again by the next. */
  private credential(): Promise<string> {
    if (!this.token) {
      const asked = this.authenticate(this.user);
      this.token = asked;
      asked.catch(() => {
        if (this.token === asked) this.token = null;
      });
    }
    return this.token;
  }

  private async attempt(method: string, path: string, body?: BodyInit, type?: string): Promise<Response> {
    const headers: Record<string, string> = { Authorization: `Bearer ${await this.credential()}` };
    if (type) headers["Content-Type"] = type;
    return reach(path, { method, headers, ...(body === undefined ? {} : { body }) });
  }
}

/** A token for a sample person or a new name; only where the service runs with demo users. */
export async function demoToken(user: string): Promise<string> {
  const answer = await reach("/attune/demo/session", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ user }),
  });
  if (!answer.ok) throw await failure(answer);
  return ((await answer.json()) as { token: string }).token;
}

/** The name a token carries, for the page alone: the service trusts the signature, not us. */
export function nameIn(token: string): string | null {
  try {
    const part = token.split(".")[1] ?? "";
    const bytes = Uint8Array.from(atob(part.replace(/-/g, "+").replace(/_/g, "/")), (char) => char.charCodeAt(0));
    const claims = JSON.parse(new TextDecoder().decode(bytes)) as { sub?: unknown };
    return typeof claims.sub === "string" ? claims.sub : null;
  } catch {
    return null;
  }
}

async function reach(path: string, init: RequestInit): Promise<Response> {
  try {
    return await fetch(path, { ...init, cache: "no-store", credentials: "omit" });
  } catch {
    throw new ApiError(0, "unreachable", "The service does not answer.");
  }
}

async function failure(answer: Response): Promise<ApiError> {
  try {
    const body = (await answer.json()) as { error?: { code?: string; message?: string } };
    if (body.error?.message) return new ApiError(answer.status, body.error.code ?? "error", body.error.message);
  } catch {
    // Not JSON: the status alone has to do.
  }
  return new ApiError(answer.status, "error", `The service answered ${answer.status}.`);
}

function list<T>(body: unknown, key: string): T[] {
  if (Array.isArray(body)) return body as T[];
  for (const name of [key, "data"]) {
    const value = (body as Record<string, unknown>)[name];
    if (Array.isArray(value)) return value as T[];
  }
  return [];
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
