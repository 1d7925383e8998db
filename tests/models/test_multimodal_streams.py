"""Encoders of modalities run side by side: nothing changes, on a CPU as on a GPU."""

import pytest
import torch

from longnet_zoo.layers import streams

from .small_multimodal import draw, make

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def test_encoders_run_side_by_side(monkeypatch):
    model, calls = make().eval(), []

    def run(works, *, inputs, device):
        calls.append((len(works), len(list(inputs)), device.type))
        return [work() for work in reversed(works)][::-1]

    inputs = draw()
    expected = model(inputs)
    monkeypatch.setattr("longnet_zoo.models.multimodal.run_side_by_side", run)
    times = {"sound": torch.zeros(1)}
    assert torch.equal(model(inputs, times=times), expected)
    assert calls == [(5, 6, "cpu")]


@pytest.mark.gpu
def test_streams_on_a_gpu_give_what_one_stream_gives(monkeypatch):
    model = make().cuda()
    inputs = {name: x.cuda() for name, x in draw(8).items()}

    def outputs_and_gradients():
        out = model(inputs)
        return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))

    found = outputs_and_gradients()
    assert streams._side_stream.cache_info().currsize >= 4
    one_by_one = lambda works, inputs, device: [work() for work in works]  # noqa: E731
    monkeypatch.setattr("longnet_zoo.models.multimodal.run_side_by_side", one_by_one)
    for one, other in zip(found, outputs_and_gradients(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
