"""The mean of real tokens, and new heads that fit their model."""

import pytest
import torch
from torch import nn

from longnet_zoo.models.heads import fit_module, masked_mean


@pytest.mark.parametrize("content", [torch.nan, torch.inf, 1e30])
def test_content_of_padding_does_not_matter(content):
    x, mask = torch.randn(2, 7, 3), torch.arange(7) >= torch.tensor([[7], [2]])
    expected = torch.stack([x[0].mean(0), x[1, :2].mean(0)])
    found = masked_mean(x.masked_fill(mask[..., None], content), mask)
    torch.testing.assert_close(found, expected)


def test_half_types_hold_the_mean_of_many_tokens():
    x, mask = torch.full((1, 50, 1), 5000.0).half(), torch.arange(50)[None] >= 49
    assert masked_mean(x, mask).item() == 5000.0


def test_new_modules_have_dtype_and_mode_of_their_model():
    new = fit_module(nn.Dropout(0.5), nn.Linear(2, 2).double().eval())
    assert not new.training
    assert fit_module(nn.Linear(2, 2), nn.Linear(2, 2).double()).weight.dtype == torch.float64
