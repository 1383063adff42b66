/** Who wants to know about what. A topic raised many times in one task is told once, at the end of the task. */

export class Signals<Topic extends string> {
  private readonly listeners = new Map<Topic, Set<() => void>>();
  private readonly pending = new Set<Topic>();

  on(topics: Topic | Topic[], listener: () => void): void {
    for (const topic of Array.isArray(topics) ? topics : [topics]) {
      const set = this.listeners.get(topic) ?? new Set();
      set.add(listener);
      this.listeners.set(topic, set);
    }
  }

  raise(...topics: Topic[]): void {
    if (this.pending.size === 0) queueMicrotask(() => this.flush());
    for (const topic of topics) this.pending.add(topic);
  }

  private flush(): void {
    const topics = [...this.pending];
    this.pending.clear();
    const due = new Set<() => void>();
    for (const topic of topics) for (const listener of this.listeners.get(topic) ?? []) due.add(listener);
    for (const listener of due) listener();
  }
}
