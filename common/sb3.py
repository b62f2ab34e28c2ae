"""Our lanes as a Stable-Baselines3 VecEnv: one batched environment, no processes, no loop.

    from common.sb3 import LanesVecEnv
    envs = gymnasium.make_vec("cleanrl_crypto/Freeway-v0", num_envs=64)
    model = stable_baselines3.PPO("MlpPolicy", LanesVecEnv(envs)).learn(100_000)
"""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from common.lanes import Lanes, joint_space, split_joint


class LanesVecEnv(VecEnv):
    """joint: all parts of an action (the junctions of a network) as one number, for DQN.

    Where an episode ends, infos hold what SB3 expects: terminal_observation, TimeLimit.truncated,
    and as "episode" its statistics as the environment reports them ("r" is the reported return,
    which is not everywhere the sum of rewards: docs/other_libraries.md).
    """

    def __init__(self, lanes: Lanes, joint: bool = False):
        actions = lanes.single_action_space
        self.lanes = lanes
        self.nvec = None
        if joint:
            self.nvec, actions = joint_space(actions)
        self.render_mode = lanes.render_mode
        super().__init__(lanes.num_envs, lanes.single_observation_space, actions)

    def reset(self):
        obs, _ = self.lanes.reset(seed=self._seeds[0])
        self._reset_seeds()
        return obs

    def step_async(self, actions):
        if self.nvec is not None:
            actions = split_joint(actions, self.nvec)
        self.actions = actions

    def step_wait(self):
        obs, reward, terminated, truncated, info = self.lanes.step(self.actions)
        reward = reward.astype(np.float32)
        done = terminated | truncated
        infos = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            episode = info["final_info"]["episode"]
            # SB3 goes on from the last observation only where time ran out
            out_of_time = truncated[i] and not terminated[i]
            infos[i] = {
                "terminal_observation": info["final_obs"][i],
                "TimeLimit.truncated": bool(out_of_time),
                "episode": {k: float(x[i]) for k, x in episode.items()},
            }
        return obs, reward, done, infos

    def get_images(self):
        return list(self.lanes.render() or ())

    def close(self):
        self.lanes.close()

    # SB3 asks lane by lane, and gets the one environment's answer for each
    def get_attr(self, attr_name, indices=None):
        value = getattr(self.lanes, attr_name)
        asked = self._get_indices(indices)
        return [value for _ in asked]

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError("the lanes are one environment")

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise NotImplementedError("the lanes are one environment")

    def env_is_wrapped(self, wrapper_class, indices=None):
        asked = self._get_indices(indices)
        return [False for _ in asked]
