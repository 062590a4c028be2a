# examples/running_mean.py: a baseline, the mean reward of earlier rollouts
from remax_lightning.baselines import Baseline


class RunningMean(Baseline):
    def __init__(self, decay: float = 0.9):
        self.decay, self.mean = decay, 0.0

    def values(self, inputs):  # one number per sampled response, [S]
        return inputs.reward.new_full(inputs.reward.shape, self.mean)

    def observe(self, inputs):  # called after `values`, so no value depends on its own response
        self.mean = self.decay * self.mean + (1 - self.decay) * float(inputs.reward.mean())
