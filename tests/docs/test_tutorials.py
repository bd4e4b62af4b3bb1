"""The tutorials run without a warning, and what their text says is what came out."""

import runpy
from pathlib import Path

import pytest
import torch

pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("sklearn")
# Where there is a screen, Agg says that it shows nothing there.
pytestmark = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a tutorial as a script in a folder of its own, which it leaves empty."""

    def run(name):
        folder = tmp_path_factory.mktemp("tutorial")
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
            patch.chdir(folder)
            patch.syspath_prepend(ROOT / "examples")
            pyplot.switch_backend("Agg")
            names = runpy.run_path(str(TUTORIALS / name))
            titles = [title_of(pyplot.figure(number)) for number in pyplot.get_fignums()]
        pyplot.close("all")
        torch.set_num_threads(threads)
        assert not list(folder.iterdir())
        return names, titles

    return run


def title_of(figure):
    """What the gallery makes the alternative text of."""
    return figure.get_suptitle() + "".join(ax.get_title() for ax in figure.axes)


@pytest.fixture(scope="module")
def first(run):
    return run("plot_1_first_embedding.py")


@pytest.fixture(scope="module")
def second(run):
    return run("plot_2_image_folder.py")


@pytest.fixture(scope="module")
def third(run):
    return run("plot_3_backbone.py")


def test_figures_have_titles(first, second, third):
    for (_, titles), count in ((first, 2), (second, 1), (third, 3)):
        assert len(titles) == count
        assert all(len(title) > 20 for title in titles)


def test_the_margin_makes_the_angles_smaller(first):
    names, _ = first
    angles = {key: names["angle_to_centre"](*run) for key, run in names["runs"].items()}
    assert len(angles) == 6
    for seed in range(3):
        assert angles[0.2, seed] < angles[0.0, seed] < 0.2


def test_circle_embeddings_classify(first):
    names, _ = first
    for network, _ in names["runs"].values():
        assert names["neighbours"](network).statistic > 0.85


def test_nearest_images_of_new_classes_are_of_one_class(second):
    names, _ = second
    recall = names["image_folder"].recall_at_1(names["embeddings"], names["new"].labels)
    assert recall > 0.9


def test_the_threshold_accepts_few_pairs_of_different_classes(second):
    names, _ = second
    accepted = (names["tried_different"] > names["threshold"]).float().mean()
    assert 0 < accepted < 0.03
    assert (names["tried_same"] > names["threshold"]).float().mean() > 5 * accepted


def test_the_script_of_the_image_folder_runs_on_any_folder_and_backbone(tmp_path, capsys):
    names = runpy.run_path(str(ROOT / "examples" / "image_folder.py"))
    names["write_digits"](tmp_path / "images")
    arguments = ["--data", tmp_path / "images", "--size", "8", "--epochs", "1"]
    arguments += ["--backbone", "torch.nn.Flatten", "--out", tmp_path / "network.pt"]
    with torch.random.fork_rng():
        recall = names["main"]([str(each) for each in arguments])
    told = capsys.readouterr().out
    assert "1264 images of 7 classes, 533 of 3 new" in told
    assert f"recall@1 {recall:.1%}" in told
    weights = torch.load(tmp_path / "network.pt", weights_only=True)
    assert weights["1.weight"].shape == (64, 3 * 8 * 8)


def test_the_backbone_is_pretrained(third):
    names, _ = third
    assert names["value"] < 0.5 * names["math"].log(4)


def test_new_classes_are_in_no_training(third):
    names, _ = third
    assert set(names["train_labels"].tolist()) == set(range(7))
    assert set(names["new_labels"].tolist()) == {7, 8, 9}
    assert set(names["labels"][names["held_out"]].tolist()) == set(range(7))
    rows = len(names["train_labels"]) + len(names["new_labels"]) + int(names["held_out"].sum())
    assert rows == len(names["labels"])


def test_larger_margins_concentrate_the_training_classes(third):
    names, _ = third
    medians = [
        names["measure"](*runs[0][:2]).numbers["target_median"] for runs in names["runs"].values()
    ]
    assert 0 < names["chosen"] < 1.2
    assert medians == sorted(medians, reverse=True)


def test_fine_tuning_helps_on_new_classes_and_a_large_margin_does_not(third):
    names, _ = third
    accepted = names["accepted"]
    for seed in range(3):
        none, large = accepted["m = 0.0", seed], accepted["m = 1.2", seed]
        chosen = accepted[f"m = {names['chosen']}", seed]
        assert min(none, chosen) > accepted["backbone alone", 0]
        assert large < none


def test_true_accepts_at_one_in_a_hundred_by_counting(third):
    names, _ = third
    network, labels = names["pretrained"], names["new_labels"]
    cosine, pairs = names["cosines"](network), torch.triu(torch.ones(len(labels), len(labels)), 1)
    same = labels[:, None] == labels
    other = cosine[(pairs == 1) & ~same].sort(descending=True).values
    threshold = other[int(0.01 * len(other))]
    counted = (cosine[(pairs == 1) & same] > threshold).float().mean().item()
    assert names["accepted"]["backbone alone", 0] == pytest.approx(counted, abs=2e-3)


def test_the_state_is_kept_by_safetensors_too(third, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    names, _ = third
    state = names["restored"]["loss"]
    safetensors.save_file(state, tmp_path / "loss.safetensors")
    loaded = safetensors.load_file(tmp_path / "loss.safetensors")
    assert loaded.keys() == state.keys() == {"weight", "schedule.step"}
    for name, value in state.items():
        assert torch.equal(loaded[name], value)
        assert torch.equal(names["runs"][names["chosen"]][0][1].state_dict()[name], value)
