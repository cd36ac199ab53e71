"""Backbones, experts and the VLA that joins them: arrays in, arrays out."""
