"""Requests: traces as validated tables."""
