"""PML's face against PML 2.9 itself: values, gradients, state, and everything that calls a loss."""

import copy
import importlib
import math
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed

import angular_losses
from angular_losses import arcface, margin_softmax_loss, parameter_groups
from angular_losses.diagnostics import AngularMonitor
from angular_losses.losses.usage_warnings import FORGOTTEN_AFTER
from tests.profiling import peak_bytes

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is missing")


def of_pml(*names):
    return (importlib.import_module(f"pytorch_metric_learning.{name}") for name in names)


theirs, distances, miners, reducers = of_pml("losses", "distances", "miners", "reducers")
regularizers, testers, trainers = of_pml("regularizers", "testers", "trainers")
accuracy, inference = of_pml("utils.accuracy_calculator", "utils.inference")
pairing, wrappers = of_pml("utils.loss_and_miner_utils", "utils.distributed")
ours = importlib.import_module("angular_losses.integrations.pytorch_metric_learning")

pytestmark = [  # PML's own
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning"),
]

CLASSES, SIZE, ROWS = 5, 3, 24
CASES = [
    ("ArcFaceLoss", {}),
    ("ArcFaceLoss", {"margin": 80, "scale": 7}),
    ("CosFaceLoss", {}),
    ("ArcFaceLoss", {"margin": -20, "scale": 7}),
    ("CosFaceLoss", {"margin": 0.1, "scale": 30}),
    ("CosFaceLoss", {"margin": -0.1, "scale": np.float32(30)}),
    ("SphereFaceLoss", {}),
    ("SphereFaceLoss", {"margin": 3, "scale": 5}),
    ("LargeMarginSoftmaxLoss", {}),
    ("LargeMarginSoftmaxLoss", {"margin": 2, "scale": 5}),
    ("SubCenterArcFaceLoss", {}),
    ("SubCenterArcFaceLoss", {"margin": 10, "scale": 20, "sub_centers": 2}),
    ("NormalizedSoftmaxLoss", {}),
    ("NormalizedSoftmaxLoss", {"temperature": 0.3}),
    ("NormalizedSoftmaxLoss", {"distance": distances.CosineSimilarity()}),
    ("NormalizedSoftmaxLoss", {"distance": distances.CosineSimilarity(power=3)}),
    (
        "NormalizedSoftmaxLoss",
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    ),
    ("NormalizedSoftmaxLoss", {"distance": distances.LpDistance()}),
]
NAMES = ["-".join([name, *map(str, options.values())]) for name, options in CASES]
EACH = [case for case in CASES if not case[1]]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)
each_class = pytest.mark.parametrize("name", [name for name, _ in EACH])


def pair(name, seed=0, **options):
    """PML's loss and ours, made with the same seed: the state is the same before it is loaded."""
    made = []
    for module in (theirs, ours):
        torch.manual_seed(seed)
        made.append(getattr(module, name)(num_classes=CLASSES, embedding_size=SIZE, **options))
    assert torch.equal(made[0].W, made[1].W)
    return made


def batch(dtype=torch.float64, seed=0, rows=ROWS, size=SIZE):
    torch.manual_seed(seed)
    embeddings = (3 * torch.randn(rows, size, dtype=torch.float64)).to(dtype)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (rows,))


def results(loss, embeddings, *arguments):
    value = loss(embeddings, *arguments)
    weight = loss.W if hasattr(loss, "W") else loss.weight
    return value.detach(), *torch.autograd.grad(value.sum(), (embeddings, weight))


def assert_equal(first, second, embeddings, *arguments, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-9}
    expected = results(first, embeddings, *arguments)
    torch.testing.assert_close(results(second, embeddings, *arguments), expected, **tolerance)
    assert all(tensor.count_nonzero() for tensor in expected)


@pytest.mark.parametrize(("name", "options"), EACH)
def test_a_loss_runs_where_there_are_no_values(name, options):
    loss = getattr(ours, name)(num_classes=CLASSES, embedding_size=SIZE, **options).to("meta")
    embeddings = torch.empty(ROWS, SIZE, device="meta", requires_grad=True)
    loss(embeddings, torch.empty(ROWS, device="meta", dtype=torch.int64)).backward()
    assert embeddings.grad.shape == embeddings.shape
    assert loss.get_logits(embeddings).shape == (ROWS, CLASSES)


@every_case
@pytest.mark.parametrize("seed", range(5))
def test_values_and_gradients_are_pmls_in_float64(name, options, seed):
    assert_equal(*pair(name, seed, **options), *batch(seed=seed))


@every_case
def test_values_and_gradients_are_pmls_in_float32(name, options):
    assert_equal(*pair(name, **options), *batch(torch.float32), rtol=2e-4, atol=2e-4)


def test_some_rows_are_past_the_kink():
    loss, (embeddings, labels) = pair("ArcFaceLoss", margin=80)[1], batch()
    theta = loss.get_logits(embeddings).gather(1, labels[:, None]).div(loss.scale).acos()
    assert 0 < (theta + loss.margin > math.pi).sum() < ROWS


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_pmls(name, options, dtype):
    first, second = (loss.to(dtype) for loss in pair(name, **options))
    embeddings, _ = batch(dtype)
    torch.testing.assert_close(second.get_logits(embeddings), first.get_logits(embeddings))


@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.SumReducer(),
        reducers.ThresholdReducer(low=5, high=60),
        reducers.AvgNonZeroReducer(),
        reducers.PerAnchorReducer(),
        reducers.ClassWeightedReducer(torch.arange(1.0, CLASSES + 1)),
        reducers.MultipleReducers({"loss": reducers.SumReducer()}),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
@each_class
def test_reducers(name, reducer):
    assert_equal(*pair(name, reducer=reducer), *batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_pml_rounds_to_0_do_not_count(dtype):
    options = {"margin": 5, "scale": 400, "reducer": reducers.AvgNonZeroReducer()}
    first, second = (loss.to(dtype) for loss in pair("ArcFaceLoss", **options))
    embeddings, labels = batch(dtype)
    with torch.no_grad():
        embeddings[:20] = first.W.t()[labels[:20]] + 1e-2 * embeddings[:20]
        rows = margin_softmax_loss(
            embeddings,
            first.W.t().double(),
            labels,
            margin=lambda theta: arcface(theta, first.margin),
            scale=400.0,
            reduction="none",
        )
    assert 4 < ((rows > 0) & (rows < 1e-16)).sum() < ROWS
    assert_equal(first, second, embeddings, labels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_sizes_may_be_numpys(integer):
    loss = ours.SubCenterArcFaceLoss(integer(200), integer(3), np.float32(28.6), sub_centers=3)
    assert loss.W.shape == (3, 600)
    assert loss.margin == pytest.approx(math.radians(28.6))


@each_class
def test_the_forgotten_centres_are_warned_of(name):
    loss, network = pair(name)[1], torch.nn.Linear(SIZE, SIZE).double()
    embeddings, labels = batch()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(FORGOTTEN_AFTER):
        loss(network(embeddings.detach()), labels).backward()
        optimiser.step()
    loss(network(embeddings.detach()), labels).backward()
    with pytest.warns(UserWarning, match=rf"W: the class centres of {name} have not changed"):
        optimiser.step()


def test_parameter_groups_know_these_losses():
    network = torch.nn.Linear(2, 3)
    for name, _ in EACH:
        loss = pair(name)[1]
        groups = parameter_groups(network, loss, lr=0.1, weight_decay=0.5)
        assert [len(group["params"]) for group in groups] == [2, 1]
        assert groups[1]["params"][0] is loss.W
        assert groups[1]["weight_decay"] == 0


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SubCenterArcFaceLoss", "CosFaceLoss"])
def test_a_monitor_gives_the_metrics_of_the_same_loss_here(name):
    of_pml = pair(name)[1]
    options = {"beyond": "linear"} if "Arc" in name else {}
    own = getattr(angular_losses, name)(CLASSES, SIZE, of_pml.margin, **options).double()
    with torch.no_grad():
        own.weight.copy_(of_pml.W.t())
    embeddings, labels = batch()
    summaries = []
    for loss in (own, of_pml):
        monitor = AngularMonitor(loss)
        with monitor.attach():
            loss(embeddings, labels).backward()
        summaries.append(monitor.summary(centres=True))
    assert summaries[1] == pytest.approx(summaries[0], rel=1e-6)
    assert summaries[1]["gradient_norm_max"] > 0


def test_a_monitor_of_p2sgrad():
    loss, (embeddings, labels) = ours.P2SGradLoss(SIZE, CLASSES), batch(torch.float32)
    monitor = AngularMonitor(loss)
    with monitor.attach():
        loss(embeddings, labels).backward()
    assert monitor.summary()["margin_mean"] == pytest.approx(0, abs=1e-6)
    assert monitor.summary()["gradient_norm_max"] > 0


@pytest.mark.parametrize("name", ["ArcFaceLoss", "LargeMarginSoftmaxLoss", "P2SGradLoss"])
def test_a_monitor_follows_the_embeddings_to_their_device(name, monkeypatch):
    def cast_types(self, dtype, device):  # the data of a parameter cannot move to the meta device
        if self._centres.device != device:
            setattr(self, self._centres_name, torch.nn.Parameter(self._centres.to(device, dtype)))

    monkeypatch.setattr(getattr(ours, name), "cast_types", cast_types)
    sizes = (SIZE, CLASSES) if name == "P2SGradLoss" else (CLASSES, SIZE)
    loss, (embeddings, labels) = getattr(ours, name)(*sizes), batch(torch.float32)
    monitor = AngularMonitor(loss)
    with monitor.attach():
        loss(embeddings.detach().to("meta").requires_grad_(), labels).backward()
    assert monitor._sums.device.type == monitor.loss._centres.device.type == "meta"


def test_a_call_without_labels_says_so_under_a_monitor():
    loss = ours.ArcFaceLoss(CLASSES, SIZE)
    with AngularMonitor(loss).attach(), pytest.raises(TypeError, match="labels: expected"):
        loss(torch.randn(4, SIZE))


@each_class
def test_the_loss_dict_is_pmls(name):
    embeddings, labels = batch()
    first, second = (
        loss(embeddings, labels) for loss in pair(name, reducer=reducers.DoNothingReducer())
    )
    assert first.keys() == second.keys() == {"loss"}
    first, second = first["loss"], second["loss"]
    assert second["reduction_type"] == first["reduction_type"]
    assert torch.equal(second["indices"], first["indices"])
    torch.testing.assert_close(second["losses"], first["losses"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "mine",
    [
        miners.MultiSimilarityMiner(),
        miners.TripletMarginMiner(margin=0.2),
        lambda embeddings, labels: pairing.get_all_pairs_indices(labels[:7]),
        lambda embeddings, labels: 3 * (torch.tensor([], dtype=torch.long),),
    ],
    ids=["pairs", "triplets", "a part", "nothing"],
)
@each_class
def test_miners_weigh_the_rows(name, mine):
    embeddings, labels = batch()
    assert_equal(*pair(name), embeddings, labels, mine(embeddings.detach(), labels))


@pytest.mark.parametrize(
    "regularizer",
    [
        regularizers.RegularFaceRegularizer(),
        regularizers.CenterInvariantRegularizer(),
        regularizers.LpRegularizer(),
        regularizers.ZeroMeanRegularizer(),
    ],
    ids=lambda regularizer: type(regularizer).__name__,
)
@each_class
def test_weight_regularizers(name, regularizer):
    first, second = pair(name, weight_regularizer=regularizer, weight_reg_weight=3.0)
    assert_equal(first, second, *batch())
    assert second.sub_loss_names() == first.sub_loss_names() == ["loss", "weight_reg_loss"]
    assert_differs(second, pair(name)[1])


def test_the_regularizer_of_sub_centres():
    regularizer = regularizers.SparseCentersRegularizer(CLASSES, 3)
    assert_equal(*pair("SubCenterArcFaceLoss", weight_regularizer=regularizer), *batch())


@each_class
def test_embedding_regularizers(name):
    options = {
        "embedding_regularizer": regularizers.LpRegularizer(),
        "embedding_reg_weight": 0.7,
        "weight_regularizer": regularizers.LpRegularizer(),
    }
    first, second = pair(name, **options)
    assert_equal(first, second, *batch())
    assert second.sub_loss_names() == first.sub_loss_names()
    assert len(second.sub_loss_names()) == 3


def assert_differs(first, second):
    embeddings, labels = batch()
    assert first(embeddings, labels) != second(embeddings, labels)


def test_weights_are_drawn_as_asked():
    def init(weight):
        return torch.nn.init.constant_(weight, 0.25)

    assert (pair("ArcFaceLoss", weight_init_func=init)[1].W == 0.25).all()


def test_multiple_losses_with_their_miners():
    embeddings, labels = batch()
    totals = []
    for loss in pair("ArcFaceLoss"):
        several = theirs.MultipleLosses(
            [loss, theirs.TripletMarginLoss()], [miners.MultiSimilarityMiner(), None], [0.3, 2.0]
        )
        totals.append(several(embeddings, labels))
    torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-9)


@each_class
def test_cross_batch_memory_takes_none_of_these_losses(name):
    for loss in pair(name):
        with pytest.raises(Exception, match=f"CrossBatchMemory not supported for {name}"):
            theirs.CrossBatchMemory(loss, SIZE)


@each_class
def test_the_distributed_wrapper(name):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        embeddings, labels = batch()
        values = [wrappers.DistributedLossWrapper(loss)(embeddings, labels) for loss in pair(name)]
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


def test_a_trainer_and_a_tester():
    labels = torch.arange(60) % CLASSES
    torch.manual_seed(0)
    points = torch.randn(60, 8, dtype=torch.float64) + 3 * torch.eye(8)[labels]
    dataset = torch.utils.data.TensorDataset(points, labels)
    trained = []
    for loss in pair("ArcFaceLoss", scale=10):
        torch.manual_seed(0)
        models = {"trunk": torch.nn.Linear(8, SIZE).double()}
        before = loss(models["trunk"](points), labels).item()
        parameters = {"trunk": models["trunk"].parameters(), "metric_loss": loss.parameters()}
        trainers.MetricLossOnly(
            models,
            {f"{key}_optimizer": torch.optim.Adam(of, 0.05) for key, of in parameters.items()},
            6,
            {"metric_loss": loss},
            dataset,
            mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
            data_device="cpu",
            dataloader_num_workers=0,
        ).train(num_epochs=2)
        calculator = accuracy.AccuracyCalculator(
            include=("precision_at_1",),
            k=1,
            knn_func=inference.CustomKNN(distances.CosineSimilarity()),
        )
        tester = testers.GlobalEmbeddingSpaceTester(
            accuracy_calculator=calculator, dataloader_num_workers=0, data_device="cpu"
        )
        tester.test({"val": dataset}, 0, models["trunk"])
        precision = tester.all_accuracies["val"]["precision_at_1_level0"]
        assert loss(models["trunk"](points), labels) < before / 2
        trained.append((loss.W.detach(), models["trunk"].weight.detach(), precision))
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-6)
    assert trained[1][2] > 2 / CLASSES


@every_case
def test_state_fits_both_ways(name, options):
    first, second = pair(name, **options)
    assert list(second.state_dict()) == list(first.state_dict()) == ["W"]
    torch.nn.init.normal_(second.W)
    first.load_state_dict(second.state_dict())
    assert_equal(first, second, *batch())
    torch.nn.init.normal_(first.W)
    second.load_state_dict(first.state_dict())
    assert_equal(first, second, *batch())


@each_class
def test_copies_and_pickles(name):
    embeddings, labels = batch()
    second = pair(name, weight_regularizer=regularizers.LpRegularizer())[1]
    for twin in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert torch.equal(twin(embeddings, labels), second(embeddings, labels))
        assert twin.W is not second.W


@each_class
def test_what_is_recorded(name):
    first, second = pair(name, collect_stats=True)
    embeddings, labels = batch()
    for loss in (first, second):
        loss.distance = distances.CosineSimilarity(collect_stats=True)
        loss(embeddings, labels)
    assert set(second._record_these) == set(first._record_these)
    for key in getattr(first, "_record_these_stats", []):
        assert getattr(second, key) == pytest.approx(getattr(first, key), rel=1e-9)
    for key in ("initial_avg_query_norm", "initial_avg_ref_norm", "final_avg_query_norm"):
        expected = getattr(first.distance, key)
        if name != "NormalizedSoftmaxLoss" or "ref" not in key:  # PML's centres are unit there
            assert getattr(second.distance, key) == pytest.approx(expected, rel=1e-9)
    assert 30 < second.avg_angle < 150
    assert not hasattr(pair(name)[1], "avg_angle")


def test_settings_are_pmls():
    for name, options in CASES:
        first, second = pair(name, **options)
        for key in first._record_these:
            if name != "NormalizedSoftmaxLoss" or key == "temperature":  # PML has 0 for its sizes
                assert getattr(second, key) == getattr(first, key)
    assert ours.ArcFaceLoss(2, 3).margin == pytest.approx(math.radians(28.6))
    sub_centers = ours.SubCenterArcFaceLoss(2, 3, 10, 5, 4)
    assert sub_centers.W.shape == (3, 8)
    assert (sub_centers.margin, sub_centers.scale) == (math.radians(10), 5)


def test_names_of_pml_are_here_too():
    assert ours.TripletMarginLoss is theirs.TripletMarginLoss
    assert ours.WeightRegularizerMixin is theirs.WeightRegularizerMixin
    assert isinstance(ours.ArcFaceLoss(2, 3), theirs.BaseMetricLossFunction)
    with pytest.raises(AttributeError, match="NoSuchLoss"):
        _ = ours.NoSuchLoss
    assert set(ours.__all__) == {name for name in vars(theirs) if not name.startswith("_")}
    assert not hasattr(ours, "__path__")  # it is a module, though PML's is a package


# What PML does not do, or not well


@each_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_storage(name, dtype):
    first, second = pair(name)
    embeddings, labels = batch(dtype)
    value, of_embeddings, of_weight = results(second, embeddings, labels)
    assert second.W.dtype == of_weight.dtype == of_embeddings.dtype == dtype
    assert value.dtype == second.get_logits(embeddings).dtype == torch.float32
    first.W.data = second.W.data.double()
    precise = embeddings.detach().double().requires_grad_()
    expected = results(first, precise, labels)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    found = (of_embeddings.double(), of_weight.double())
    for gradient, reference in zip(found, expected[1:], strict=True):
        error = (gradient - reference).abs().max() / reference.abs().max()
        assert error < 4 * eps


@each_class
def test_autocast_leaves_the_weight_alone(name):
    second = pair(name)[1]
    embeddings, labels = batch(torch.float32)
    expected = results(second, embeddings, labels)
    assert second.W.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(second, embeddings, labels)
        second(embeddings.bfloat16(), labels)
        logits = second.get_logits(embeddings)
    assert second.W.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert torch.equal(logits, second.get_logits(embeddings))
    second(embeddings.double(), labels)
    assert second.W.dtype == torch.float64


@pytest.mark.parametrize("name", ["ArcFaceLoss", "SubCenterArcFaceLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7])
def test_gradients_at_small_angles(name, dtype, angle):
    second = pair(name)[1].to(dtype)
    labels = torch.zeros(1, dtype=torch.long)
    second.W.data.fill_(1.0)
    second.W.data[:, : CLASSES - 1] = torch.tensor([[1.0], [0.0], [0.0]])
    embeddings = torch.tensor([[1.0, angle, 0.0]], dtype=dtype, requires_grad=True)
    _, of_embeddings, _ = results(second, embeddings, labels)
    assert of_embeddings.isfinite().all()
    assert of_embeddings.abs().sum() > 1e-3


@each_class
def test_zero_and_huge_rows(name):
    second = pair(name)[1]
    embeddings, labels = batch(torch.float32)
    with torch.no_grad():
        embeddings[0] = 0
        if name not in ("SphereFaceLoss", "LargeMarginSoftmaxLoss"):  # there the length counts
            embeddings[1] *= 1e30
        else:
            embeddings[1] *= 1e15
    value, of_embeddings, of_weight = results(second, embeddings, labels)
    assert value.isfinite()
    assert of_embeddings.isfinite().all()
    assert of_weight.isfinite().all()
    assert of_embeddings[0].abs().max() < 1e3


@pytest.mark.parametrize("name", ["SphereFaceLoss", "LargeMarginSoftmaxLoss"])
def test_margins_need_not_be_integers(name):
    values = [
        getattr(ours, name)(CLASSES, SIZE, margin=margin).target(
            torch.tensor([0.5], dtype=torch.float64), torch.tensor([0])
        )
        for margin in (1, 1.5, 2)
    ]
    assert values[0] != values[1] != values[2]
    if name == "SphereFaceLoss":
        assert [value.item() for value in values] == pytest.approx(
            [math.cos(0.5 * margin) for margin in (1, 1.5, 2)]
        )


@pytest.mark.parametrize("threshold", [20, 45, 75])
def test_outliers(threshold):
    first, second = pair("SubCenterArcFaceLoss")
    embeddings, labels = batch()
    labels = labels % (CLASSES - 1)  # the last class has none
    expected, centres = first.get_outliers(embeddings, labels, threshold)
    outliers, dominant = second.get_outliers(embeddings, labels.byte(), threshold)
    assert 0 < len(outliers) < ROWS
    assert torch.equal(outliers, expected)
    assert torch.equal(dominant[:, :-1], centres[:, :-1])  # PML's last column is uninitialised
    assert torch.equal(dominant[:, -1], second.W[:, -3])
    alone = second.get_outliers(embeddings, labels, threshold, return_dominant_centers=False)
    assert torch.equal(alone, expected)
    none = second.get_outliers(embeddings, labels, 180, return_dominant_centers=False)
    assert none.dtype == torch.int64
    assert none.numel() == 0


@each_class
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_every_integer_type(name, dtype):
    embeddings, labels = batch()
    second = pair(name)[1]
    expected = second(embeddings, labels)
    assert torch.equal(second(embeddings, labels.to(dtype)), expected)


def test_no_logits_are_held():
    rows, classes = 512, 4096
    loss = ours.ArcFaceLoss(classes, 8, mode="recompute", memory_budget=3 * 2**20)
    embeddings, labels = batch(torch.float32, rows=rows, size=8)
    assert peak_bytes(lambda: loss(embeddings, labels).backward()) < rows * classes * 4 / 2


@each_class
def test_second_derivatives_in_the_dense_mode(name):
    embeddings, labels = batch()
    first, second = pair(name)
    second.mode = "dense"
    found = []
    for loss in (first, second):
        (gradient,) = torch.autograd.grad(loss(embeddings, labels), embeddings, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), embeddings))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)
    assert found[0][0].count_nonzero()


def test_a_loss_of_ones_own():
    class Quadratic(ours.CosFaceLoss):
        def target(self, theta, labels):
            return theta.cos() - 0.1 * theta**2

    loss = Quadratic(CLASSES, SIZE)
    embeddings, labels = batch()
    expected = margin_softmax_loss(
        embeddings,
        loss.W.t().double(),
        labels,
        margin=lambda theta: theta.cos() - 0.1 * theta**2,
        scale=64.0,
    )
    assert loss(embeddings, labels).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("hook", ["modify_cosine_of_target_classes", "get_cosine", "scale_logits"])
def test_hooks_that_would_not_be_called_are_refused(hook):
    with pytest.raises(TypeError, match=f"{hook}: Own defines it, but only target"):
        type("Own", (ours.ArcFaceLoss,), {hook: lambda self, *arguments: arguments})


# P2SGrad


def p2s_pair():
    made = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        made.append(module.P2SGradLoss(SIZE, CLASSES))
    torch.testing.assert_close(made[1].weight, made[0].weight, rtol=1e-6, atol=1e-6)
    return made


def test_p2s_grad_trains_as_pmls():
    first, second = p2s_pair()
    assert list(second.state_dict()) == ["weight"]
    second.load_state_dict(first.state_dict())
    embeddings, labels = batch()
    optimisers = [torch.optim.SGD(loss.parameters(), lr=5.0) for loss in (first, second)]
    for _ in range(3):
        # torch.renorm, which PML uses, adds 1e-7 to the length
        assert_equal(first, second, embeddings, labels, rtol=1e-6, atol=1e-6)
        for loss, optimiser in zip((first, second), optimisers, strict=True):
            optimiser.zero_grad()
            loss(embeddings, labels).backward()
            optimiser.step()
    assert not torch.allclose(second.weight.norm(dim=0), torch.ones(CLASSES).double(), atol=1e-2)


def test_logits_of_p2s_grad_are_cosines():
    loss, embeddings = p2s_pair()[1], torch.randn(4, SIZE)
    expected = torch.cosine_similarity(embeddings[:, None], loss.weight.T[None], dim=2)
    torch.testing.assert_close(loss.get_logits(embeddings), expected)


def test_p2s_grad_in_half_precision_and_under_autocast():
    second = p2s_pair()[1]
    embeddings, labels = batch(torch.float32)
    expected = second(embeddings, labels.byte())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(second(embeddings, labels), expected)
    assert second.weight.dtype == torch.float32
    half = second(embeddings.bfloat16(), labels)
    assert second.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=0)
    second.weight.data.zero_()
    assert second(embeddings, labels).isfinite()


def test_p2s_grad_refuses_what_pml_refuses():
    embeddings, labels = batch()
    for loss in p2s_pair():
        with pytest.raises(ValueError, match="indices_tuple is not supported"):
            loss(embeddings, labels, pairing.get_all_pairs_indices(labels))
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            loss(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)
    with pytest.raises(ValueError, match="labels are required"):
        p2s_pair()[1](embeddings)
    with pytest.raises(ValueError, match="labels: expected values in"):
        p2s_pair()[1](embeddings, labels - 1)


# Errors


@each_class
def test_calls_are_refused_as_by_pml(name):
    embeddings, labels = batch()
    for loss in pair(name):
        with pytest.raises(ValueError, match="labels are required for this loss function"):
            loss(embeddings)
        with pytest.raises(ValueError, match="ref_emb is not supported for this loss function"):
            loss(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)
        with pytest.raises(ValueError, match="Number of embeddings must equal"):
            loss(embeddings, labels[1:])
        with pytest.raises(ValueError, match="labels must be a 1D tensor"):
            loss(embeddings, labels[:, None])


@each_class
@pytest.mark.parametrize("label", [-100, -1, CLASSES])
def test_labels_out_of_range(name, label):
    embeddings, labels = batch()
    labels[3] = label
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, {CLASSES}\), got"):
        pair(name)[1](embeddings, labels)


@pytest.mark.parametrize("name", [name for name, _ in EACH if name != "NormalizedSoftmaxLoss"])
def test_the_distance_has_to_be_the_cosine(name):
    for module in (theirs, ours):
        with pytest.raises(AssertionError, match="requires the distance metric to be Cosine"):
            getattr(module, name)(num_classes=2, embedding_size=3, distance=distances.LpDistance())
    with pytest.raises(AssertionError, match=r"requires distance\.power to be 1"):
        getattr(ours, name)(2, 3, distance=distances.CosineSimilarity(power=2))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ours.ArcFaceLoss(0, 3), ValueError, "num_classes: "),
        (lambda: ours.ArcFaceLoss(2, 3.0), TypeError, "embedding_size: expected an int"),
        (lambda: ours.ArcFaceLoss(2, 3, margin=180), ValueError, r"margin: .*, 180\) degrees"),
        (lambda: ours.ArcFaceLoss(2, 3, margin="a"), TypeError, "margin: .*number of degrees, got"),
        (lambda: ours.CosFaceLoss(2, 3, margin=math.nan), ValueError, "margin: "),
        (lambda: ours.SphereFaceLoss(2, 3, margin=0.5), ValueError, "margin: "),
        (lambda: ours.SubCenterArcFaceLoss(2, 3, sub_centers=0), ValueError, "sub_centers: "),
        (lambda: ours.NormalizedSoftmaxLoss(2, 3, temperature=0), ValueError, "temperature: "),
        (lambda: ours.P2SGradLoss(0, 3), ValueError, "descriptors_dim: "),
        (lambda: ours.ArcFaceLoss(2, 3, blah=1), TypeError, "blah"),
        (lambda: ours.ArcFaceLoss(2, 3).get_logits(torch.ones(4, 2)), ValueError, "embeddings: "),
        (
            lambda: ours.ArcFaceLoss(2, 3, mode="fast")(torch.ones(1, 3), torch.tensor([0])),
            ValueError,
            "mode: ",
        ),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("pml", "message"),
    [
        (
            None,
            "needs pytorch-metric-learning: pip install angular-losses[pml]",
        ),
        (
            SimpleNamespace(__version__="3.0.4"),
            "written for pytorch-metric-learning 2.9, found 3.0.4",
        ),
    ],
    ids=["missing", "version 3"],
)
def test_without_the_pml_it_is_written_for(monkeypatch, pml, message):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", pml)
    monkeypatch.delitem(sys.modules, ours.__name__)
    with pytest.raises(ImportError, match=re.escape(message)):
        importlib.import_module(ours.__name__)


def test_the_margin_is_that_of_arcface():
    theta = torch.linspace(0, math.pi, 7, dtype=torch.float64)
    found = ours.ArcFaceLoss(2, 3, margin=30).target(theta, torch.zeros(7).long())
    assert torch.equal(found, arcface(theta, math.radians(30), beyond="linear"))
