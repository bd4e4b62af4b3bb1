"""skorch: the loss is the criterion, whose parameters skorch gives to the optimiser."""

import copy

import pytest
import torch

import angular_losses as al
from tests.integrations import (
    NUM_CLASSES,
    NUM_FEATURES,
    SIZE,
    examples,
    of_tools,
    plain,
    same,
    state_of,
    tool,
)

skorch = tool("skorch")
tool("skorch.helper")
pytestmark = of_tools


class Net(skorch.NeuralNetClassifier):
    """Probabilities from the cosines with the centres; without this, from the embeddings."""

    def predict_proba(self, points):
        embeddings = torch.as_tensor(super().predict_proba(points), device=self.device)
        with torch.no_grad():
            return self.criterion_.get_logits(embeddings).softmax(1).numpy()


def net(epochs=3, **options):
    return Net(
        torch.nn.Linear,
        module__in_features=NUM_FEATURES,
        module__out_features=SIZE,
        criterion=al.ArcFaceLoss,
        criterion__num_classes=NUM_CLASSES,
        criterion__embedding_size=SIZE,
        criterion__scale=16.0,
        criterion__schedule=al.MarginWarmup(10),
        predict_nonlinearity=None,
        optimizer__momentum=0.9,
        lr=0.05,
        max_epochs=epochs,
        batch_size=8,
        classes=list(range(NUM_CLASSES)),
        verbose=0,
        **{"train_split": None, **options},
    )


def data():
    points, labels = examples(dtype=torch.float32)
    return points.numpy(), labels.numpy()


def state(fitted):
    return state_of(fitted.module_, fitted.criterion_)


def test_training_is_that_of_a_plain_loop():
    fitted = net().initialize()
    parts = copy.deepcopy((fitted.module_, fitted.criterion_))
    fitted.partial_fit(*data())
    points, labels = examples(dtype=torch.float32)
    batches = [*zip(points.split(8), labels.split(8), strict=True)] * 3
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    assert same(state(fitted), plain(*parts, batches, optimiser=optimiser), 1e-6)


def test_validation_leaves_the_schedule_alone():
    aside = skorch.helper.predefined_split(skorch.dataset.Dataset(*data()))
    fitted = net(train_split=aside).fit(*data())
    assert fitted.criterion_.schedule.step == 12


def test_it_predicts_the_nearest_centre():
    fitted = net(epochs=20).fit(*data())
    points, labels = data()
    embeddings = fitted.module_(torch.from_numpy(points))
    nearest = (
        torch.nn.functional.normalize(embeddings)
        @ torch.nn.functional.normalize(fitted.criterion_.weight).T
    )
    assert (fitted.predict(points) == nearest.argmax(1).numpy()).all()
    assert fitted.score(points, labels) > 0.9
    probabilities = fitted.predict_proba(points)
    assert probabilities.sum(1) == pytest.approx(1.0, abs=1e-5)


def test_training_resumes_bit_for_bit(tmp_path):
    kept = skorch.callbacks.Checkpoint(dirname=tmp_path, monitor=None)
    first = net(callbacks=[kept]).fit(*data())
    resumed = net().initialize()
    resumed.load_params(checkpoint=kept)
    assert same(state(resumed), state(first))
    assert resumed.criterion_.schedule.step == 12
    first.partial_fit(*data())
    resumed.partial_fit(*data())
    assert same(state(resumed), state(first))


def test_a_clone_has_a_schedule_of_its_own():
    first = net()
    second = tool("sklearn.base").clone(first)
    first.fit(*data())
    second.initialize()
    assert second.criterion_.schedule.step == 0
