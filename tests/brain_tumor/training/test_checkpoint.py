"""Checkpoints that someone else may have written."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.training.checkpoint import read_checkpoint
from tests.brain_tumor.faults.hostile_files import poisoned_checkpoints, write_poisoned


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def poisoned(tmp_path, canary):
    return {path.stem: path for path in write_poisoned(tmp_path, canary)}


def test_poisoned_checkpoints_are_refused(tmp_path):
    assert poisoned_checkpoints(tmp_path) == {"tried": 9, "refused": 9, "failed": 0}


def test_each_is_refused_in_one_line(poisoned, canary):
    for path in poisoned.values():
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: not readable as a checkpoint: ")
        assert "\n" not in str(caught.value)
        assert not canary.exists()


@pytest.mark.parametrize("name", ["payload", "nested payload", "command", "old format"])
def test_the_poison_is_real(poisoned, canary, name):
    torch.load(poisoned[name], weights_only=False)
    assert canary.is_dir()


def test_the_bare_poison_is_real(poisoned, canary):
    pickle.loads(poisoned["bare pickle"].read_bytes())
    assert canary.is_dir()


def test_the_packed_poison_is_real(poisoned):
    for name in ("packed pickle", "packed tensor"):
        assert poisoned[name].stat().st_size < 3e6
        with zipfile.ZipFile(poisoned[name]) as archive:
            (packed,) = (one for one in archive.infolist() if one.compress_type)
            assert packed.file_size == 80 * 2**24


def test_an_honest_checkpoint_is_read(tmp_path):
    contents = {"epoch": 3, "network": {"weight": torch.ones(5)}, "optimiser": {"state": {}}}
    torch.save(contents, tmp_path / "checkpoint.pt")
    found = read_checkpoint(tmp_path / "checkpoint.pt")
    assert found["epoch"] == 3
    assert torch.equal(found["network"]["weight"], torch.ones(5))


def test_the_huge_tensor_claims_what_it_lacks(poisoned):
    with pytest.raises(RuntimeError, match="storage"):
        torch.load(poisoned["huge tensor"], weights_only=True)


def same(one, other):
    """Whether two values of a checkpoint are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        keys = list(one)
        return list(other) == keys and all(same(one[key], other[key]) for key in keys)
    return one == other


def test_no_flipped_bit_is_read_as_other_numbers(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "checkpoint.pt"
    weights = torch.from_numpy(generator.normal(size=(3, 4000)))
    contents = {"epoch": 3, "network": dict(zip("abc", weights, strict=True))}
    torch.save(contents, path)
    whole, refused = bytearray(path.read_bytes()), 0
    for bit in generator.integers(0, 8 * len(whole), 200):
        damaged = whole.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert same(read_checkpoint(path), contents)  # a bit that means nothing
        except UserError:
            refused += 1
    assert refused > 180
