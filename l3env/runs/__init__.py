"""Runs: drive, keep and compare."""
