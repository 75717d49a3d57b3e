"""One pure, cited equation per function. Layer 2: imports specs and units only."""
