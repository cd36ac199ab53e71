"""Small pure modules: norms, rotary positions, attention, feed-forward. No configuration, no input or output."""
