"""Robots as data: what they send, which units they use, and how that becomes what a model knows."""
