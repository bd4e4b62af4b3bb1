"""Settings: presets, their checks, and the copy that a run keeps."""

import dataclasses

import pytest

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.settings import (
    PRESETS,
    PRESETS_FOLDER,
    Settings,
    differences,
    load_settings,
    override_settings,
    read_settings,
    setting_fields,
    tomllib,
    write_settings,
)


@pytest.fixture
def preset(tmp_path):
    def write(text):
        path = tmp_path / "own.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_paper_preset_is_the_paper():
    settings = load_settings("paper")
    assert (settings.data.image_size, settings.data.split) == (224, "paper")
    assert (settings.network.width, settings.network.embedding_size) == (1.0, 256)
    assert (settings.network.dropout, settings.network.input_range) == (0.2, "imagenet")
    assert settings.network.weights.endswith("mobilenet_v1_1.0_224.safetensors")
    assert (settings.loss.margin, settings.loss.scale, settings.loss.annealing) == (5, 30, True)
    training = settings.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (275, 32, 1e-4)
    assert training.schedule == "paper"
    augmentation = settings.augmentation
    assert (augmentation.rotation_degrees, augmentation.brightness) == (15.0, 0.2)
    assert (augmentation.zoom, augmentation.flip_up_down) == (1.25, True)


def test_quick_preset_needs_no_download_and_holds_out_patients():
    settings = load_settings("quick")
    assert settings.network.weights == ""
    assert settings.data.split == "patient"


def test_field_names_are_unique_because_flags_are_named_after_them():
    names = [field.name for _, field in setting_fields()]
    assert len(names) == len(set(names))


def test_overrides_replace_only_what_they_name():
    settings = load_settings("paper", {"epochs": 3, "margin": 4})
    assert settings.training.epochs == 3
    assert settings.loss.margin == 4.0
    assert isinstance(settings.loss.margin, float)
    assert differences(settings, load_settings("paper", {"margin": 4})) == {
        "training.epochs": (3, 275)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_every_key(name):
    # A preset that leaves a key to its default would change with the default.
    tables = tomllib.loads((PRESETS_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    expected = {table: set(keys) for table, keys in dataclasses.asdict(Settings()).items()}
    assert {table: set(keys) for table, keys in tables.items()} == expected


def test_written_settings_read_back_equal(tmp_path):
    settings = override_settings(
        load_settings("quick"),
        {"weights": 'a "folder"\\Größe\n.safetensors', "learning_rate": 3e-7},
    )
    path = tmp_path / "settings.toml"
    path.write_text(write_settings(settings), encoding="utf-8")
    assert read_settings(path) == settings


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[training]\nepoch = 3", "unknown key training.epoch;"),
        ("[trainng]\nepochs = 3", "unknown table 'trainng'"),
        ("training = 3", "training must be a table"),
        ("[training]\nepochs = 3.0", "training.epochs: must be int, not 3.0"),
        ("[training]\nepochs = true", "training.epochs: must be int, not True"),
        ("[training]\nepochs = 0", "training.epochs: must be from 1 to"),
        ("[training]\nlearning_rate = nan", "training.learning_rate: must be from"),
        ("[training]\nlearning_rate = inf", "training.learning_rate: must be from"),
        ("[training]\nlearning_rate = true", "training.learning_rate: must be float"),
        ("[training]\nlearning_rate = 1" + "0" * 400, "training.learning_rate: must be from"),
        ("[training]\nschedule = 'linear'", "training.schedule: must be one of"),
        ("[training]\nschedule = 3", "training.schedule: must be str"),
        ("[augmentation]\nflip_up_down = 1", "augmentation.flip_up_down: must be bool"),
        ("[loss]\nmargin = -0.5", "loss.margin: must be from 0.0"),
        ("[data]\nsplit = 'patients'", "data.split: must be one of"),
        ("[data\n", "not readable as settings"),
    ],
)
def test_faults_name_file_and_key(preset, text, fault):
    path = preset(text)
    with pytest.raises(UserError) as error:
        read_settings(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert fault in message


def test_an_integer_is_accepted_for_a_float(preset):
    settings = read_settings(preset("[loss]\nmargin = 4"))
    assert settings.loss.margin == 4.0
    assert isinstance(settings.loss.margin, float)


def test_faulty_override_names_its_flag():
    with pytest.raises(UserError, match=r"^--learning-rate: must be from"):
        load_settings("quick", {"learning_rate": -1.0})


def test_unreadable_files_are_the_users_error(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[data]\nsplit = '\xff'")
    for faulty in (path, tmp_path / "missing.toml", tmp_path):
        with pytest.raises(UserError, match=faulty.name):
            read_settings(faulty)
