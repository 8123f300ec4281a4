"""The product's promise over every activation, pooling, selection and layer: none false, enough true.

Judged by enumeration of cells (``adcert.oracle``), by a sampled hull and by replay of every witness
(``wide_oracle.py``).
"""

from __future__ import annotations

import pytest
from wide_campaign import Outcome, plain_reason, recall, run, table
from wide_networks import KINDS, WideNetwork

import adcert

SAMPLE = range(2 * len(KINDS))
CAMPAIGN = range(3000)
OVERALL, EACH = 0.80, 0.60  # recall the campaign has to reach, of all networks and of each kind


def check(outcomes: list[Outcome]) -> None:
    print(table(outcomes))
    alarms = [f"network {o.seed}: {alarm}" for o in outcomes for alarm in o.alarms]
    assert not alarms, alarms


def test_pinned_sample() -> None:
    outcomes = [run(seed) for seed in SAMPLE]
    check(outcomes)
    assert recall(outcomes) >= 0.6
    assert recall(outcomes) > recall(outcomes, "strict")


@pytest.mark.fuzz
def test_three_thousand_networks() -> None:
    outcomes = [run(seed) for seed in CAMPAIGN]
    check(outcomes)
    assert sum(o.right is False for o in outcomes) > 0.05 * len(outcomes)
    assert recall(outcomes) >= OVERALL
    poor = {kind: recall(of) for kind in KINDS if recall(of := [o for o in outcomes if kind in o.labels]) < EACH}
    assert not poor, poor


def test_false_certificates_are_noticed() -> None:
    """Somebody who certifies everything is caught where autodiff is wrong."""

    def credulous(network: WideNetwork, strict: bool) -> adcert.Certificate:
        shapes = {name: tuple(p.shape) for name, p in network.model.named_parameters()}
        return adcert.Certificate(
            adcert.Verdict.CERTIFIED, claim="clarke", shapes=shapes, scales=dict.fromkeys(shapes, 1)
        )

    outcomes = [run(seed, credulous) for seed in (0, 33, 41, 77)]
    assert [any("FALSE" in alarm for alarm in o.alarms) for o in outcomes] == [False, True, True, True]


def test_table_counts_per_kind() -> None:
    def outcome(label: str, right: bool | None, default: str, strict: str) -> Outcome:
        verdicts = {"default": default, "strict": strict}
        return Outcome(
            0, frozenset({label}), right, "exact", True, verdicts, {"default": ("f at a.py:3",), "strict": ()}, ()
        )

    outcomes = [
        outcome("relu", True, "certified", "certified"),
        outcome("relu", True, "certified", "uncertified"),
        outcome("abs", True, "undecided", "undecided"),
        outcome("abs", None, "undecided", "undecided"),
        outcome("abs", False, "undecided", "undecided"),
    ]
    assert recall(outcomes) == pytest.approx(2 / 3)
    assert recall(outcomes, "strict") == pytest.approx(1 / 3)
    lines = {line.split()[0]: line.split()[1:] for line in table(outcomes).splitlines()}
    assert lines["relu"] == ["2", "2", "0", "2", "100.0%", "50.0%", "0"]
    assert lines["abs"] == ["3", "1", "1", "0", "0.0%", "0.0%", "3"]
    assert "1  f at ~" in table(outcomes)
    assert plain_reason("f (g at x.py:12) of 'a.b' in 3 rows") == "f (g at ~) of ~ in ~ rows"
