"""Scheduling policies, one file each. Declared as entry points, like a user's own."""
