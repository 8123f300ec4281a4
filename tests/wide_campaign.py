"""Convert, certify and judge wide random networks; tabulate by kind. Not a test: ``test_wide_campaign.py`` is."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from wide_networks import KINDS, WideNetwork, wide_network
from wide_oracle import ROUNDS, sample, witness

import adcert
from adcert import oracle

MODES = ("default", "strict")
THIN = 1e-5  # margins below which a witness is not followed: its steps would be lost in float64
SLACK = 1e-6  # torch rounds: the slope of hardsigmoid is float32's 1/6 in float64, too


@dataclass(frozen=True)
class Outcome:
    """What happened to one network.

    ``right``: autodiff's gradient is Clarke (True), is not (False), unknown (None); ``judge``: who says so ("exact":
    the cells; "sampled"; "witness": of a certificate); ``verdicts``, ``reasons``: by mode; ``alarms``: what must not
    happen.
    """

    seed: int
    labels: frozenset[str]
    right: bool | None
    judge: str
    kinked: bool
    verdicts: dict[str, str]
    reasons: dict[str, tuple[str, ...]]
    alarms: tuple[str, ...]


def certificate_of(network: WideNetwork, strict: bool) -> adcert.Certificate:
    """One step on a converted copy; its gradients have to be autodiff's, bit for bit."""
    network = network.copy()
    adcert.convert(network.model)
    for parameter in network.model.parameters():
        parameter.grad = None
    if not network.several:
        return adcert.certify(network.closure, network.model, strict=strict)
    with adcert.Monitor(network.model, strict=strict, queue=0) as monitor:
        with monitor.step() as step:
            network.backward()
        return step.certificate()


def same_gradient(network: WideNetwork) -> bool:
    """Is the gradient of a converted model inside a step that of the plain one, bit for bit?"""
    converted = network.copy()
    adcert.convert(converted.model)
    plain = network.copy()
    plain.backward()
    with adcert.Monitor(converted.model, queue=0) as monitor, monitor.step():
        converted.backward()
    pairs = zip(converted.model.parameters(), plain.model.parameters(), strict=True)
    return all(a.grad is b.grad if a.grad is None or b.grad is None else torch.equal(a.grad, b.grad) for a, b in pairs)


def enumerated(network: WideNetwork, budget: int) -> bool | None:
    """What the enumeration of cells says of autodiff's gradient; None where it does not apply or is not conclusive."""
    network = network.copy()
    try:
        known = oracle.subdifferential(network.closure, network.model, budget=budget, samples=0)
    except oracle.OracleError:
        return None
    return known.contains(network.gradient(), SLACK)


def judged(network: WideNetwork) -> tuple[bool | None, str, bool]:
    """Is autodiff's gradient Clarke, who says so, and do decisions matter?"""
    exact = enumerated(network, 150)
    sampled = sample(network, rounds=ROUNDS if exact is None else ROUNDS[:1])
    if exact is not None:
        assert not (sampled.member and exact is False), (
            f"network {network.seed}: separated from every cell, but sampled"
        )
        return exact, "exact", sampled.kinked
    if sampled.member:
        return True, "sampled", sampled.kinked
    return enumerated(network, 1500), "exact", sampled.kinked


def reproduced(network: WideNetwork, certificate: adcert.Certificate) -> str:
    """Empty if gradients along the certificate's witness tend to autodiff's, in float64 or exactly."""
    found = witness(network, certificate.directions, certificate.scales)
    if found.tends:
        return ""
    copy = network.copy()
    try:
        exact = oracle.replays(copy.closure, copy.model, certificate.directions, certificate.scales)
    except oracle.OracleError:
        exact = None
    if exact is not None and exact.reproduces:
        return ""
    return "witness at " + ", ".join(f"{d:.1e}" for d in found.distances)


def margin(certificate: adcert.Certificate) -> float:
    """The least ``<a, p> / (|a| |p|)`` (largest entries) over the rows of a certificate."""
    least = 1.0
    for block in certificate.blocks:
        if block.direction is None or not len(block.rows):
            continue
        rows = block.rows.astype(float) - (0.0 if block.minus is None else block.minus)
        p = np.array([float(x) for x in block.direction])
        sizes = np.abs(rows).max(1) * np.abs(p).max()
        least = min(least, float((rows @ p / sizes).min()))
    return least


def run(seed: int, certify: Callable[[WideNetwork, bool], adcert.Certificate] = certificate_of) -> Outcome:
    """The network of a seed: certified in both modes, judged, every certificate replayed."""
    network = wide_network(seed)
    right, judge, kinked = judged(network)
    verdicts, reasons, alarms = {}, {}, []
    if not same_gradient(network):
        alarms.append("the gradient of the converted model differs")
    for mode in MODES:
        certificate = certify(network, mode == "strict")
        certificate.verify()
        verdicts[mode] = certificate.verdict.value
        reasons[mode] = tuple(certificate.reasons)
        if certificate.verdict is not adcert.Verdict.CERTIFIED:
            continue
        if right is False:
            alarms.append(f"{mode}: FALSE: certified, but separated from every cell")
        elif certificate.claim == "bouligand" or right is None:
            if right is not None and margin(certificate) < THIN:
                continue
            problem = reproduced(network, certificate)
            if not problem and right is None:
                right, judge = True, "witness"
            elif problem and right is None and not sample(network, seed=1, rounds=(24, 400, 1000)).member:
                alarms.append(f"{mode}: FALSE: certified, {problem}")
            elif problem:
                alarms.append(f"{mode}: certified, {problem}")
    return Outcome(seed, network.labels, right, judge, kinked, verdicts, reasons, tuple(alarms))


_VARIABLE = re.compile(r"\w+\.py:\d+|\b\d+(?:\.\d+)*\b|'[^']*'")


def plain_reason(reason: str) -> str:
    """A reason without places, names and numbers."""
    return _VARIABLE.sub("~", reason)


def table(outcomes: Iterable[Outcome]) -> str:
    """Per kind: networks, right ones, certified, recall, the paper's recall; then why not."""
    outcomes = list(outcomes)
    by_label: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        for label in outcome.labels:
            by_label[label].append(outcome)
    names = ("networks", "right", "wrong", "certified", "recall", "paper", "undecided")
    head = f"{'kind':22s} " + " ".join(f"{name:>9s}" for name in names)
    lines = [head, _line("all", outcomes), _line("all with kinks", [o for o in outcomes if o.kinked])]
    order = [k for k in KINDS if k in by_label] + sorted(by_label.keys() - set(KINDS))
    lines += [_line(kind, by_label[kind]) for kind in order]
    lines.append(f"judged by: {dict(Counter(o.judge if o.right is not None else 'nobody' for o in outcomes))}")
    lines.append("most frequent reasons of right but undecided networks:")
    why = Counter(
        plain_reason(o.reasons["default"][0]) for o in outcomes if o.right and o.verdicts["default"] == "undecided"
    )
    lines += [f"{count:6d}  {reason}" for reason, count in why.most_common(25)]
    return "\n".join(lines)


def recall(outcomes: Iterable[Outcome], mode: str = "default") -> float:
    """Certified over right; 1 where none is right."""
    right = [o for o in outcomes if o.right]
    return sum(o.verdicts[mode] == "certified" for o in right) / len(right) if right else 1.0


def _line(kind: str, outcomes: list[Outcome]) -> str:
    right = [o for o in outcomes if o.right]
    certified = sum(o.verdicts["default"] == "certified" for o in right)
    wrong = sum(o.right is False for o in outcomes)
    undecided = sum(o.verdicts["default"] == "undecided" for o in outcomes)
    ours, paper = (f"{100 * recall(outcomes, mode):.1f}%" for mode in MODES)
    cells = (len(outcomes), len(right), wrong, certified, ours, paper, undecided)
    return f"{kind:22s} " + " ".join(f"{cell:>9}" for cell in cells)
