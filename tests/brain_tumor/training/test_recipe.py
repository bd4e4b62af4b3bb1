"""What the recipe adds to the paper's training: AdamW, averaged weights, views, validation."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from h5py import File
from PIL import Image

from examples.brain_tumor.data.crop import find_box
from examples.brain_tumor.data.slices import SliceSet, resize
from examples.brain_tumor.data.splits import ARCHIVE_COUNTS, paper_split, validation_split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.evaluate import embed, evaluate
from examples.brain_tumor.network.mobilenet import EmbeddingNetwork
from examples.brain_tumor.network.objectives import make_loss
from examples.brain_tumor.settings import LossSettings, load_settings, override_settings
from examples.brain_tumor.training import loop as training
from examples.brain_tumor.training.checkpoint import load_network
from examples.brain_tumor.training.loop import learning_rate, start, train
from examples.brain_tumor.use import prediction as prediction_module
from examples.brain_tumor.use.gradcam import grad_cam
from examples.brain_tumor.use.prediction import predict

CPU = torch.device("cpu")


def state_of(settings, **changes):
    return start(override_settings(settings, changes), CPU)


def test_the_optimiser_is_the_one_that_is_asked_for(tiny_settings):
    paper = state_of(tiny_settings).optimiser
    assert type(paper) is torch.optim.Adam
    assert all(group["weight_decay"] == 0 for group in paper.param_groups)
    decaying = state_of(tiny_settings, optimiser="adamw", weight_decay=0.03).optimiser
    assert type(decaying) is torch.optim.AdamW
    assert all(group["weight_decay"] == 0.03 for group in decaying.param_groups)
    with pytest.raises(UserError, match="--weight-decay: the paper's Adam has none"):
        state_of(tiny_settings, weight_decay=0.03)


def test_every_parameter_is_trained_once_and_mobilenet_at_its_own_rate(tiny_settings):
    state = state_of(tiny_settings, backbone_rate=0.1)
    state.set_learning_rate(2e-3)
    rates = {
        id(parameter): group["lr"]
        for group in state.optimiser.param_groups
        for parameter in group["params"]
    }
    every = [*state.network.parameters(), *state.loss.parameters()]
    assert sorted(rates) == sorted(map(id, every))
    for parameter in state.network.backbone.parameters():
        assert rates[id(parameter)] == pytest.approx(2e-4)
    assert rates[id(state.loss.weight)] == 2e-3


def test_the_papers_steps_come_at_the_same_shares_of_fewer_epochs():
    paper = load_settings("paper").training
    short = dataclasses.replace(paper, epochs=22)  # 275 / 12.5
    for epoch in np.linspace(0, 274.9, 50):
        assert learning_rate(short, epoch / 12.5) == learning_rate(paper, epoch)
    assert [learning_rate(paper, epoch) for epoch in (0, 124, 125, 174, 175, 274)] == (
        pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    )


def test_the_average_of_the_weights_is_what_answers(
    tmp_path, tiny_settings, blobs, blob_split, monkeypatch
):
    settings = override_settings(tiny_settings, {"ema": 0.8, "views": 2})
    seen = []
    take_step = training.take_step

    def step(state, *arguments):
        measures = take_step(state, *arguments)
        seen.append({name: one.clone() for name, one in state.network.state_dict().items()})
        return measures

    monkeypatch.setattr(training, "take_step", step)
    train(settings, blobs, blob_split, tmp_path / "run")
    expected = {name: one.double() for name, one in seen[0].items()}
    for weights in seen[1:]:
        for name, one in weights.items():
            expected[name] = 0.8 * expected[name] + 0.2 * one.double()
    averaged, _ = load_network(tmp_path / "run", settings.network)
    last, _ = load_network(tmp_path / "run", settings.network, averaged=False)
    for name, one in averaged.state_dict().items():
        if one.is_floating_point():  # BatchNorm's statistics too
            assert torch.allclose(one.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(one, seen[-1][name]) for name, one in last.state_dict().items())
    evaluate(tmp_path / "run", blobs)
    kept = np.load(tmp_path / "run" / "embeddings.npy")
    assert kept == pytest.approx(embed(averaged, blobs.images, views=2).numpy(), abs=1e-5)
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(stored["accuracy_by_views"]) == {"1", "2"}
    assert set(stored["accuracy_by_views_without_ema"]) == {"1", "2"}
    assert stored["accuracy"] == stored["accuracy_by_views"]["2"]


def test_an_average_survives_an_interruption(
    tmp_path, tiny_settings, blobs, blob_split, monkeypatch
):
    settings = override_settings(
        tiny_settings, {"ema": 0.8, "optimiser": "adamw", "weight_decay": 0.1, "epochs": 3}
    )
    train(settings, blobs, blob_split, tmp_path / "whole")
    original, calls = training.take_step, []

    def step(state, *arguments):
        calls.append(state.epoch)
        if calls.count(1) == 2:
            raise KeyboardInterrupt
        return original(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(settings, blobs, blob_split, tmp_path / "cut")
    train(settings, blobs, blob_split, tmp_path / "cut", resume=True)
    whole, cut = (load_network(tmp_path / name, settings.network)[0] for name in ("whole", "cut"))
    for name, one in whole.state_dict().items():
        assert torch.equal(one, cut.state_dict()[name])


@pytest.mark.parametrize("loss", ["sphereface", "softmax", "modified-softmax", "arcface"])
def test_smoothed_labels_are_torchs(loss):
    settings = LossSettings(loss=loss, margin=1.0 if loss == "sphereface" else 0.0)
    settings = dataclasses.replace(settings, annealing=False, label_smoothing=0.3)
    torch.manual_seed(0)
    made = make_loss(settings, 8)
    embeddings, labels = torch.randn(10, 8), torch.arange(10) % 3
    logits = made.get_logits(embeddings)  # without a margin the loss is plain cross-entropy
    expected = F.cross_entropy(logits, labels, label_smoothing=0.3)
    assert made(embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_triplets_have_no_labels_to_smooth():
    settings = LossSettings(loss="triplet", margin=0.2, label_smoothing=0.1)
    with pytest.raises(UserError, match="--label-smoothing: --loss triplet has no labels"):
        make_loss(settings, 8)


def archive():
    labels = torch.arange(3).repeat_interleave(torch.tensor(ARCHIVE_COUNTS))
    count = len(labels)
    return SliceSet(
        torch.zeros(count, 1, 1, 1), labels, list(range(count)), ["p"] * count, None, False
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_validation_slices_come_from_the_training_side_alone(seed):
    slices = archive()
    paper, validation = paper_split(slices, seed), validation_split(slices, seed)
    train_side, held_out = set(validation.train.tolist()), set(validation.test.tolist())
    assert not train_side & held_out
    assert train_side | held_out == set(paper.train.tolist())
    counts = slices.labels[validation.test].bincount().tolist()
    assert counts == [49, 100, 65]  # a tenth of 491, 1004 and 649
    again = validation_split(slices, seed)
    assert torch.equal(again.test, validation.test)


def test_validation_of_too_few_slices_is_refused():
    labels = torch.arange(12) % 3  # three of each class to train on: no tenth of them
    slices = SliceSet(torch.zeros(12, 1, 1, 1), labels, list(range(12)), ["p"] * 12, None, False)
    with pytest.raises(UserError, match="split validation: 3 meningioma slices are too few"):
        validation_split(slices, 0)


def test_slices_on_neither_side_have_no_embedding(tmp_path, tiny_settings, blobs, blob_split):
    split = dataclasses.replace(blob_split, test=blob_split.test[:-2])
    train(tiny_settings, blobs, split, tmp_path / "run")
    evaluate(tmp_path / "run", blobs)
    norms = np.linalg.norm(np.load(tmp_path / "run" / "embeddings.npy"), axis=1)
    assert norms == pytest.approx([1] * 22 + [0] * 2, abs=1e-5)
    answers, faults = predict_blob(tmp_path, blobs, 23)
    assert (len(answers), faults) == (1, [])


def predict_blob(folder, slices, index):
    pixels = (255 * slices.images[index, 0].float().numpy()).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / "blob.png")
    return predict(folder / "run", [folder / "blob.png"], slices, folder / "out")


def test_views_are_the_slice_its_mirror_image_and_upside_down(tiny_settings, blobs):
    torch.manual_seed(0)
    network = EmbeddingNetwork(tiny_settings.network)
    views = (blobs.images, blobs.images.flip(3), blobs.images.flip(2))
    every = torch.stack([embed(network, one) for one in views])
    for count in (1, 2, 3):
        expected = F.normalize(every[:count].mean(0))
        assert torch.allclose(embed(network, blobs.images, views=count), expected, atol=1e-5)


def test_grad_cam_of_views_is_mirrored_back(tiny_settings, blobs):
    torch.manual_seed(0)
    settings = override_settings(tiny_settings, {"width": 0.5})
    network = EmbeddingNetwork(settings.network).eval()
    image = F.interpolate(blobs.images[:1].float(), (96, 96))
    direction = F.normalize(torch.randn(16), dim=0)
    plain, mirrored, upside_down = (
        grad_cam(network, one, direction, (96, 96)) for one in (image, image.flip(3), image.flip(2))
    )
    expected = (plain + mirrored[:, ::-1] + upside_down[::-1]) / 3
    heat = grad_cam(network, image, direction, (96, 96), views=3)
    assert heat.any()
    assert heat == pytest.approx(expected, abs=1e-6 * heat.max())


def test_a_prediction_cuts_and_averages_as_its_run_does(
    tmp_path, tiny_settings, blobs, blob_split, monkeypatch
):
    """The slice in a file is twice as large as its head, which lies in a corner."""
    heads = [np.kron(image[0].float().numpy() + 0.3, np.ones((4, 4))) for image in blobs.images]
    files = []
    for one in heads:
        whole = np.zeros((256, 256))
        whole[10:138, 20:148] = one
        files.append(whole)
    cropped = []
    for one in files:
        part = one[find_box(one, "head")]
        assert abs(len(part) - 133) <= 3
        cropped.append(resize(part, 32))
    slices = dataclasses.replace(
        blobs, images=torch.from_numpy(np.stack(cropped))[:, None].to(torch.float16)
    )
    assert not np.allclose(resize(files[0], 32), cropped[0], atol=0.1)
    settings = override_settings(tiny_settings, {"crop": "head", "views": 3, "epochs": 30})
    train(settings, slices, blob_split, tmp_path / "run")
    evaluate(tmp_path / "run", slices)
    drawn = []
    monkeypatch.setattr(
        prediction_module, "plot_prediction", lambda *given, **_: drawn.append(given)
    )
    monkeypatch.setattr(prediction_module, "grad_cam", lambda *given: np.ones(given[3]))
    file = tmp_path / "21.mat"
    with File(file, "w", userblock_size=512) as opened:
        opened["cjdata/image"] = files[20].T
        opened["cjdata/label"] = np.ones((1, 1))
        opened["cjdata/PID"] = np.array([[ord("7")]], np.uint16)
        opened["cjdata/tumorBorder"] = np.ones((1, 8))
        opened["cjdata/tumorMask"] = np.ones((256, 256), np.uint8)
    (answer,), faults = predict(tmp_path / "run", [file], slices, tmp_path / "out")
    assert faults == []
    kept = np.load(tmp_path / "run" / "embeddings.npy")
    cosines = np.sort(kept[:15] @ kept[20])[::-1][:5]
    assert [one.cosine for one in answer.neighbours] == pytest.approx(cosines.tolist(), abs=1e-4)
    assert np.ptp(kept[:15] @ kept[20]) > 0.1
    _, _, image, heat, *_ = drawn[0]
    assert image.shape == heat.shape == (256, 256)
    assert heat[20:130, 30:140].all()
    assert not heat[150:].any()  # outside the head, where the network never looked
    assert not heat[:, 160:].any()
