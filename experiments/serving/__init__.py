"""l3env against serving engines on real GPUs."""
