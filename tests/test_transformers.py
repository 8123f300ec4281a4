"""Networks of the transformers library, small, from their configuration and with random weights: nothing is downloaded.

Each is converted as it is. Outputs and gradients stay bitwise those of the untouched copy, and every training step is
decided, on random images and on a case full of touches: channels that are switched off, images with flat areas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import adcert
from adcert import Monitor, Verdict

transformers = pytest.importorskip("transformers", reason="the networks come from transformers")

Batch = dict[str, Tensor]
BATCH, LABELS = 4, 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are tiny; and sums over threads would not be the same twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(size: int, flat: bool) -> Tensor:
    x = torch.rand(BATCH, 3, size, size)
    if flat:  # as in photographs: few grey levels, a black area, and an image that occurs twice
        x = (x * 8).floor() / 8
        x[:, :, : size // 2] = 0
        x[1] = x[0]
    return x


def classes(size: int) -> Callable[[bool], Batch]:
    return lambda flat: {"pixel_values": images(size, flat), "labels": torch.randint(LABELS, (BATCH,))}


def pixels(size: int) -> Callable[[bool], Batch]:
    return lambda flat: {"pixel_values": images(size, flat), "labels": torch.randint(LABELS, (BATCH, size, size))}


def tokens(flat: bool) -> Batch:
    ids = torch.randint(2, 50, (BATCH, 12))
    return {"input_ids": ids, "labels": ids.clone()}


def resnet(kind: str) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type=kind, hidden_act="relu", num_labels=LABELS
    )
    return transformers.ResNetForImageClassification(config)


def regnet(kind: str) -> nn.Module:
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type=kind, num_labels=LABELS
    )
    return transformers.RegNetForImageClassification(config)


def mobilenet(version: int) -> nn.Module:
    config = {"image_size": 32, "depth_multiplier": 0.25, "num_labels": LABELS}
    if version == 1:
        return transformers.MobileNetV1ForImageClassification(transformers.MobileNetV1Config(**config))
    config |= {"classifier_dropout_prob": 0.2}
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**config))


def segformer(head: str) -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        hidden_act="relu",
        decoder_hidden_size=16,
        drop_path_rate=0.2,
        num_labels=LABELS,
    )
    return getattr(transformers, f"SegformerFor{head}")(config)


def vit(attention: str, dropout: float = 0.1) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="relu",
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
        num_labels=LABELS,
    )
    return transformers.ViTForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, hidden_act="relu", drop_path_rate=0.1, num_labels=LABELS
    )
    return transformers.ConvNextForImageClassification(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=4,
        hidden_act="relu",
        drop_path_rate=0.1,
        num_labels=LABELS,
    )
    return transformers.SwinForImageClassification(config)


def bit() -> nn.Module:
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4, drop_path_rate=0.1, num_labels=LABELS
    )
    return transformers.BitForImageClassification(config)


def levit() -> nn.Module:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[8, 16, 16],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        num_labels=LABELS,
    )
    return transformers.LevitForImageClassification(config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return transformers.OPTForCausalLM(config)


Case = tuple[Callable[[], nn.Module], Callable[[bool], Batch]]
NETWORKS: dict[str, Case] = {
    "resnet": (lambda: resnet("basic"), classes(32)),
    "resnet-bottleneck": (lambda: resnet("bottleneck"), classes(32)),
    "mobilenet-v1": (lambda: mobilenet(1), classes(32)),
    "mobilenet-v2": (lambda: mobilenet(2), classes(32)),
    "regnet-x": (lambda: regnet("x"), classes(32)),
    "regnet-y": (lambda: regnet("y"), classes(32)),
    "segformer-pixels": (lambda: segformer("SemanticSegmentation"), pixels(32)),
    "segformer-images": (lambda: segformer("ImageClassification"), classes(32)),
    "vit-eager": (lambda: vit("eager"), classes(16)),
    "vit-sdpa": (lambda: vit("sdpa"), classes(16)),
    "vit-sdpa-flash": (lambda: vit("sdpa", 0.0), classes(16)),  # without dropout it is another kernel
    "convnext": (convnext, classes(32)),
    "swin": (swin, classes(32)),
    "bit": (bit, classes(32)),
    "levit": (levit, classes(64)),
    "opt": (opt, tokens),
}


KINKS = {"levit": 3.0}  # of the hardswish; 0 elsewhere


def build(name: str) -> tuple[nn.Module, Callable[[bool], Batch]]:
    network, batch = NETWORKS[name]
    torch.manual_seed(0)
    return network().train(), batch


def switch_off(model: nn.Module, kink: float) -> None:
    """A third of the channels of every layer and normalisation, as pruning leaves them: all their units are equal.

    After a normalisation they lie on the kink.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            inner = type(module) in (nn.Linear, nn.Conv2d) and "classifier" not in name
            if inner or isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                off = torch.rand(module.weight.shape[0], generator=generator) < 0.34
                for parameter in module.parameters(recurse=False):
                    parameter[off] = 0
                if not inner:
                    module.bias[off] = kink


def gradients(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # dropout, stochastic depth
    output = model(**batch)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_converting_changes_no_bit(name: str) -> None:
    plain, make = build(name)
    model = adcert.convert(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
    batch = make(True)
    loss, logits, expected = gradients(plain, batch)
    with Monitor(model, queue=0).step():
        found = gradients(model, batch)
    assert torch.equal(found[0], loss) and torch.equal(found[1], logits)
    assert found[2].keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (gradient is None) == (found[2][parameter] is None)
        assert gradient is None or torch.equal(found[2][parameter], gradient), parameter
    for key, value in plain.state_dict().items():  # running statistics
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", NETWORKS)
def test_training_steps_are_decided(name: str) -> None:
    model, make = build(name)
    adcert.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = Monitor(model, queue=0)
    for _ in range(3):
        batch = make(False)
        optimizer.zero_grad()
        with monitor.step() as step:
            model(**batch).loss.backward()
        optimizer.step()
        assert step.certificate().verdict is not Verdict.UNDECIDED, step.certificate().reasons
        step.certificate().verify()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_full_of_touches_is_decided(name: str) -> None:
    model, make = build(name)
    switch_off(model, KINKS.get(name, 0.0))
    adcert.convert(model)
    with Monitor(model, queue=0).step() as step:
        model(**make(True)).loss.backward()
    assert step.summary["touches"] > 0
    assert step.certificate().verdict is not Verdict.UNDECIDED, step.certificate().reasons
    step.certificate().verify()
