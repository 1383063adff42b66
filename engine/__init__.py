"""Token ids, pages and adapters: the engine knows no users, no text and no Redis."""
