"""Machines: devices, models and systems from TOML, and what they cost."""
