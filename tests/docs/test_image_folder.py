"""The script of the second tutorial runs on any folder of images and any backbone."""

import runpy
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "image_folder.py"


def test_the_script_of_the_image_folder_runs_on_any_folder_and_backbone(tmp_path, capsys):
    names = runpy.run_path(str(SCRIPT))
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
