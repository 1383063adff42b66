import { defineConfig } from "vite";

// The gateway serves this under a policy that allows nothing inline, so no asset may become a data: address.
export default defineConfig({
  base: "/",
  build: { target: "es2022", assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  server: { proxy: { "/attune": "http://127.0.0.1:8080", "/v1": { target: "http://127.0.0.1:8080", ws: true } } },
});
