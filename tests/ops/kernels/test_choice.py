import warnings

import pytest
import torch

from longnet_zoo.ops.kernels import (
    Call,
    choice,
    choose_kernel,
    cudnn,
    flash3,
    flash4,
    math,
    preference,
    sdpa,
)
from longnet_zoo.ops.kernels.packages import OptionalPackage

CPU = {"device_type": "cpu", "dtype": torch.float32, "head_dim": 8}
HOPPER = {
    "device_type": "cuda",
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "capability": (9, 0),
}


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """Leaves the order to the design, and flash-attn 4 aside."""
    (tmp_path / "preference.json").write_text("[]")
    monkeypatch.setattr(preference, "PREFERENCE_FILE", tmp_path / "preference.json")
    absent = OptionalPackage(modules=("lz_no_such_module",), install="get it", load=int)
    monkeypatch.setattr(flash4, "PACKAGE", absent)


def package_of_flash3(monkeypatch, module="torch", error=None):
    """Lets flash-attn 3 be absent, broken or whole."""

    def load():
        if error is not None:
            raise error

    package = OptionalPackage(modules=(module,), install="build it", load=load)
    monkeypatch.setattr(flash3, "PACKAGE", package)


def test_auto_takes_the_fused_kernel_and_falls_back_to_math():
    assert choose_kernel("auto", Call(**CPU)) is sdpa
    extras = ("has_dense_bias", "has_distance_bias", "has_hidden_keys", "has_dropout")
    for extra in (*extras, "has_lse_grad"):
        assert choose_kernel("auto", Call(**CPU, **{extra: True})) is math
    assert choose_kernel("auto", Call(**{**CPU, "device_type": "mps"})) is math
    assert choose_kernel("auto", Call(**{**HOPPER, "dtype": torch.float64})) is math


def test_auto_takes_the_first_of_the_table_that_serves(monkeypatch):
    package_of_flash3(monkeypatch)
    assert choose_kernel("auto", Call(**HOPPER)) is flash3
    package_of_flash3(monkeypatch, module="lz_no_such_module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that something is not installed is no news
        assert choose_kernel("auto", Call(**HOPPER)) is cudnn


def test_a_broken_package_is_passed_over_with_one_warning(monkeypatch):
    package_of_flash3(monkeypatch, error=OSError("libcudart.so.11.0: cannot open"))
    message = r"backend 'flash3' is installed but broken \(OSError: libcudart.*\): build it\."
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert [choose_kernel("auto", Call(**HOPPER)) for _ in range(3)] == [cudnn] * 3
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ({"module": "lz_no_such_module"}, "is not installed: build it"),
        ({"error": ImportError("undefined symbol")}, r"broken \(ImportError: undefined symbol\)"),
    ],
)
def test_a_named_backend_without_its_package_says_how_to_get_it(monkeypatch, package, reason):
    package_of_flash3(monkeypatch, **package)
    message = rf"backend 'flash3' .*{reason}.*Use backend='auto', which takes 'cudnn' here"
    with pytest.raises(RuntimeError, match=message):
        choose_kernel("flash3", Call(**HOPPER))


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("sdpa", {"has_dropout": True}, "'sdpa' does not support attention dropout.*'math'"),
        ("cudnn", {}, "'cudnn' needs a CUDA device, got 'cpu'.*'sdpa'"),
        ("flash2", {"has_dense_bias": True}, "'flash2' needs a CUDA device, got 'cpu'.*'math'"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(backend, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        choose_kernel(backend, Call(**CPU, **changes))


def test_a_gradient_through_the_lse_goes_to_what_serves_it():
    assert choose_kernel("sdpa", Call(**CPU, has_lse_grad=True)) is math
    assert choose_kernel("math", Call(**CPU, has_lse_grad=True)) is math


def test_only_nvidia_gpus_have_a_compute_capability(monkeypatch):
    assert choice.capability_of(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert choice.capability_of(torch.device("cuda", 97)) == (9, 0)
    monkeypatch.setattr(torch.version, "cuda", None)  # as on an AMD GPU
    assert choice.capability_of(torch.device("cuda", 98)) is None
