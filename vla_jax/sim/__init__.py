"""Environments, scripted demonstrations and closed-loop evaluation."""
