"""Proof search as a workload: a search, a model of its proofs, logs of real ones."""
