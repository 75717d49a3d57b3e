"""DeepSeek-V3: its router simulated, and where attention on its KV should be computed."""
