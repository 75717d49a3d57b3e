"""``from l3env.sb3 import make_vec_env``: environments for Stable-Baselines3; see ``l3env.envs.sb3``."""

from l3env.envs.sb3 import ServingVecEnv, make_vec_env, setting_masks, settings_of

__all__ = ["ServingVecEnv", "make_vec_env", "setting_masks", "settings_of"]
