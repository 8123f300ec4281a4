"""The product's promise on the pinned generator: no false certificate, and enough true ones."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from networks import Network, random_network

import adcert
from adcert import oracle

SEEDS = 1000


def certificates(network: Network) -> dict[str, adcert.Certificate]:
    """Default and strict certificates of one step, verified."""
    model = adcert.convert(network.model)
    found = {
        "default": adcert.certify(network.closure, model),
        "strict": adcert.certify(network.closure, model, strict=True),
    }
    for certificate in found.values():
        certificate.verify()
    return found


@given(st.integers(SEEDS, 2**31))
def test_property_certificates_are_true(seed: int) -> None:
    """Beyond the pinned thousand: a certified gradient is the limit of true gradients along the witness."""
    network = random_network(seed)
    for certificate in certificates(network).values():
        if certificate.claim == "clarke":  # a combination, without a witness of its own
            assert oracle.judge(network.closure, network.model).member is not False
        elif certificate.verdict is adcert.Verdict.CERTIFIED:
            witness = oracle.replays(network.closure, network.model, certificate.directions, certificate.scales)
            assert witness.reproduces
        assert certificate.verdict is not adcert.Verdict.UNDECIDED


def test_thousand_networks() -> None:
    """0 false certificates; at least 80 % of the gradients that are Clarke certified, 49 % strictly.

    A gradient counts as Clarke if the oracle says so, or, where the oracle cannot tell, if a witness replays.
    """
    counts: Counter[tuple[str, str, bool]] = Counter()
    for seed in range(SEEDS):
        network = random_network(seed)
        member = oracle.judge(network.closure, network.model).member
        found = certificates(network)
        for mode, certificate in found.items():
            name = f"network {seed}, {mode}"
            assert certificate.verdict is not adcert.Verdict.UNDECIDED, f"{name}: undecided on exact data"
            if certificate.claim == "clarke":  # a combination, without a witness of its own
                assert member is True, f"{name}: the oracle does not confirm"
            elif certificate.verdict is adcert.Verdict.CERTIFIED:
                witness = oracle.replays(network.closure, network.model, certificate.directions, certificate.scales)
                distances = [distance for distance in witness.distances if distance is not None]
                assert witness.reproduces, f"{name}: the witness does not tend to AD's gradient"
                assert distances[-1] <= max(distances[0], 2.0**-52), f"{name}: the distance does not shrink"
                assert certificate.replay(network.closure, network.model).converges, f"{name}: no replay in float64"
                assert member is not False, f"{name}: a false certificate"
                if member is None:
                    assert not oracle.confirm(
                        network.closure, network.model, certificate.directions, certificate.scales
                    ).false_certificate
                member = True
        for mode, certificate in found.items():
            counts[mode, certificate.verdict.value, member is True] += 1
    clarke = sum(count for (mode, _, member), count in counts.items() if member and mode == "default")
    print({" ".join(map(str, key)): count for key, count in sorted(counts.items())})
    assert clarke >= SEEDS // 2
    assert counts["default", "certified", True] >= 0.80 * clarke
    assert counts["strict", "certified", True] >= 0.49 * clarke
