"""What learning gives over hand-made policies and tuned constants: evaluation, the learning grid, imitation."""
