"""Environments: Gymnasium, Stable-Baselines3."""
