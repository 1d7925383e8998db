import pytest

from longnet_zoo.ops.kernels.packages import OptionalPackage


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder in the path: `lz_outer/` whose code must not run, and `lz_inner` in it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lz_outer").mkdir()
    (tmp_path / "lz_outer" / "__init__.py").write_text("raise AssertionError('was imported')")
    (tmp_path / "lz_outer" / "lz_inner.py").write_text("")
    return tmp_path


def package(*modules, load=int):
    return OptionalPackage(modules=modules, install="pip install it", load=load)


def test_modules_are_found_without_running_them(folder):
    assert package("lz_outer.lz_inner").is_installed()
    assert package("lz_outer.lz_inner", "torch.nn").is_installed()


@pytest.mark.parametrize(
    "modules",
    [("lz_absent",), ("lz_absent.inner",), ("lz_outer.lz_absent",), ("torch.nn", "lz_absent")],
)
def test_a_module_that_is_missing_is_seen(folder, modules):
    assert not package(*modules).is_installed()


def test_a_module_without_submodules_has_none(folder):
    assert not package("lz_outer.lz_inner.deeper").is_installed()


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: _ZN3c104"),
        OSError("libcudart.so.11.0: cannot open shared object file"),
        AttributeError("no attribute '_flash_attn_forward'"),
        RuntimeError("operator exists already"),
    ],
)
def test_every_failure_to_load_is_told(error):
    calls = []

    def load():
        calls.append(1)
        raise error

    broken = package("torch", load=load)
    assert broken.failure() == broken.failure() == f"{type(error).__name__}: {error}"
    assert len(calls) == 1
    assert package("torch").failure() is None
