"""10,000 systems with planted answers, most of them on the edge between empty and nonempty: all decided, all right.

Each answer's evidence is checked by :func:`degenerate.referee`, which shares nothing with adcert.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from degenerate import Case, case, referee
from systems import fourier_motzkin, integers

from adcert.feasibility import Proof, decide

TINY = 5e-324
SEED = 8  # Park, Chun, Lee: Theorem 8


def campaign(count: int, seed: int) -> Counter[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    seen: Counter[tuple[str, str]] = Counter()
    spent: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(count):
        problem = case(rng)
        start = time.perf_counter()
        decision = decide(problem.a, problem.minus, problem.radius, seconds=60)
        stage = problem.kind, f"{'nonempty' if problem.nonempty else 'empty'}: {decision.reason}"
        spent[stage].append(time.perf_counter() - start)
        assert decision.nonempty is problem.nonempty, f"system {number} of seed {seed} ({problem.kind}): {decision}"
        referee(problem, decision.direction, decision.proof)
        seen[stage] += 1
    for (kind, reason), times in sorted(spent.items()):
        mean, worst = 1e3 * sum(times) / len(times), 1e3 * max(times)
        print(f"{kind:26s} {reason:28s} {len(times):5d} systems, {mean:8.2f} ms mean, {worst:8.1f} ms worst")
    print(f"{count} systems, all decided, all right; {sum(map(sum, spent.values())):.1f} s in decide")
    return seen


def test_pinned_systems() -> None:
    seen = campaign(500, SEED)
    assert len({kind for kind, _ in seen}) == 15
    assert {"highs", "minimum norm", "opposite rows", "dependent rows", "column"} <= {
        reason.split(": ")[1] for _, reason in seen
    }


@pytest.mark.fuzz
def test_ten_thousand_systems() -> None:
    campaign(10_000, SEED)


def test_answers_of_the_planters_are_right() -> None:
    """Against Fourier-Motzkin, where there is no radius and the system is small."""
    rng = np.random.default_rng(SEED)
    checked: Counter[bool] = Counter()
    while checked.total() < 150:
        problem = case(rng)
        if problem.radius is None and problem.minus is None and problem.a.shape[1] <= 3 and problem.a.shape[0] <= 10:
            assert fourier_motzkin(integers(problem.a)) is problem.nonempty, problem
            checked[problem.nonempty] += 1
    assert min(checked.values()) > 20


def test_referee_rejects() -> None:
    # The true rows are (1, 1 + 2^-60) and (-1, -1): 0 < -(p + q) < 2^-60 q.
    problem = Case("", np.array([[1.0, 1.0], [-1.0, -1.0]]), np.array([[0.0, -(2.0**-60)], [0.0, 0.0]]), None, True)
    referee(problem, (-(2**61) - 1, 2**61), None)
    for direction in ((0, 1), (-1, 1), (1, -1), (0, 0), (-(2**60) - 1, 2**60), (1.0, -1.0), (1,)):
        with pytest.raises(AssertionError):
            referee(problem, direction, None)
    opposite = Case("", np.array([[1.0, 2.0], [-2.0, -4.0]]), None, None, False)
    referee(opposite, None, Proof((0, 1), (2, 1)))
    for proof in (Proof((0, 1), (1, 1)), Proof((0, 1), (-2, -1)), Proof((), ()), Proof((0, 0), (1, 1))):
        with pytest.raises(AssertionError):
            referee(opposite, None, proof)
    with pytest.raises(AssertionError):
        referee(Case("", opposite.a, None, np.full((2, 2), TINY), False), None, Proof((0, 1), (2, 1)))
