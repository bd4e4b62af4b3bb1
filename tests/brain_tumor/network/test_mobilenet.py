"""MobileNet v1 against an independent forward pass, its weights, and the embedding network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.network.mobilenet import (
    EmbeddingNetwork,
    MobileNetV1,
    load_imagenet_weights,
)
from examples.brain_tumor.settings import NetworkSettings

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def reference_layer(images, weights, name, stride, groups=1):
    """Convolution as TensorFlow pads it, batch normalisation and ReLU6, from the definitions."""
    kernel = weights[f"{name}.conv.weight"].double()
    size = kernel.shape[-1]
    padding = []
    for side in (images.shape[3], images.shape[2]):
        outputs = (side + stride - 1) // stride
        total = max((outputs - 1) * stride + size - side, 0)
        padding += [total // 2, total - total // 2]
    images = F.conv2d(F.pad(images, padding), kernel, stride=stride, groups=groups)
    terms = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, var = (
        weights[f"{name}.bn.{term}"].double()[:, None, None] for term in terms
    )
    images = (images - mean) / (var + 1e-3).sqrt() * gamma + beta
    return images.clamp(0, 6)


def reference_features(images, weights):
    images = reference_layer(images, weights, "stem", 2)
    for index, stride in enumerate(STRIDES):
        name = f"blocks.{index}"
        images = reference_layer(images, weights, f"{name}.depthwise", stride, images.shape[1])
        images = reference_layer(images, weights, f"{name}.pointwise", 1)
    return images


# timm's blocks are counted in stages: the output channels and strides of each one's blocks.
TIMM_STAGES = (
    (64, (1,)),
    (128, (2, 1)),
    (256, (2, 1)),
    (512, (2, 1, 1, 1, 1, 1)),
    (1024, (2, 1)),
)


def timm_features(images, weights):
    """timm's forward pass: padding of 1 on all sides, strided convolutions, an epsilon of 1e-5."""

    def normalise(features, name):
        terms = ("running_mean", "running_var", "weight", "bias")
        mean, var, gamma, beta = (weights[f"{name}.{term}"].to(features) for term in terms)
        return F.batch_norm(features, mean, var, gamma, beta, eps=1e-5).clamp(0, 6)

    def convolve(features, name, **arguments):
        return F.conv2d(features, weights[f"{name}.weight"].to(features), **arguments)

    features = normalise(convolve(images, "conv_stem", stride=2, padding=1), "bn1")
    for stage, (_, strides) in enumerate(TIMM_STAGES):
        for block, stride in enumerate(strides):
            name, groups = f"blocks.{stage}.{block}", features.shape[1]
            features = convolve(
                features, f"{name}.conv_dw", stride=stride, padding=1, groups=groups
            )
            features = normalise(features, f"{name}.bn1")
            features = normalise(convolve(features, f"{name}.conv_pw"), f"{name}.bn2")
    return features


def random_timm_weights():
    """Weights of the names and shapes in timm's file, for which every normalisation matters."""
    generator = torch.Generator().manual_seed(1)
    weights = {}

    def add(convolution, normalisation, *shape):
        deviation = (2 / torch.tensor(shape[1:]).prod()) ** 0.5
        weights[f"{convolution}.weight"] = torch.randn(shape, generator=generator) * deviation
        for term, scale in (("weight", 0.005), ("running_var", 2e-5)):
            weights[f"{normalisation}.{term}"] = torch.rand(shape[0], generator=generator) * scale
        for term in ("bias", "running_mean"):
            weights[f"{normalisation}.{term}"] = torch.randn(shape[0], generator=generator) * 0.5
        weights[f"{normalisation}.num_batches_tracked"] = torch.tensor(7)

    add("conv_stem", "bn1", 32, 3, 3, 3)
    channels = 32
    for stage, (out_channels, strides) in enumerate(TIMM_STAGES):
        for block in range(len(strides)):
            name = f"blocks.{stage}.{block}"
            add(f"{name}.conv_dw", f"{name}.bn1", channels, 1, 3, 3)
            add(f"{name}.conv_pw", f"{name}.bn2", out_channels, channels, 1, 1)
            channels = out_channels
    weights["classifier.weight"] = torch.zeros(1000, 1024)
    weights["classifier.bias"] = torch.zeros(1000)
    return weights


def random_weights():
    """Weights of the file's names and shapes, for which every batch normalisation matters."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in MobileNetV1().state_dict().items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("running_var"):
            # Small enough for the epsilon to matter.
            weights[name] = torch.rand(tensor.shape, generator=generator) * 0.02
        elif name.endswith("bn.weight"):
            weights[name] = torch.rand(tensor.shape, generator=generator) * 0.2
        elif not name.endswith("num_batches_tracked"):
            weights[name] = torch.randn(tensor.shape, generator=generator) * 0.5
    weights["classifier.weight"] = torch.zeros(1001, 1024)
    weights["classifier.bias"] = torch.zeros(1001)
    return weights


WEIGHTS = random_weights()
TIMM_WEIGHTS = random_timm_weights()


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "mobilenet.safetensors"
    save_file(WEIGHTS, path)
    return path


@pytest.fixture
def timm_file(tmp_path):
    path = tmp_path / "timm.safetensors"
    save_file(TIMM_WEIGHTS, path)
    return path


def assert_parity(path, height, width, layout="slim"):
    """The loaded network and the reference agree in float64."""
    network = MobileNetV1(layout=layout).eval()
    load_imagenet_weights(network, path)
    images = torch.rand(2, 3, height, width, dtype=torch.float64) * 2 - 1
    reference = {"slim": reference_features, "timm": timm_features}[layout]
    expected = reference(images, load_file(path))
    with torch.no_grad():
        found = network.double()(images)
    assert found.shape == (2, 1024, -(-height // 32), -(-width // 32))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 96), (33, 50)])
def test_forward_equals_reference(weights_file, height, width):
    assert_parity(weights_file, height, width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 96), (33, 50)])
def test_forward_in_timms_layout_equals_timms(timm_file, height, width):
    assert_parity(timm_file, height, width, "timm")


def test_forward_with_the_real_weights():
    path = Path(__file__).parents[4] / "shared/weights/mobilenet_v1_1.0_224.safetensors"
    if not path.is_file():
        pytest.skip("../shared, which holds the ImageNet weights, is absent")
    assert_parity(path, 224, 224)


def test_memory_format_and_precision_change_little(weights_file):
    network = MobileNetV1().eval()
    load_imagenet_weights(network, weights_file)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = reference_features(images.double(), WEIGHTS).float()
    network = network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        single = network(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images.to(memory_format=torch.channels_last))
    assert single.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)
    assert (half.float() - expected).norm() < 0.1 * expected.norm()


def test_parameter_count():
    assert sum(p.numel() for p in MobileNetV1().parameters()) == 3_206_976


def test_width_multiplies_channels():
    network = MobileNetV1(0.25)
    assert network.out_channels == 256
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 256, 1, 1)


# ------------------------------------------------------------------------------------- weights


def assert_refused(network, path, fault):
    """One line that names the file, and not one changed number in the network."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_imagenet_weights(network, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert "\n" not in message
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


LAST = "blocks.12.pointwise.bn.running_var"
FAULTS = {
    f"no tensor named {LAST}": {LAST: None},
    f"{LAST} has shape [512], expected [1024]": {LAST: torch.ones(512)},
    f"{LAST} holds values": {LAST: torch.full((1024,), float("nan"))},
    "not finite floating-point": {LAST: torch.ones(1024, dtype=torch.int32)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_another_network_are_refused(tmp_path, fault):
    path = tmp_path / "weights.safetensors"
    members = {**WEIGHTS, **FAULTS[fault]}
    save_file({name: tensor for name, tensor in members.items() if tensor is not None}, path)
    assert_refused(MobileNetV1(), path, fault)


TIMM_LAST = "blocks.4.1.bn2.running_var"
TIMM_FAULTS = {
    f"no tensor named {TIMM_LAST}": {TIMM_LAST: None},
    f"{TIMM_LAST} has shape [512], expected [1024]": {TIMM_LAST: torch.ones(512)},
    "neither TF-slim's nor timm's": {"conv_stem.weight": None},
}


@pytest.mark.parametrize("fault", TIMM_FAULTS)
def test_timms_weights_of_another_network_are_refused(tmp_path, fault):
    path = tmp_path / "weights.safetensors"
    members = {**TIMM_WEIGHTS, **TIMM_FAULTS[fault]}
    save_file({name: tensor for name, tensor in members.items() if tensor is not None}, path)
    assert_refused(MobileNetV1(layout="timm"), path, fault)


def test_weights_of_the_other_layout_name_the_setting(weights_file, timm_file):
    assert_refused(MobileNetV1(), timm_file, "set --layout timm")
    assert_refused(MobileNetV1(layout="timm"), weights_file, "set --layout slim")


def test_unreadable_weights_are_refused(tmp_path, weights_file):
    network = MobileNetV1()
    assert_refused(network, tmp_path / "absent.safetensors", "no such weights file")
    path = tmp_path / "bad.safetensors"
    for content in (b"", b"not safetensors", weights_file.read_bytes()[:-1]):
        path.write_bytes(content)
        assert_refused(network, path, "not a readable safetensors file")


def test_another_width_is_refused(weights_file):
    assert_refused(MobileNetV1(0.5), weights_file, "width 1.0, but the network has 0.5")


# ---------------------------------------------------------------------------- embedding network


def test_embedding_network_follows_the_paper():
    network = EmbeddingNetwork(NetworkSettings(width=0.25, embedding_size=32, dropout=0.3))
    images = torch.rand(4, 1, 32, 32)
    dense, activation, dropout, final, normalisation = network.output
    assert (dense.in_features, dense.out_features) == (256, 32)
    assert isinstance(activation, torch.nn.ReLU)
    assert dropout.p == 0.3
    assert isinstance(normalisation, torch.nn.BatchNorm1d)
    network.eval()
    with torch.no_grad():
        pooled = network.backbone((images * 2 - 1).repeat(1, 3, 1, 1)).mean((2, 3))
        expected = normalisation(final(dense(pooled).clamp(min=0)))
        torch.testing.assert_close(network(images), expected)
    assert expected.shape == (4, 32)


def test_final_layer_is_he_initialised():
    final = EmbeddingNetwork(NetworkSettings(width=0.25)).output[3]
    assert final.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
    assert (final.bias == 0).all()


def test_input_range_is_what_it_says():
    seen = []
    for input_range in ("imagenet", "unit"):
        settings = NetworkSettings(width=0.25, embedding_size=8, input_range=input_range)
        network = EmbeddingNetwork(settings).eval()
        network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        network(torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 1, 32, 32))
    imagenet, unit = seen
    assert imagenet.shape == unit.shape == (3, 3, 32, 32)
    assert imagenet[:, 1, 5, 5].tolist() == [-1, -0.5, 1]
    assert unit[:, 1, 5, 5].tolist() == [0, 0.25, 1]


def test_the_layout_is_a_setting():
    for layout in ("slim", "timm"):
        network = EmbeddingNetwork(NetworkSettings(width=0.25, embedding_size=8, layout=layout))
        assert network.backbone.layout == layout
    assert NetworkSettings().layout == "slim"


@pytest.mark.parametrize("layout", ["slim", "timm"])
def test_every_parameter_learns(layout):
    network = EmbeddingNetwork(NetworkSettings(width=0.25, embedding_size=8, layout=layout))
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = network(torch.rand(4, 1, 64, 64))
    (embeddings.float() ** 3).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # The bias of the last layer is taken off again by the normalisation that follows it.
        assert parameter.grad.any() or name == "output.3.bias", name
