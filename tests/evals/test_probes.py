"""Probes: simple methods that read what is there, and nothing where there is nothing."""

import numpy as np
import torch

from evals.encoder.classify import class_mean_accuracy, knn_accuracy, linear_accuracy
from mmagent.geometry import patch_labels


def _clusters(classes: int, each: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(classes * each, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(classes).repeat_interleave(each)
    return centres[labels] + spread * noise, labels


def test_separable_features_are_read_and_noise_is_not():
    train, test = _clusters(4, 50, 0.1, 1), _clusters(4, 25, 0.1, 2)
    assert knn_accuracy(*train, *test) == 1.0
    assert linear_accuracy(*train, *test) == 1.0
    shuffled = train[1][torch.randperm(200, generator=torch.Generator().manual_seed(3))]
    assert linear_accuracy(train[0], shuffled, *test) < 0.6  # chance is a quarter


def test_classes_weigh_alike():
    labels = torch.tensor([0] * 9 + [1])
    assert class_mean_accuracy(torch.zeros(10, dtype=torch.long), labels) == 0.5


def test_a_patch_takes_its_commonest_class_in_the_order_of_the_stream():
    mask = np.zeros((56, 56), dtype=np.int64)
    mask[:14, 14:28] = 3  # row 0, column 1: the second patch of the first merge block
    labels = patch_labels(mask, (1, 4, 4), 2)
    assert labels.tolist() == [0, 3] + [0] * 14
