"""The plan: that it holds the trainings the paper's tables need, and nothing twice."""

from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.network.objectives import make_loss
from examples.brain_tumor.reproduction.plan import (
    BEYOND,
    BUDGETS,
    DEVELOPMENT_FOLD,
    PROPOSED,
    SEARCH,
    SEARCH_PACE,
    SWAPPED,
    VARIANTS,
    plan_runs,
)
from examples.brain_tumor.settings import load_settings, override_settings


@pytest.fixture(params=BUDGETS)
def budget(request):
    return BUDGETS[request.param]


def test_seven_trainings_by_slice_and_on_every_fold_of_patients(budget):
    runs = plan_runs(budget, None)
    assert len({run.name for run in runs}) == len(runs)
    counts = Counter((run.group, run.training) for run in runs)
    trainings = {training for group, training in counts if group == "patient"}
    assert len(trainings) == 7
    assert {training for group, training in counts if group == "slice"} == trainings
    for training in trainings:
        assert counts["patient", training] == 5
        seeds = {PROPOSED: budget.seeds, SWAPPED: budget.swapped_seeds}
        assert counts["slice", training] == seeds.get(training, budget.other_seeds)
    folds = {run.settings.data.fold for run in runs if run.group == "patient"}
    assert folds == {1, 2, 3, 4, 5}


def test_the_papers_budget_is_the_papers_training():
    runs = plan_runs(BUDGETS["paper"], None)
    settings = runs[0].settings
    assert (settings.training.epochs, settings.data.image_size) == (275, 224)
    assert (settings.training.learning_rate, settings.training.schedule) == (1e-4, "paper")
    assert (settings.loss.loss, settings.loss.margin, settings.loss.scale) == ("sphereface", 5, 30)
    names = [run.name for run in runs]
    assert names[:5] == [f"slice-{PROPOSED}-seed{seed}" for seed in range(5)]
    assert names[5:10] == [f"patient-{PROPOSED}-fold{fold}" for fold in range(1, 6)]
    first = [run for run in runs if run.settings.training.seed == 0 and run.group == "slice"][:7]
    assert len({run.training for run in first}) == 7  # they come before any second seed
    margins = {run.training: run.settings.loss.margin for run in first}
    assert (margins["sphereface-m4"], margins["sphereface-m6"]) == (4, 6)


def test_each_seed_draws_its_own_split_and_losses_share_it(budget):
    for run in plan_runs(budget, None):
        if run.group == "slice":
            assert run.settings.data.split_seed == run.settings.training.seed
            assert run.name.endswith(f"seed{run.settings.training.seed}")
        assert ("patient" in run.group or run.group == "variant") == (
            run.settings.data.split.startswith("patient")
        )


def test_a_variant_differs_in_what_it_says_alone(budget):
    runs = plan_runs(budget, None)
    proposed = next(run for run in runs if (run.group, run.training) == ("patient", PROPOSED))
    larger = {f"{budget.larger_size}-pixels": {"image_size": budget.larger_size}}
    for training, changes in {**VARIANTS, **larger}.items():
        variant = next(run for run in runs if (run.group, run.training) == ("variant", training))
        differences = {
            key: value
            for table, values in asdict(variant.settings).items()
            for key, value in values.items()
            if value != asdict(proposed.settings)[table][key]
        }
        assert differences == changes


def test_every_planned_loss_can_be_made(budget):
    runs = plan_runs(replace(budget, seeds=1, swapped_seeds=1, other_seeds=1), None)
    for run in runs:
        make_loss(run.settings.loss, 8)
    bare = {run.training for run in runs if not run.settings.loss.annealing}
    papers = {"papers-own"} if budget.comparisons else set()
    assert bare == {name for name in BEYOND if name.endswith("-bare")} | papers


def test_the_margin_is_in_force_for_at_least_half_of_every_training(budget):
    """By slice: lambda = max(5, 1000 / (1 + gamma t)) is at its minimum by then."""
    slices = {"paper": 2144, "validation": 1930}
    for run in plan_runs(budget, None):
        if run.settings.data.split in slices and run.settings.loss.annealing:
            loss, epochs = run.settings.loss, run.settings.training.epochs
            middle = slices[run.settings.data.split] // 32 * epochs / 2
            annealed = loss.annealing_base / (1 + loss.annealing_gamma * middle)
            assert annealed < 1.02 * loss.annealing_minimum


@pytest.mark.parametrize("layout", ["slim", "timm"])
def test_the_network_is_built_for_the_weights_there_are(tmp_path, layout):
    name = {"slim": "stem.conv.weight", "timm": "conv_stem.weight"}[layout]
    save_file({name: torch.zeros(1)}, tmp_path / "weights")
    runs = plan_runs(BUDGETS["small"], tmp_path / "weights")
    assert {run.settings.network.layout for run in runs} == {layout}
    save_file({"other": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(UserError, match="neither TF-slim's nor timm's"):
        plan_runs(BUDGETS["small"], tmp_path / "weights")


def differences(settings, others):
    return {
        key: value
        for table, values in asdict(settings).items()
        for key, value in values.items()
        if value != asdict(others)[table][key]
    }


def test_the_search_never_sees_a_test_slice_of_the_papers_split():
    runs = plan_runs(BUDGETS["standard"], None)
    for training, changes in SEARCH.items():
        by_slice, by_patient = (run for run in runs if run.training == f"search-{training}")
        assert (by_slice.group, by_slice.settings.data.split) == ("search-slice", "validation")
        assert by_patient.settings.data.split == "patient"
        assert by_patient.settings.data.fold == DEVELOPMENT_FOLD
        for run, split in ((by_slice, {"split": "validation"}), (by_patient, {})):
            base = override_settings(BUDGETS["standard"].settings(None), {**SEARCH_PACE, **split})
            own = differences(run.settings, base)
            own.pop("split", None), own.pop("fold", None)
            assert own == changes


def test_the_papers_own_recipe_keeps_a_row(tmp_path):
    runs = plan_runs(BUDGETS["standard"], None)
    own = [run for run in runs if run.training == "papers-own"]
    assert [run.group for run in own] == ["paper-slice", "paper-patient"]
    standard = BUDGETS["standard"].settings(None)
    paper = load_settings("paper", {"weights": ""})
    assert differences(own[0].settings, paper) == {
        "annealing": False,  # of which the paper says nothing
        "epochs": standard.training.epochs,  # as far as two cores carry it
    }
