"""`auto`: the baseline of a run is the one that the run itself shows to be the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from torch import Tensor

from remax_lightning.baselines.base import Baseline, BaselineInputs, Measurement, can_value, checked_values
from remax_lightning.baselines.comparison import MIN_GROUPS, Comparison, Figure
from remax_lightning.baselines.kinds import KINDS, NoBaseline
from remax_lightning.errors import UserError, at_least, check_ranges

MIN_ROLLOUTS = 4
"""Rollouts with greedy responses that a window holds at least."""
FIRST_LOOKS, FIRST_CONFIDENCE, CONFIDENCE = (2, 4), 99, 95
"""Rollouts before the first looks, and percent of the intervals that these and later ones ask for."""
FIRST_WINDOWS = 4
"""Times `compare_every`: so many rollouts without greedy responses compare the baselines that need none."""


class Auto(Baseline):
    """Begins with the greedy response's reward and moves to the cheapest baseline, in variance times seconds of a step.

    Every candidate is valued on the responses of the run, beside the one in use. The second moment of the gradient
    takes the squared norms at the logits, which training shows anyway. After every `compare_every` rollouts the
    baseline in use changes if another needs less time for a gradient of the same precision and the 95 % interval, by a
    bootstrap over prompts and steps, is clear of 1; it goes back in the same way. Every look is a chance of a false
    change, so they are few. Two more, after 2 and 4 rollouts, ask for a 99 % interval: where the greedy reward tells
    little, each rollout with it costs.

    The gradient stays unbiased: which baseline values a rollout is decided by earlier rollouts alone, and no candidate
    reads the response that it is subtracted from. Given the past, a step is one with a fixed, unbiased baseline.

    The comparison has a price. One rollout of `compare_every` is the other way round: without greedy responses where
    the baseline in use needs them (its cheapest rival without them values that rollout), and with them where it does
    not. With 8 that is an eighth of what greedy responses cost. The first looks need no seconds, as a rollout without
    greedy responses takes no longer; unless they settle it, every second rollout after the first four and up to
    `compare_every` is without. Without a KL, responses without an advantage take a pass without gradients in the
    rollouts that are compared.

    Args:
        candidates: short names of baselines, for which `num_samples` has to be enough; null takes all unbiased ones
            that the run can have.
        window: rollouts that the comparison looks back; older ones were of another policy.
        compare_every: rollouts from one the other way round to the next, and from one look at the figures to the next.
        greedy_price: seconds that greedy responses add to a step, as a share of one without them. Null measures them;
            a number makes the choice, and so the run, independent of the clock.

    Raises:
        UserError: if an argument is out of its range, or a candidate is unknown, biased or reads gradients.
    """

    greedy = "sometimes"
    learns_from_training = True

    def __init__(
        self,
        candidates: list[str] | None = None,
        window: Annotated[int, at_least(1)] = 64,
        compare_every: Annotated[int, at_least(2, note="rollouts")] = 8,
        greedy_price: Annotated[float | None, at_least(0)] = None,
    ) -> None:
        key = "model.advantage.baseline"
        check_ranges(Auto.__init__, locals(), key)
        made = {name: KINDS[name]() for name in candidates or KINDS if name in KINDS}
        # One that reads gradients takes a pass in every step, which nothing here could tell the price of.
        unbiased = {name: kind for name, kind in made.items() if kind.is_unbiased and not kind.reads_gradients}
        if candidates is not None and len(unbiased) != len(candidates):
            wrong = next(name for name in candidates if name not in unbiased)
            able = {name: kind() for name, kind in KINDS.items()}
            known = ", ".join(name for name, kind in able.items() if kind.is_unbiased and not kind.reads_gradients)
            raise UserError(f"{key}.candidates must be of {known}, once each, got {wrong!r}")
        if len(unbiased) < 2:
            raise UserError(f"{key}.candidates must be at least two baselines, got {candidates}")
        if window < MIN_ROLLOUTS * compare_every:
            least = f"{MIN_ROLLOUTS} times compare_every"
            raise UserError(f"{key}.window must be at least {least}, {MIN_ROLLOUTS * compare_every}, got {window}")
        if candidates is not None:  # one that is named and could not be valued would never be compared
            self.min_samples = max(baseline.min_samples for baseline in unbiased.values())
        self.candidates, self.window, self.compare_every = candidates, window, compare_every
        self.greedy_price = greedy_price
        self._reads_greedy = any(baseline.greedy != "never" for baseline in unbiased.values())
        self.comparison = Comparison(unbiased, window, greedy_price if self._reads_greedy else 0.0)
        self.chosen = "greedy" if "greedy" in unbiased else next(iter(unbiased))
        """Name of the baseline in use."""
        self.figures: dict[str, Figure] = {}
        """What the last look has shown of each candidate, divided by the one in use."""
        self._substitute = "batch_mean"  # where a rollout has no greedy responses and the one in use needs them
        self._measures: Literal["always", "free", "never"] = "never"  # whether the last rollout is to be

    @property
    def greedy_share(self) -> float:
        """Share of the rollouts that need greedy responses, by the baseline in use."""
        share, other = self.comparison.candidates[self.chosen].greedy_share, 1 / self.compare_every
        return share * (1 - other) + (1 - share) * other

    # ---- A rollout ----

    def _is_other_way_round(self, needs: bool) -> bool:
        """Whether the next rollout has greedy responses if the baseline in use needs none, and none if it does."""
        number = self.comparison.number
        if number < self.compare_every:
            return needs and number >= FIRST_LOOKS[-1] and number % 2 == 1
        return number % self.compare_every == self.compare_every - 1

    def needs_greedy(self, prompts: Sequence[int] | None) -> bool:
        """Whether the baseline in use needs greedy responses, now and then turned round."""
        if not self._reads_greedy:
            return False
        used = self.comparison.candidates[self.chosen]
        if used.remembers_prompts and prompts is None:
            return True
        needs = used.needs_greedy(prompts)
        # With a price that is known, a rollout without greedy responses would show nothing.
        if needs and self.greedy_price is not None:
            return True
        return needs != self._is_other_way_round(needs)

    def values(self, inputs: BaselineInputs) -> Tensor:
        """Return `[S]` values of the baseline in use; without the greedy responses that it needs, of a substitute."""
        candidates = self.comparison.candidates
        for name in (self.chosen, self._substitute, *candidates):
            if name in candidates and can_value(candidates[name], inputs):
                return checked_values(candidates[name], inputs)
        return NoBaseline().values(inputs)

    def observe(self, inputs: BaselineInputs) -> None:
        """Value the rollout with every candidate, and let each learn from it."""
        number, every = self.comparison.number, self.compare_every
        # With greedy responses all candidates have a value; without them those that need none, the one in use or not.
        has_all = inputs.greedy_reward is not None or not self._reads_greedy
        if not has_all and self.comparison.candidates[self.chosen].greedy != "never":
            self._measures = "never"
        elif number < every or (has_all and number % every in (0, every - 1)):
            self._measures = "always"
        else:
            self._measures = "free" if has_all or number < FIRST_WINDOWS * every else "never"
        self.comparison.observe(inputs)

    # ---- After training on it ----

    def needs_norms(self, *, is_free: bool) -> bool:
        """Whether the rollout enters the comparison: those that tell of the one in use, if it is free or due."""
        return self._measures == "always" or (is_free and self._measures == "free")

    def observe_training(self, measurement: Measurement) -> str | None:
        """Compare the candidates now and then, and change the baseline in use if another is clearly cheaper."""
        self.comparison.measure(measurement)
        number = self.comparison.number
        is_first = number <= FIRST_LOOKS[-1]
        if number % self.compare_every and number not in FIRST_LOOKS:
            return None
        percent = FIRST_CONFIDENCE if is_first else CONFIDENCE
        figures = self.comparison.figures(self.chosen, percent / 100)
        if number % self.compare_every == 0:
            self.figures = self.comparison.figures(self.chosen) if is_first else figures
        costs = self._costs(figures)
        if not costs:
            return None
        order = sorted(costs, key=lambda name: costs[name][0])
        without = [name for name in order if self.comparison.candidates[name].greedy == "never"]
        self._substitute = next(iter(without), self._substitute)
        best = order[0]
        if best == self.chosen or not costs[best][2] < 1:
            return None
        before, self.chosen = self.chosen, best
        self.figures = self.comparison.figures(best)
        value, low, high = costs[best]
        # Where no seconds are known yet, greedy responses that are left out only save some.
        is_bound = figures[best].cost is None and self.comparison.candidates[before].greedy != "never"
        bound = "at most " if is_bound else ""
        return (
            f"model.advantage.baseline auto: from {before} to {best}, which needs {bound}{value:.2f} of the seconds for"
            f" a gradient of the same precision ({percent} %: {low:.2f} to {high:.2f}, after"
            f" {number} rollouts)"
        )

    def _costs(self, figures: dict[str, Figure]) -> dict[str, tuple[float, float, float]]:
        """Return the cost of each candidate that enough prompts tell of, as far as it is known."""
        costs = {}
        for name, figure in figures.items():
            # Before any seconds are known: a step without greedy responses takes no longer than any other.
            is_plain = self.comparison.candidates[name].greedy == "never"
            cost = figure.variance if figure.cost is None and is_plain else figure.cost
            if cost is not None and figure.num_groups >= MIN_GROUPS:
                costs[name] = cost
        return costs

    def metrics(self) -> dict[str, float]:
        """Return the place of the baseline in use among the names, 0 for greedy."""
        return {"baseline": float(list(KINDS).index(self.chosen))}

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Return the choice, and all that it is made of."""
        return {
            "chosen": self.chosen,
            "substitute": self._substitute,
            "measures": self._measures,
            "comparison": self.comparison.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the choice; where it is no candidate any more, the first one is taken."""
        self.comparison.load_state_dict(state["comparison"])
        if state["chosen"] in self.comparison.candidates:
            self.chosen = cast(str, state["chosen"])
        self._substitute, self._measures = cast(str, state["substitute"]), state["measures"]
