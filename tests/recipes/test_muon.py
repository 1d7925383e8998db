import pytest
import torch
from timm.optim import muon as timm_muon
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.muon import Muon

LR = 0.5


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(out.dtype)
        return out


def make(seed=0, momentum=0.0):
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(48, 16))
    weight.grad = torch.randn(48, 16)
    options = {"lr": LR, "momentum": momentum, "weight_decay": 0.0}
    return weight, Muon([{"params": [weight], "use_fallback": False}], **options)


def test_a_cpu_never_computes_in_bfloat16():
    _, optimizer = make()
    with Dtypes() as dtypes:
        optimizer.step()
    assert dtypes.seen == {torch.float32}
    _, plain = make()
    plain.__class__ = timm_muon.Muon
    with Dtypes() as dtypes:
        plain.step()
    assert torch.bfloat16 in dtypes.seen  # else timm has changed, and our class is not needed


def test_a_step_adds_an_orthogonal_matrix():
    weight, optimizer = make()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    step = (before - weight.detach()) / LR / timm_muon.get_lr_scale(weight.shape)
    singular = torch.linalg.svdvals(step)
    # What five iterations leave, whatever the gradient's singular values were.
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.98


def test_timm_is_left_as_it_was_even_by_an_error():
    before = timm_muon.zeropower_via_newtonschulz
    _, optimizer = make()
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert timm_muon.zeropower_via_newtonschulz is before


def test_other_devices_keep_what_timm_does():
    weight, optimizer = make()
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(weight.detach().to("meta"))]
    optimizer.param_groups[0]["params"][0].grad = torch.empty(48, 16, device="meta")
    with Dtypes() as dtypes:
        optimizer.step()
    assert torch.bfloat16 in dtypes.seen
