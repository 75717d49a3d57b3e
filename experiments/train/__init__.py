"""Training of schedulers with Stable-Baselines3: ``l3env train``. Needs the extra ``train``."""
