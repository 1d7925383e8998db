"""Works side by side: streams are forked and joined on a GPU, and nothing happens elsewhere."""

import contextlib

import pytest
import torch

from longnet_zoo.layers import streams
from longnet_zoo.layers.streams import run_side_by_side


def works(log):
    def make(number):
        def work():
            log.append(f"work {number}")
            return {"out": torch.full((2,), float(number))}

        return work

    return [make(number) for number in range(3)]


def test_works_run_one_by_one_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    log = []
    outs = run_side_by_side(works(log), inputs=[], device=torch.device("cpu"))
    assert log == ["work 0", "work 1", "work 2"]
    assert [out["out"][0].item() for out in outs] == [0, 1, 2]


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_streams_are_forked_and_joined(monkeypatch):
    """As a GPU would see it: each side stream waits, works and is waited for; memory is marked."""
    log, names = [], iter(["side 1", "side 2"])
    current = FakeStream(log, "current")

    @contextlib.contextmanager
    def inside(stream):
        log.append(f"in {stream.name}")
        yield
        log.append(f"out of {stream.name}")

    def record(x, stream):
        log.append(f"{'input' if x.ndim == 2 else 'output'} in {stream.name}")

    streams._side_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    device = torch.device("cuda", 0)
    for _ in range(2):  # the same streams serve the next call
        log.clear()
        outs = run_side_by_side(works(log), inputs=[torch.zeros(1, 1)], device=device)
        assert [out["out"][0].item() for out in outs] == [0, 1, 2]
        assert log == [
            "side 1 waits for current",
            "side 2 waits for current",
            "work 0",
            *("in side 1", "work 1", "out of side 1", "input in side 1"),
            *("in side 2", "work 2", "out of side 2", "input in side 2"),
            *("current waits for side 1", "output in current"),
            *("current waits for side 2", "output in current"),
        ]
    streams._side_stream.cache_clear()


@pytest.mark.gpu
def test_streams_give_what_one_stream_gives():
    device = torch.device("cuda", torch.cuda.current_device())
    weights = [torch.randn(2048, 2048, device=device, requires_grad=True) for _ in range(3)]
    x = torch.randn(2048, 2048, device=device, requires_grad=True)

    def run(weight):
        y = x
        for _ in range(8):
            y = torch.tanh(y @ weight)
        return y

    def outputs_and_gradients(outs):
        loss = sum((out * k).sum() for k, out in enumerate(outs, start=1))
        return [*outs, *torch.autograd.grad(loss, [x, *weights])]

    expected = outputs_and_gradients([run(weight) for weight in weights])
    for _ in range(5):
        jobs = [lambda weight=weight: run(weight) for weight in weights]
        found = outputs_and_gradients(run_side_by_side(jobs, inputs=[x], device=device))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
