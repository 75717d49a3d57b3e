"""GPU presets: measured, fitted, checked."""
