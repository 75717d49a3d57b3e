"""Search: planners and tuners over cheap copies."""
