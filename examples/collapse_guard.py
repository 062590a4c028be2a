# examples/collapse_guard.py: stops a policy that writes the same to every prompt
from lightning.pytorch import Callback


class CollapseGuard(Callback):
    def __init__(self, least: float = 0.05):
        self.least = least

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        texts = outputs["rollout"].sampled.texts
        share = len(set(texts)) / len(texts)
        pl_module.log("train/distinct_responses", share, sync_dist=True, batch_size=len(texts))
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(share < self.least)
