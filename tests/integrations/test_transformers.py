"""transformers' Trainer: the loss is the head of the model, whose forward returns its value."""

import pytest
import torch

import angular_losses as al
from tests.integrations import (
    NUM_CLASSES,
    NUM_FEATURES,
    SIZE,
    differences,
    examples,
    of_tools,
    plain,
    same,
    state_of,
    tool,
)

transformers = tool("transformers")
tool("accelerate")
pytestmark = of_tools


class Settings(transformers.PretrainedConfig):
    model_type = "recogniser"

    def __init__(self, num_classes=NUM_CLASSES, steps=10, **options):
        super().__init__(**options)
        self.num_classes, self.steps = num_classes, steps


class Recogniser(transformers.PreTrainedModel):
    config_class = Settings

    def __init__(self, config):
        super().__init__(config)
        self.network = torch.nn.Linear(NUM_FEATURES, SIZE)
        schedule = al.MarginWarmup(config.steps)
        self.loss = al.AdaFaceLoss(config.num_classes, SIZE, scale=16.0, schedule=schedule)
        self.post_init()

    def forward(self, points, labels=None):
        embeddings = self.network(points)
        answer = {"logits": self.loss.get_logits(embeddings)}
        return answer if labels is None else {"loss": self.loss(embeddings, labels), **answer}


def model(seed=0):
    torch.manual_seed(seed)
    return Recogniser(Settings()).double()


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows=32):
        self.points, self.labels = examples(rows)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"points": self.points[row], "labels": self.labels[row]}


def optimiser_of(recogniser):
    groups = al.parameter_groups(recogniser, lr=0.01, weight_decay=0.1)
    return torch.optim.AdamW(groups)


def trainer(recogniser, folder, epochs=6, optimisers=True, **options):
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": epochs,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "per_device_train_batch_size": 32,  # all rows: their order plays no part
        **options,
    }
    given = {"optimizers": (optimiser_of(recogniser), None)} if optimisers else {}
    arguments = transformers.TrainingArguments(**arguments)
    return transformers.Trainer(recogniser, arguments, train_dataset=Rows(), **given)


def state(recogniser):
    return state_of(recogniser.network, recogniser.loss)


def test_training_is_that_of_a_plain_loop(tmp_path):
    ours, other = model(), model()
    trainer(ours, tmp_path).train()
    batch = Rows()
    batches = [(batch.points, batch.labels)] * 6
    parts = other.network, other.loss
    expected = plain(*parts, batches, clip=1.0, optimiser=optimiser_of(other))
    assert same(state(ours), expected, 1e-10), differences(state(ours), expected)


class WithMore(Recogniser):
    def forward(self, points, labels=None, **more):
        return super().forward(points, labels)


@pytest.mark.parametrize(("cls", "factor"), [(Recogniser, 1.0), (WithMore, 4.0)])
def test_gradients_are_averaged_over_batches_unless_forward_takes_anything(tmp_path, cls, factor):
    torch.manual_seed(0)
    ours, batch = cls(Settings()), Rows()
    ours.loss = al.ArcFaceLoss(NUM_CLASSES, SIZE, scale=16.0)
    ours.double().loss(ours.network(batch.points), batch.labels).backward()
    gradient, before = ours.loss.weight.grad, ours.loss.weight.detach().clone()
    ours.zero_grad()
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    made = trainer(ours, tmp_path, 1, max_grad_norm=0.0, **options)
    made.optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    made.train()
    assert torch.allclose(before - ours.loss.weight, factor * gradient, rtol=1e-8)


class OfClasses(Recogniser):
    def __init__(self, config):
        super().__init__(config)
        margin = torch.tensor(config.margins, device="cpu")  # not on the meta device
        self.loss = al.ArcFaceLoss(config.num_classes, SIZE, margin=margin)


def test_margins_of_classes_are_loaded_too(tmp_path):
    recogniser = OfClasses(Settings(margins=[0.1, 0.2, 0.3, 0.4]))
    recogniser.save_pretrained(tmp_path)
    loaded = OfClasses.from_pretrained(tmp_path)
    assert same(state(loaded), state(recogniser))
    assert loaded.loss(torch.randn(4, SIZE), torch.arange(4)).isfinite()


class OfCounts(Recogniser):
    def __init__(self, config):
        super().__init__(config)
        margin = al.suggest_margin(100, 4)  # a number, whatever the default device
        counts = range(1, config.num_classes + 1)
        self.loss = al.KappaFaceLoss(config.num_classes, SIZE, counts, margin=margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_loaded_too(tmp_path, dtype):
    recogniser = OfCounts(Settings())
    recogniser.loss(torch.randn(4, SIZE), torch.arange(4))
    recogniser.save_pretrained(tmp_path)
    loaded = OfCounts.from_pretrained(tmp_path, dtype=dtype).loss
    for name, kept in recogniser.loss.state_dict().items():
        if name != "weight":
            found = loaded.state_dict()[name]
            assert found.dtype == torch.float32, name
            assert torch.allclose(found, kept, rtol=torch.finfo(dtype).eps, atol=0), name
    assert [name for name, _ in loaded.named_parameters()] == ["weight"]


def test_training_resumes_bit_for_bit(tmp_path):
    options = {"per_device_train_batch_size": 8, "save_strategy": "epoch"}
    whole, resumed = model(), model(1)
    trainer(whole, tmp_path, **options).train()
    trainer(resumed, tmp_path, **options).train(str(tmp_path / "checkpoint-12"))
    assert same(state(resumed), state(whole))
    assert resumed.loss.schedule.step == 24


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"bf16": True}, 0.05),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    ],
)
def test_half_precision_and_compilation_are_near(tmp_path, options, tolerance):
    ours, other = model().float(), model().float()
    made = trainer(ours, tmp_path, **options)
    batch = made.train_dataset
    batch.points = batch.points.float()
    made.train()
    assert ours.loss.weight.dtype == torch.float32
    batches = [(batch.points, batch.labels)] * 6
    parts = other.network, other.loss
    expected = plain(*parts, batches, clip=1.0, optimiser=optimiser_of(other))
    assert same(state(ours), expected, tolerance), differences(state(ours), expected)


class TextRecogniser(transformers.BertPreTrainedModel):
    """A real backbone, tiny, with random weights: tokens (N, L) to embeddings (N, 16)."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.loss = al.ArcFaceLoss(NUM_CLASSES, config.hidden_size, schedule=al.MarginWarmup(10))
        self.post_init()

    def forward(self, points, labels=None):
        tokens = points.abs().mul(4).long().clamp(max=19)
        return {"loss": self.loss(self.bert(tokens).pooler_output, labels)}


def test_gradient_checkpointing_of_the_backbone_changes_nothing(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=20, intermediate_size=16, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    trained = []
    for checkpointing in (True, False):
        torch.manual_seed(0)
        recogniser = TextRecogniser(config)
        made = trainer(recogniser, tmp_path, gradient_checkpointing=checkpointing)
        made.train()
        assert recogniser.is_gradient_checkpointing is checkpointing
        assert recogniser.loss.schedule.step == 6
        trained.append(recogniser.state_dict())
    assert same(*trained, 1e-6)


def test_evaluation_leaves_schedule_and_statistics_alone(tmp_path):
    recogniser = model()
    before = state(recogniser)
    metrics = trainer(recogniser, tmp_path).evaluate(Rows())
    assert same(state(recogniser), before)
    with torch.no_grad():
        answer = recogniser.eval()(*Rows()[:].values())
    assert metrics["eval_loss"] == pytest.approx(answer["loss"].item())


def test_the_model_is_saved_with_its_centres_and_its_schedule(tmp_path):
    recogniser = model()
    trainer(recogniser, tmp_path).train()
    recogniser.save_pretrained(tmp_path)
    loaded = Recogniser.from_pretrained(tmp_path, dtype=torch.float64)
    assert same(state(loaded), state(recogniser))


def test_centres_decay_unless_the_optimiser_is_given(tmp_path):
    """The Trainer's own optimiser decays all that is no bias and no normalisation."""
    by_default = trainer(model(), tmp_path, optimisers=False, weight_decay=0.1)
    assert "loss.weight" in by_default.get_decay_parameter_names(by_default.model)
    groups = trainer(model(), tmp_path).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
