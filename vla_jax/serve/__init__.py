"""Trained policies, and the executors that run them on a robot."""
