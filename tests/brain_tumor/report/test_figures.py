"""The figures of the report: what they show, and that all text is inside and none overlaps."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import roc_auc_score

from examples.brain_tumor.data.slices import CLASS_NAMES, PLANES, SAMPLE_NUMBERS
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.report.figures import paper
from examples.brain_tumor.report.figures.further import (
    Angles,
    plot_angles,
    plot_budget,
    plot_errors,
    plot_reliability,
    plot_roc,
    plot_slice_and_patient,
)
from examples.brain_tumor.report.figures.paper import (
    CLASS_STYLES,
    Embedded,
    Score,
    compute_tsne,
    plot_confusions,
    plot_losses,
    plot_samples,
    plot_scores,
    plot_tsne,
)
from examples.brain_tumor.report.figures.pipeline import plot_pipeline
from examples.brain_tumor.settings import load_settings

SLICES_TABLE = Path(__file__).parents[4] / "shared/data/figshare/slices.csv"
TITLE = "SYNTHETIC: a title that is much too long for one line of a narrow figure, " * 2
LONG_NAMES = [
    f"sub-centre ArcFace m = 0.{i:02}, annealed, averaged over the flips" for i in range(12)
]
PAPER_MATRIX = np.array([[208, 2, 7], [1, 421, 0], [2, 0, 279]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figure.png"


def texts_of(figure):
    """All texts that are drawn; ticks beyond the limits of their axis are not."""
    beyond = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]


def assert_readable(figure, path):
    """A PNG of the figure's size lies there; its texts are large enough, inside and apart."""
    with Image.open(path) as picture:
        width, height = picture.size
    np.testing.assert_allclose((width, height), 150 * figure.get_size_inches(), atol=1)
    assert 400 <= width <= 1700
    assert 250 <= height <= 2700
    figure.set_dpi(150)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = []
    for text in texts_of(figure):
        assert text.get_fontsize() >= 8, text
        assert r"\math" not in text.get_text(), text
        box = text.get_window_extent(renderer)
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= width + 0.5, text
        assert box.y1 <= height + 0.5, text
        boxes.append((text, box))
    for (one, box), (other, further) in itertools.combinations(boxes, 2):
        assert not box.padded(-1).overlaps(further.padded(-1)), (one, other)
    tight = figure.get_tightbbox(renderer)  # ticks, points and all
    assert tight.x0 >= -0.01
    assert tight.y0 >= -0.01
    assert tight.x1 <= figure.get_figwidth() + 0.01
    assert tight.y1 <= figure.get_figheight() + 0.01


def legend_texts(owner):
    return [text.get_text() for text in owner.get_texts()]


def points_of(collections):
    return np.concatenate([np.asarray(c.get_offsets()).reshape(-1, 2) for c in collections])


def assert_inside(axes, points):
    (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    assert ((points[:, 0] >= left) & (points[:, 0] <= right)).all()
    assert ((points[:, 1] >= bottom) & (points[:, 1] <= top)).all()


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_samples_stand_in_their_row_and_column_and_gaps_have_a_dash(path):
    slices = {
        (name, plane): np.full((8, 8), (3 * i + j) / 9)
        for i, name in enumerate(CLASS_NAMES)
        for j, plane in enumerate(PLANES)
    }
    del slices["glioma", "coronal"]
    figure = plot_samples(path, "Slices", slices)
    assert_readable(figure, path)
    values = [float(a.images[0].get_array()[0, 0]) if a.images else None for a in figure.axes]
    assert values == [0, 1 / 9, 2 / 9, 3 / 9, 4 / 9, None, 6 / 9, 7 / 9, 8 / 9]
    assert [text.get_text() for text in figure.axes[5].texts] == ["—"]
    assert [axes.get_title() for axes in figure.axes[:3]] == ["axial", "sagittal", "coronal"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == list(CLASS_NAMES)
    assert all(image.get_clim() == (0, 1) for axes in figure.axes for image in axes.images)


def test_every_cell_has_a_sample_in_the_archive():
    assert set(SAMPLE_NUMBERS) == set(itertools.product(CLASS_NAMES, PLANES))
    if not SLICES_TABLE.exists():
        pytest.skip("the table of the real slices is not here")
    with SLICES_TABLE.open(newline="") as file:
        classes = {int(row["slice"]): row["class"] for row in csv.DictReader(file)}
    for (name, _), number in SAMPLE_NUMBERS.items():
        assert classes[number] == name


def test_the_pipeline_says_what_was_run_and_its_text_stays_in_its_boxes(path):
    numbers = {"image_size": 100, "width": 0.25, "embedding_size": 4096, "dropout": 0.35}
    settings = load_settings("paper", {**numbers, "margin": 3.5, "scale": 64})
    figure = plot_pipeline(path, TITLE, settings, pretrained=False)
    assert_readable(figure, path)
    texts = "\n".join(text.get_text() for text in texts_of(figure))
    for words in ("100 x 100 x 3", "256 x 4 x 4", "random weights", "dropout 0.35", "dense 4096"):
        assert words in texts
    for words in ("m = 3.5, s = 64", "k = 1\n", "4096 numbers", "Training phase", "Testing phase"):
        assert words in texts
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [patch.get_window_extent(renderer) for patch in figure.findobj(FancyBboxPatch)]
    boxes = [box for box in boxes if box.width < figure.bbox.width / 2]
    inside = 0
    for text in texts_of(figure):
        extent = text.get_window_extent(renderer)
        for box in boxes:
            if box.contains(*extent.get_points().mean(0)):
                inside += 1
                assert box.x0 + 2 <= extent.x0 < extent.x1 <= box.x1 - 2, text
                assert box.y0 + 2 <= extent.y0 < extent.y1 <= box.y1 - 2, text
    assert inside == 16
    papers = plot_pipeline(path, "HSADML", load_settings("paper"), pretrained=True)
    texts = "\n".join(text.get_text() for text in texts_of(papers))
    for words in ("224 x 224 x 3", "1024 x 7 x 7", "ImageNet", "m = 5, s = 30"):
        assert words in texts


@pytest.mark.parametrize(("names", "epochs"), [(["one"], 1), (LONG_NAMES[:7], 275)])
def test_losses(path, names, epochs):
    runs = {name: [10.0 * (i + 1) / (1 + e) for e in range(epochs)] for i, name in enumerate(names)}
    figure = plot_losses(path, TITLE, runs)
    assert_readable(figure, path)
    assert len(figure.axes) == len(names)
    for axes, (name, losses) in zip(figure.axes, runs.items(), strict=True):
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, epochs + 1))
        np.testing.assert_array_equal(line.get_ydata(), losses)
        assert axes.get_ylim()[0] == 0
        assert_inside(axes, line.get_xydata())
        assert axes.get_title().replace("\n", " ") == name
        assert (line.get_marker() == "o") == (epochs == 1)


def test_a_diverged_run_is_drawn_as_far_as_it_went(path):
    assert_readable(plot_losses(path, "Losses", {"a": [3.0, math.inf, math.nan]}), path)


@pytest.mark.parametrize("names", [["one"], LONG_NAMES[:4]])
def test_confusions(path, names):
    perfect = np.diag([217, 422, 0])  # one class is missing
    figure = plot_confusions(path, TITLE, dict.fromkeys(names, perfect) | {"paper": PAPER_MATRIX})
    assert_readable(figure, path)
    *panels, paper, bar = figure.axes
    assert len(panels) == len(names)
    cells = [text.get_text() for text in paper.texts]
    assert cells[:3] == ["208\n95.9 %", "2\n0.9 %", "7\n3.2 %"]
    assert cells[8] == "279\n99.3 %"
    assert [text.get_text() for text in panels[0].texts][-1] == "0\n0.0 %"
    assert bar.get_ylabel() == "share of the true class"
    assert bar.get_ylim() == (0, 1)
    assert all(axes.images[0].get_clim() == (0, 1) for axes in [*panels, paper])


def test_cells_can_be_read(path):
    hits = (0, 50, 60, 70, 80, 100)
    counts = {f"{hit} %": np.array([[hit, 100 - hit, 0], [0, 9, 0], [0, 0, 9]]) for hit in hits}
    *panels, _ = plot_confusions(path, "a", counts).axes
    for hit, axes in zip(hits, panels, strict=True):
        image = axes.images[0]
        ground = luminance(image.cmap(image.norm(hit / 100))[:3])
        ink = luminance(axes.texts[0].get_color())
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4.5, hit


def test_tsne_keeps_groups_by_direction_together_whatever_the_lengths():
    generator = np.random.default_rng(0)
    labels = np.arange(48) % 3
    embeddings = np.eye(8)[labels] + generator.normal(0, 0.05, (48, 8))
    points = compute_tsne(embeddings, 0)
    assert points.shape == (48, 2)
    # Powers of two change no direction, not even in its last bit.
    lengths = 2.0 ** generator.integers(-9, 9, (48, 1))
    np.testing.assert_array_equal(points, compute_tsne(lengths * embeddings, 0))
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).all()


@pytest.mark.parametrize(("count", "perplexity"), [(91, 30), (100, 30), (16, 5)])
def test_tsne_is_set_as_the_docstring_says(monkeypatch, count, perplexity):
    made = {}

    class Spy:
        def __init__(self, **settings):
            made.update(settings)

        def fit_transform(self, embeddings):
            np.testing.assert_allclose(np.square(embeddings).sum(1), 1, rtol=1e-6)
            return embeddings[:, :2]

    monkeypatch.setattr(paper, "TSNE", Spy)
    compute_tsne(np.random.default_rng(0).normal(size=(count, 4)), 7)
    expected = {"metric": "cosine", "init": "pca", "perplexity": perplexity, "random_state": 7}
    assert made == expected


@pytest.mark.parametrize("count", [2, 3, 5])
def test_tsne_of_a_few(count):
    points = compute_tsne(np.random.default_rng(0).normal(size=(count, 4)), 0)
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.ones((1, 4)), r"at least 2 x 2, not \(1, 4\)"),
        (np.ones((4, 1)), r"at least 2 x 2, not \(4, 1\)"),
        (np.ones(4), r"not \(4,\)"),
        (np.array([[0, np.nan], [1, 2]]), "finite"),
    ],
)
def test_tsne_refuses(embeddings, message):
    with pytest.raises(UserError, match=message):
        compute_tsne(embeddings, 0)


@pytest.mark.parametrize("names", [["one"], LONG_NAMES])
def test_tsne_panels_show_every_point_in_its_classs_colour_and_ring_errors(path, names):
    generator = np.random.default_rng(0)
    labels = np.array([0] * 7 + [2] * 5)  # no glioma
    wrong = np.arange(12) < 2
    panels = {name: Embedded(generator.normal(size=(12, 2)), labels, wrong) for name in names}
    figure = plot_tsne(path, TITLE, panels)
    assert_readable(figure, path)
    for axes, panel in zip(figure.axes, panels.values(), strict=True):
        assert [len(c.get_offsets()) for c in axes.collections[:3]] == [7, 0, 5]
        np.testing.assert_array_equal(axes.collections[2].get_offsets(), panel.points[7:])
        assert to_rgb(axes.collections[2].get_facecolor()[0, :3]) == to_rgb("#009E73")
        assert_inside(axes, panel.points)
        np.testing.assert_array_equal(axes.collections[3].get_offsets(), panel.points[:2])
        assert len(axes.collections[3].get_facecolor()) == 0
    assert legend_texts(figure.legends[0]) == [*CLASS_NAMES, "misclassified"]


def test_classes_differ_in_shape_and_have_the_papers_colours():
    assert len({style["marker"] for style in CLASS_STYLES}) == 3
    # Okabe and Ito's blue, orange and bluish green.
    assert [style["color"] for style in CLASS_STYLES] == ["#0072B2", "#E69F00", "#009E73"]


def test_scores_show_points_intervals_and_numbers(path):
    scores = [
        Score("ours", 0.9878, (0.978, 0.993)),
        Score("the paper", 0.9869, (0.9773, 0.9925), "the paper"),
        Score(
            LONG_NAMES[0] + ", 70-30 by slice, as cited by another", 0.9423, None, "cited", False
        ),
    ]
    figure = plot_scores(path, TITLE, scores)
    assert_readable(figure, path)
    (axes,) = figure.axes
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_xydata()[0].tolist() for line in dots] == [
        [98.78, 0],
        [98.69, 1],
        [94.23, 2],
    ]
    assert [line.get_markerfacecolor() for line in dots] == ["#0072B2", "#D55E00", "white"]
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose([line.get_xdata() for line in bars], [[97.8, 99.3], [97.73, 99.25]])
    assert axes.get_xlim()[0] == 90
    assert axes.get_xlabel() == "accuracy (%), from 90 on"
    assert [text.get_text() for text in axes.texts] == [
        "98.8 (97.8 to 99.3)",
        "98.7 (97.7 to 99.2)",
        "94.2",
    ]
    labels = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
    assert labels == [score.label for score in scores]
    assert axes.get_ylim() == (2.5, -0.5)  # the first on top
    assert legend_texts(figure.legends[0]) == ["ours", "the paper", "cited", "hollow: from memory"]


@pytest.mark.parametrize(
    ("accuracies", "start", "label"),
    [
        ([1.0], 95, "accuracy (%), from 95 on"),
        ([0.952, 1.0], 90, "accuracy (%), from 90 on"),
        ([0.0, 0.5], 0, "accuracy (%)"),
    ],
)
def test_where_the_axis_of_scores_starts(path, accuracies, start, label):
    figure = plot_scores(path, "Scores", [Score("a", accuracy) for accuracy in accuracies])
    assert_readable(figure, path)
    low, high = figure.axes[0].get_xlim()
    assert low == start
    assert high > 100
    assert figure.axes[0].get_xlabel() == label


def test_many_scores(path):
    scores = [Score(name, 0.9 + i / 200, (0.89, 0.99)) for i, name in enumerate(LONG_NAMES)]
    assert_readable(plot_scores(path, TITLE, scores), path)


def test_roc_states_the_area_and_shows_every_threshold(path):
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 200)
    scores = np.eye(3)[truth] + generator.normal(0, 0.6, (200, 3))
    figure = plot_roc(path, TITLE, truth, scores)
    assert_readable(figure, path)
    whole, corner = figure.axes
    assert legend_texts(whole.get_legend()) == [
        f"{name}, AUC {roc_auc_score(truth == i, scores[:, i]):.4f}"
        for i, name in enumerate(CLASS_NAMES)
    ]
    assert len({line.get_linestyle() for line in corner.lines}) == 3
    for one, other in zip(whole.lines, corner.lines, strict=False):
        np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
        assert_inside(whole, one.get_xydata())
    for i, line in enumerate(whole.lines[:3]):  # one threshold, counted by hand
        chosen = scores[:, i] >= 0.5
        rates = [chosen[truth != i].mean(), chosen[truth == i].mean()]
        assert np.abs(line.get_xydata() - rates).sum(1).min() < 1e-12
    assert corner.get_xlim()[1] == 0.1
    assert corner.get_ylim()[0] == 0.9


def test_roc_without_a_class(path):
    figure = plot_roc(path, "ROC", np.array([0, 0, 1, 1]), np.eye(3)[[0, 0, 1, 1]])
    assert_readable(figure, path)
    assert legend_texts(figure.axes[0].get_legend()) == [
        "meningioma, AUC 1.0000",
        "glioma, AUC 1.0000",
        "pituitary: no curve, of one kind only",
    ]


def test_reliability(path):
    count = np.array([0, 3, 0, 40, 900])
    confidence = np.array([np.nan, 0.3, np.nan, 0.7, 0.99])
    accuracy = np.array([np.nan, 0.0, np.nan, 0.8, 1.0])
    figure = plot_reliability(path, TITLE, confidence, accuracy, count, 0.01234)
    assert_readable(figure, path)
    upper, lower = figure.axes
    (line,) = (line for line in upper.lines if line.get_label() == "slices")
    np.testing.assert_array_equal(line.get_xydata(), [[0.3, 0], [0.7, 0.8], [0.99, 1]])
    assert_inside(upper, line.get_xydata())
    assert upper.get_title() == "expected calibration error 1.23 %"
    bars = [(round(bar.get_x(), 9), bar.get_height()) for bar in lower.patches]
    assert bars == [(0, 0), (0.2, 3), (0.4, 0), (0.6, 40), (0.8, 900)]
    assert lower.get_ylim()[1] >= 900
    assert upper.get_position().height > 1.5 * lower.get_position().height
    gaps = [segment[:, 1].tolist() for segment in upper.collections[0].get_segments()]
    np.testing.assert_allclose(gaps, [[0, 0.3], [0.7, 0.8], [0.99, 1]])


def test_reliability_of_nothing(path):
    empty = np.full(10, np.nan)
    assert_readable(plot_reliability(path, "a", empty, empty, np.zeros(10, int), 0.0), path)


def make_angles(count, labels=(0, 1, 2)):
    generator = np.random.default_rng(count)
    target, other = generator.uniform(0, 1.8, count), generator.uniform(1, 2.5, count)
    return Angles(target, other, generator.choice(labels, count), target > other)


def test_angles(path):
    train, test = make_angles(60), make_angles(40, labels=(0, 2))  # no glioma is tested
    figure = plot_angles(path, TITLE, test, train, lambda angles: 3 * angles)
    assert_readable(figure, path)
    for label, axes in enumerate(figure.axes):
        assert axes.get_title() == CLASS_NAMES[label]
        *sides, crosses = axes.collections
        own = test.labels == label
        np.testing.assert_array_equal(
            sides[-1].get_offsets(), np.c_[test.target[own], test.other[own]]
        )
        assert len(sides) == 2
        assert len(sides[0].get_offsets()) == (train.labels == label).sum()
        assert sides[0].get_alpha() < sides[1].get_alpha()
        wrong = own & test.wrong
        np.testing.assert_array_equal(
            crosses.get_offsets(), np.c_[test.target[wrong], test.other[wrong]]
        )
        assert_inside(axes, points_of(axes.collections))
        diagonal, margin = (line.get_xydata() for line in axes.lines)
        np.testing.assert_array_equal(diagonal[:, 0], diagonal[:, 1])
        drawn = margin[np.isfinite(margin[:, 1])]
        np.testing.assert_allclose(drawn[:, 1], 3 * drawn[:, 0])
        assert drawn[:, 1].max() <= math.pi
        assert drawn[:, 0].max() == pytest.approx(math.pi / 3, abs=0.01)
    (degrees,) = figure.axes[-1].child_axes
    radians = figure.axes[-1].get_ylim()
    assert degrees.get_ylim() == pytest.approx(tuple(180 / math.pi * r for r in radians))
    assert legend_texts(figure.legends[0])[3:] == [
        "misclassified",
        "equal angles",
        "with the margin",
    ]
    assert test.wrong.any()


def test_angles_up_to_pi(path):
    far = Angles(np.array([math.pi]), np.array([0.0]), np.array([1]), np.array([True]))
    figure = plot_angles(path, "Angles", far, far, lambda angles: angles)
    assert_readable(figure, path)
    assert figure.axes[1].get_xlim() == (0, math.pi)


@pytest.mark.parametrize("names", [["one"], LONG_NAMES])
def test_slice_and_patient(path, names):
    ways = ("split by slice", "split by patient", "split by patient, vote of a patient's slices")
    losses = {name: dict.fromkeys(ways, (0.96, 0.94, 0.97)) for name in names}
    losses["without a vote"] = {ways[0]: (0.99, 0.98, 1.0), ways[1]: (0.81, 0.8, 0.85)}
    figure = plot_slice_and_patient(path, TITLE, losses)
    assert_readable(figure, path)
    (axes,) = figure.axes
    dots = np.array([line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 1])
    assert len(dots) == 3 * len(names) + 2
    np.testing.assert_allclose(dots[-2:, 0], [99, 81])
    np.testing.assert_array_equal(dots[-2:, 1].round(), len(names))
    assert dots[-2, 1] < dots[-1, 1]
    assert len({tuple(dot) for dot in dots}) == len(dots)
    assert_inside(axes, dots)
    assert axes.get_xlim()[0] == 75
    assert legend_texts(figure.legends[0]) == list(ways)


def test_budget_marks_its_own_point_between_its_limits(path):
    runs = {24: [0.972, 0.974, 0.979], 3: [0.93], 275: [0.985, 0.986]}
    figure = plot_budget(path, TITLE, runs, 24, 0.9869)
    assert_readable(figure, path)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert list(lines) == legend_texts(figure.legends[0])
    assert lines["the paper, 98.69 %"][:, 1].tolist() == [98.69, 98.69]
    np.testing.assert_allclose(lines["mean of the seeds"], [[3, 93], [24, 97.5], [275, 98.55]])
    np.testing.assert_allclose(lines["this budget: 24 epochs, 97.50 %"], [[24, 97.5]])
    assert len(lines["one seed"]) == 6
    assert_inside(axes, lines["one seed"])
    assert axes.get_ylim()[0] == 90
    assert axes.get_ylabel() == "accuracy (%), from 90 on"


def test_budget_of_one_long_run_far_below_the_paper(path):
    figure = plot_budget(path, "A", {589_600: [0.4]}, 589_600, 0.9869)
    assert_readable(figure, path)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epochs"
    assert axes.get_ylim()[0] == 35
    assert "this budget: 589,600 epochs, 40.00 %" in legend_texts(figure.legends[0])


@pytest.mark.parametrize("names", [["by slice"], ["by slice", "perfect"], LONG_NAMES[:6]])
def test_errors_count_each_kind(path, names):
    confusions = dict.fromkeys(names, PAPER_MATRIX)
    if "perfect" in names:
        confusions["perfect"] = np.diag([1, 2, 3])
    figure = plot_errors(path, TITLE, confusions)
    assert_readable(figure, path)
    (axes,) = figure.axes
    cells = np.array([text.get_text() for text in axes.texts]).reshape(6, -1)
    # meningioma to glioma and pituitary, glioma to the others, pituitary to the others
    expected = ["2  (17 %)", "7  (58 %)", "1  (8 %)", "0", "2  (17 %)", "0"]
    assert cells[:, 0].tolist() == expected
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert rows[:2] == ["meningioma → glioma", "meningioma → pituitary"]
    assert rows[4:] == ["pituitary → meningioma", "pituitary → glioma"]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    assert columns[0].endswith("\n12 wrong of 920")
    if "perfect" in names:
        assert cells[:, 1].tolist() == ["0"] * 6
        assert columns[1] == "perfect\n0 wrong of 6"
    np.testing.assert_allclose(axes.images[0].get_array()[:, 0], np.array([2, 7, 1, 0, 2, 0]) / 12)


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        plot_confusions(tmp_path / name, "A", {"a": PAPER_MATRIX})
    one, two = (tmp_path / name for name in ("one.png", "two.png"))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(tmp_path.iterdir()) == [one, two]
