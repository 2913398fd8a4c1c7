"""Saving over a checkpoint, cut short: the old weights, the new ones or a refusal; never a mix."""

import itertools
from pathlib import Path

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model import ToyLlama
from tests.faults.support import killed_at
from tests.model.tiny import dense_config

FEW, MANY = 5 * 10**9, 50_000
"""Bytes a file: one file, or several and their index."""


def filled(value: float) -> ToyLlama:
    model = ToyLlama(dense_config(num_hidden_layers=1, vocab_size=64))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


def found(folder: Path) -> set[float]:
    """The values of the weights that load; none if the folder is refused."""
    try:
        model = ToyLlama.from_pretrained(folder)
    except InvalidInputError:
        return set()
    return {value.item() for weight in model.parameters() for value in weight.unique()}


@pytest.mark.parametrize("before", [FEW, MANY])
@pytest.mark.parametrize("after", [FEW, MANY])
def test_killed_before_each_file(before: int, after: int, tmp_path: Path) -> None:
    old, new = filled(1.0), filled(2.0)
    seen = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        old.save_pretrained(folder, before)
        killed = killed_at(step, lambda folder=folder: new.save_pretrained(folder, after))
        values = found(folder)
        assert values in (set(), {1.0}, {2.0})
        seen |= values
        new.save_pretrained(folder, after)
        assert found(folder) == {2.0}
        if not killed:
            break
    assert 2.0 in seen
