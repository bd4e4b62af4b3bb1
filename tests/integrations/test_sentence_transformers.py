"""sentence-transformers: a loss module around the model, saved beside it by a callback."""

from pathlib import Path

import pytest
import torch

import angular_losses as al
from tests.integrations import of_tools, same, state_of, tool

sentence_transformers = tool("sentence_transformers")
datasets = tool("datasets")
transformers = tool("transformers")
pytestmark = of_tools

WORDS = ["red", "blue", "green", "round", "square", "flat", "old", "new"]
SENTENCES = [f"{first} {second}" for first in WORDS[:4] for second in WORDS[4:]]
LABELS = [number // 4 for number in range(len(SENTENCES))]


class AngularLoss(torch.nn.Module):
    """What sentence-transformers calls: features of the columns, and labels."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, features, labels):
        (column,) = features
        return self.loss(self.model(column)["sentence_embedding"], labels)


class SaveLoss(transformers.TrainerCallback):
    """Write the loss into each checkpoint, of which the Trainer writes the model alone."""

    def __init__(self, loss):
        self.loss = loss

    def on_save(self, args, state, control, **others):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        torch.save(self.loss.state_dict(), folder / "loss.pt")


def build(seed=0):
    torch.manual_seed(seed)
    modules = sentence_transformers.sentence_transformer.modules
    bag = modules.BoW(WORDS)
    dense = sentence_transformers.base.modules.Dense(len(WORDS), 8)
    model = sentence_transformers.SentenceTransformer(modules=[bag, dense], device="cpu")
    return model, al.ArcFaceLoss(4, 8, scale=16.0, schedule=al.MarginWarmup(10))


def trainer(model, loss, folder):
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return sentence_transformers.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"sentence": SENTENCES, "label": LABELS}),
        loss=AngularLoss(model, loss),
        callbacks=[SaveLoss(loss)],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, loss = build()
    before = loss.weight.detach().clone()
    trainer(model, loss, folder).train()
    assert not torch.equal(loss.weight, before)
    return folder, state_of(model, loss)


def test_training_resumes_bit_for_bit_with_the_loss_loaded(whole):
    folder, expected = whole
    model, loss = build(1)
    checkpoint = folder / "checkpoint-6"
    loss.load_state_dict(torch.load(checkpoint / "loss.pt"))
    trainer(model, loss, folder).train(str(checkpoint))
    assert same(state_of(model, loss), expected)


def test_without_that_the_centres_are_other_ones(whole):
    folder, expected = whole
    model, loss = build(1)
    trainer(model, loss, folder).train(str(folder / "checkpoint-6"))
    assert loss.schedule.step == 6  # of 12
    assert not same(state_of(model, loss), expected, 1e-2)


def test_gradients_of_the_centres_do_not_accumulate(whole, tmp_path):
    """The Trainer zeroes the model's; sentence-transformers since 6 those of the loss too."""
    model, loss = build()
    trainer(model, loss, tmp_path).train()
    assert loss.weight.grad is None or not loss.weight.grad.any()
