"""Cases of test_multimodal.py, run by every rank."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.layers.test_multimodal import TIMES
from tests.layers.test_multimodal import draw as draw_tokens
from tests.layers.test_multimodal import make as make_layer
from tests.models.small_multimodal import draw, make

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def gradients_of(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(grads, model.parameters(), strict=True)
    return [torch.zeros_like(p) if grad is None else grad for grad, p in pairs]


def a_rank_lacks_modalities(*, model, inputs, run, missing_by_rank):
    """The gradients are the mean over the ranks; that of what a rank lacks is 0, not awaited."""
    alone = copy.deepcopy(model)
    cotangent = torch.randn(2, 5)
    # What every rank finds, computed before processes are joined to a group of two.
    expected = None
    for missing in missing_by_rank:
        kept = {name: x for name, x in inputs.items() if name not in missing}
        grads = gradients_of(alone, (run(alone, kept) * cotangent).sum())
        expected = (
            grads if expected is None else [a + b for a, b in zip(expected, grads, strict=True)]
        )
    shared = DistributedDataParallel(model)
    for _ in range(2):  # a pass that is not through would be noticed by the next one
        model.zero_grad()
        own = missing_by_rank[dist.get_rank()]
        kept = {name: None if name in own else x for name, x in inputs.items()}
        (run(shared, kept) * cotangent).sum().backward()
        for (name, p), sum_of_grads in zip(model.named_parameters(), expected, strict=True):
            mean = sum_of_grads / dist.get_world_size()
            torch.testing.assert_close(
                p.grad, mean, **CLOSE, msg=lambda text, n=name: f"{n}: {text}"
            )


def a_rank_lacks_sound():
    a_rank_lacks_modalities(
        model=make(),
        inputs=draw(2),
        run=lambda model, inputs: model(inputs),
        missing_by_rank=[["sound"], ["photo", "tiles"]],
    )


def all_ranks_lack_video():
    a_rank_lacks_modalities(
        model=make(),
        inputs=draw(2),
        run=lambda model, inputs: model(inputs),
        missing_by_rank=[["video"], ["video", "question"]],
    )


def a_rank_lacks_samples():
    """Some samples of one rank lack it, and all of the other."""
    flags = [[True, False], [False, False]][dist.get_rank()]
    model = make()
    shared = DistributedDataParallel(model)  # without a reference it would share nothing
    shared(draw(2), present={"sound": flags}).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad.isfinite().all() for grad in grads)
    assert model.encoders["sound"].front_end.proj.weight.grad.abs().max() > 0


def a_rank_lacks_tokens_of_a_layer():
    layer = make_layer()

    def run(layer, inputs):
        out = layer(inputs, times=TIMES)
        return sum(x.mean((1, 2)) for x in out.values())[:, None]

    a_rank_lacks_modalities(
        model=layer, inputs=draw_tokens(2), run=run, missing_by_rank=[["audio"], ["text"]]
    )


CASES = {
    "a_rank_lacks_sound": a_rank_lacks_sound,
    "all_ranks_lack_video": all_ranks_lack_video,
    "a_rank_lacks_samples": a_rank_lacks_samples,
    "a_rank_lacks_tokens_of_a_layer": a_rank_lacks_tokens_of_a_layer,
}
