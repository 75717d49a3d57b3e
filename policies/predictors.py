"""Predictors that learn device times from what a run measures: a random forest for the GPU, a linear model for PIM.

Both are judged as they go: every measurement is first predicted, then learned (prequential error), so all reported
errors are on iterations not learned from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor

from l3env.jit import kernel

FIRST_FIT_COUNT = 48
MOST_SAMPLES = 4096
REFIT_GROWTH = 1.5  # refit when this much more has been seen
TREES = 12


@kernel
def forest_sum(trees: Any, x: Any) -> float:
    """Sum over trees of the leaf that ``x`` falls into; ``trees`` as made by ``flatten``, leaves have feature -1."""
    roots, feature, threshold, left, right, value = trees
    total = 0.0
    for tree in range(roots.shape[0]):
        node = roots[tree]
        while feature[node] >= 0:
            node = left[node] if x[feature[node]] <= threshold[node] else right[node]
        total += value[node]
    return total


class Errors:
    """Relative errors of predictions made before their outcome was known."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, predicted: float, measured: float) -> None:
        if measured > 0:
            self.values.append(abs(predicted / measured - 1))

    def quantile(self, q: float) -> float:
        """NaN where nothing was predicted."""
        return float(np.quantile(self.values, q)) if self.values else float("nan")


class OnlineForest:
    """Random-forest regression of a positive time on a few numbers (scikit-learn), refitted as data arrives.

    Fitting is on the logarithm of the time. Evaluation walks the trees in compiled code: microseconds, where
    scikit-learn's takes milliseconds. The samples kept are the latest, and at most ``MOST_SAMPLES``.
    """

    def __init__(self, features_count: int) -> None:
        self._x = np.empty((MOST_SAMPLES, features_count))
        self._log_s = np.empty(MOST_SAMPLES)
        self._seen = 0
        self._next_fit = FIRST_FIT_COUNT
        self._arrays: tuple[Any, ...] | None = None
        self.errors = Errors()

    @property
    def ready(self) -> bool:
        return self._arrays is not None

    def predict_s(self, *x: float) -> float:
        """Predicted time; only when ``ready``."""
        assert self._arrays is not None
        return float(np.exp(forest_sum(self._arrays, np.array(x, dtype=float)) / TREES))

    def learn(self, measured_s: float, *x: float) -> None:
        """Adds a measurement (> 0), and refits when enough is new."""
        if measured_s <= 0:
            return
        if self.ready:
            self.errors.add(self.predict_s(*x), measured_s)
        place = self._seen % MOST_SAMPLES
        self._x[place], self._log_s[place] = x, np.log(measured_s)
        self._seen += 1
        if self._seen >= self._next_fit:
            self._fit()
            self._next_fit = int(self._seen * REFIT_GROWTH)

    def _fit(self) -> None:
        count = min(self._seen, MOST_SAMPLES)
        forest = RandomForestRegressor(TREES, random_state=0, n_jobs=1)
        forest.fit(self._x[:count], self._log_s[:count])
        self._arrays = flatten([estimator.tree_ for estimator in forest.estimators_])


def flatten(trees: list[Any]) -> tuple[NDArray[Any], ...]:
    """scikit-learn trees as (roots, feature, threshold, left, right, value) for ``forest_sum``."""
    starts = np.cumsum([0, *(tree.node_count for tree in trees)])
    feature = np.concatenate([np.where(tree.children_left < 0, -1, tree.feature) for tree in trees])
    left = np.concatenate([tree.children_left + start for tree, start in zip(trees, starts, strict=False)])
    right = np.concatenate([tree.children_right + start for tree, start in zip(trees, starts, strict=False)])
    threshold = np.concatenate([tree.threshold for tree in trees])
    value = np.concatenate([tree.value[:, 0, 0] for tree in trees])
    return starts[:-1].copy(), feature.astype(np.int64), threshold, left, right, value


class OnlineLinear:
    """Least squares on relative error, from running sums; features are given by the caller."""

    def __init__(self, features_count: int) -> None:
        self._gram = np.zeros((features_count, features_count))
        self._moment = np.zeros(features_count)
        self._seen = 0
        self._weights: NDArray[np.float64] | None = None
        self.errors = Errors()

    @property
    def ready(self) -> bool:
        return self._seen >= FIRST_FIT_COUNT

    def predict_s(self, *x: float) -> float:
        """Predicted time; only when ``ready``."""
        if self._weights is None:
            scale = np.sqrt(np.maximum(np.diag(self._gram), 1e-300))
            solved = np.linalg.lstsq(self._gram / np.outer(scale, scale), self._moment / scale, rcond=1e-10)[0]
            self._weights = solved / scale
        return float(np.dot(self._weights, x))

    def learn(self, measured_s: float, *x: float) -> None:
        """Adds a measurement (> 0), weighted by 1 / measured^2."""
        if measured_s <= 0:
            return
        if self.ready:
            self.errors.add(self.predict_s(*x), measured_s)
        row = np.array(x) / measured_s
        self._gram += np.outer(row, row)
        self._moment += row
        self._seen += 1
        if self._seen < 2 * FIRST_FIT_COUNT or self._seen % FIRST_FIT_COUNT == 0:
            self._weights = None
