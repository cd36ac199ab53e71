"""A policy behind a websocket: openpi's protocol, with batching across clients. See docs/serving.md."""
