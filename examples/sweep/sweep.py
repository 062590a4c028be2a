"""Searches learning rate and KL coefficient of a configuration with Optuna, and gives bad trials up early.

`remax demo` writes the start of the demo's policy; `python examples/sweep/sweep.py` then searches from there. With
`--config mine.yaml` it searches for a run of your own. Needs `pip install optuna`.
"""

import argparse
from pathlib import Path

import optuna
from lightning.pytorch import Callback

from remax_lightning.cli_run import RemaxCLI, run
from remax_lightning.shipped_configs import config_folder

DEMO = config_folder() / "demo.yaml"


def suggest(trial):
    """The values of a trial, by key: the place to add keys of your own."""
    return {
        "model.optimizer.init_args.lr": trial.suggest_float("lr", 1e-4, 2e-3, log=True),
        "model.kl_coef": trial.suggest_float("kl_coef", 1e-3, 0.1, log=True),
    }


class Report(Callback):
    """Reports `val/reward` of every validation, and stops a run that Optuna gives up."""

    def __init__(self, trial):
        self.trial, self.reward, self.pruned = trial, None, False

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.reward = metrics["val/reward"]
        self.trial.report(self.reward, trainer.global_step)
        self.trial.set_user_attr("kl", metrics.get("val/kl"))
        if trainer.global_step > 0 and self.trial.should_prune():
            self.pruned = trainer.should_stop = True


def train(trial, options):
    """Train with the values of a trial; return the reward of its last validation."""
    report = Report(trial)

    class TrialCLI(RemaxCLI):
        def instantiate_trainer(self, **arguments):
            trainer = super().instantiate_trainer(**arguments)
            trainer.callbacks.append(report)
            return trainer

    values = suggest(trial) | {
        "trainer.default_root_dir": str(options.folder),
        "trainer.logger.init_args.save_dir": str(options.folder),
        "trainer.logger.init_args.name": "trials",
        "trainer.logger.init_args.version": f"trial_{trial.number}",
        "export.folder": str(options.folder / "trials" / f"trial_{trial.number}" / "policy"),
    }
    arguments = [f"--{key}={value}" for key, value in values.items()]
    run(["fit", "--config", str(options.config), *arguments, *options.arguments], TrialCLI)
    if report.pruned:
        raise optuna.TrialPruned
    return report.reward


def main(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=DEMO, help="what is trained (default: the demo's configuration)")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep"), help="of the study and its runs")
    parser.add_argument("--warmup_steps", type=int, default=100, help="optimizer steps before a trial can be given up")
    options, options.arguments = parser.parse_known_args(args)  # the rest is for `remax fit`
    # ---- The study is a file: a second call goes on with it, several processes share it ----
    options.folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="remax",
        storage=f"sqlite:///{options.folder / 'study.db'}",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=options.warmup_steps),
    )
    study.optimize(lambda trial: train(trial, options), n_trials=options.trials)
    # ---- Table: a high reward may have been bought with a high KL ----
    print(f"\n{'trial':>5}  {'state':8}  {'lr':>8}  {'kl_coef':>8}  {'reward':>7}  {'KL':>7}")
    for trial in study.trials:
        reward, kl = trial.value, trial.user_attrs.get("kl")
        lr, kl_coef = trial.params.get("lr", float("nan")), trial.params.get("kl_coef", float("nan"))
        print(
            f"{trial.number:5}  {trial.state.name.lower():8}  {lr:8.2e}  {kl_coef:8.2e}"
            f"  {'-' if reward is None else f'{reward:.4f}':>7}  {'-' if kl is None else f'{kl:.4f}':>7}"
        )
    print(f"\nbest: trial {study.best_trial.number}, {study.best_params}")
    return study


if __name__ == "__main__":
    main()
