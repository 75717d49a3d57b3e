"""Loaders of real serving traces, synthetic workloads and embedded profiles: one file a format."""
