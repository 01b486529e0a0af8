"""bench/int8.py: what is counted as agreement, on logits that are known."""

import int8
import pytest
import torch


def test_accuracy_agreement_and_largest_error():
    exact = torch.tensor([[4.0, 1.0], [0.0, 2.0], [3.0, 1.0], [1.0, 2.0]])
    other = torch.tensor([[4.0, 1.0], [3.0, 2.0], [3.0, 1.0], [1.0, 2.0]])
    row = int8.agreement(exact, {"int8": other}, torch.tensor([0, 0, 0, 1]))
    assert row == {
        "images": 4,
        "float32_accuracy": 0.75,
        "int8_accuracy": 1.0,
        "int8_agrees": 0.75,
        "int8_largest_error": pytest.approx(3 / 4),
    }
