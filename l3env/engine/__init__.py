"""The engine: requests and numbers to time."""
