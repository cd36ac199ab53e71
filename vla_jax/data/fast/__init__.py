"""FAST: chunks of actions as few tokens (Pertsch et al. 2025, arXiv:2501.09747). `codec` is the tokenizer."""
