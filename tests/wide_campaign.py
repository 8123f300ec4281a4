"""Convert, certify and judge wide random networks; tabulate by kind. Not a test: ``test_wide_campaign.py`` is."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from wide_networks import KINDS, WideNetwork, wide_network
from wide_oracle import sample, witness

import adcert

MODES = ("default", "strict")


@dataclass(frozen=True)
class Outcome:
    """What happened to one network. ``right``: autodiff's gradient is Clarke (True) or unknown (None) or not (False);
    ``verdicts``, ``reasons``: by mode; ``alarms``: what must not happen."""

    seed: int
    labels: frozenset[str]
    right: bool | None
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


def run(seed: int, certify: Callable[[WideNetwork, bool], adcert.Certificate] = certificate_of) -> Outcome:
    """The network of a seed: certified in both modes, judged, every certificate replayed."""
    network = wide_network(seed)
    sampled = sample(network)
    right = sampled.member
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
        found = witness(network, certificate.directions, certificate.scales)
        if found.tends:
            right = True
        elif certificate.claim == "bouligand" or right is None:
            member = right or sample(network, seed=1, rounds=(24, 400, 3000)).member
            distances = ", ".join(f"{d:.1e}" for d in found.distances)
            alarms.append(f"{mode}: {'witness' if member else 'FALSE'}: certified, witness at {distances}")
            right = right or member
    return Outcome(seed, network.labels, right, sampled.kinked, verdicts, reasons, tuple(alarms))


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
    head = (
        f"{'kind':22s} {'networks':>8s} {'right':>6s} {'certified':>9s} {'recall':>7s} {'paper':>7s} {'undecided':>9s}"
    )
    lines = [head, _line("all", outcomes), _line("all with kinks", [o for o in outcomes if o.kinked])]
    order = [k for k in KINDS if k in by_label] + sorted(by_label.keys() - set(KINDS))
    lines += [_line(kind, by_label[kind]) for kind in order]
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
    undecided = sum(o.verdicts["default"] == "undecided" for o in outcomes)
    ours, paper = (f"{100 * recall(outcomes, mode):6.1f}%" for mode in MODES)
    return f"{kind:22s} {len(outcomes):8d} {len(right):6d} {certified:9d} {ours:>7s} {paper:>7s} {undecided:9d}"
