import pytest
import torch

from recipes.context_warmup import ContextWarmup


def test_context_grows_geometrically_to_the_whole_window():
    warmup = ContextWarmup(start=512, steps=40)
    contexts = [warmup.context(step, 8192) for step in range(60)]
    assert contexts[:41:10] == [512, 1024, 2048, 4096, 8192]
    assert contexts == sorted(contexts)
    assert set(contexts[40:]) == {8192}
    assert all(context % 128 == 0 for context in contexts)


def test_a_power_grows_late():
    warmup = ContextWarmup(start=512, steps=1000, power=3)
    contexts = [warmup.context(step, 32768) for step in range(1001)]
    assert contexts == sorted(contexts)
    # Doublings, six of them, by (step / steps) ** 3.
    assert contexts[500] == 896  # 512 * 2 ** (6 / 8) = 861
    assert sum(context <= 2048 for context in contexts) == pytest.approx(693, abs=2)
    assert contexts[-1] == 32768


def test_a_window_shorter_than_the_start_stays_whole():
    assert ContextWarmup(start=512, steps=40).context(0, 100) == 100


def test_rows_keep_their_beginning():
    tokens = torch.arange(2 * 1000).view(2, 1000)
    batch = ContextWarmup(start=256, steps=10).cut({"tokens": tokens, "labels": tokens + 1}, 0)
    assert torch.equal(batch["tokens"], tokens[:, :256])
    assert torch.equal(batch["labels"], tokens[:, :256] + 1)


def test_rows_that_hold_the_tokens_of_a_step_come_from_every_window():
    warmup = ContextWarmup(start=256, steps=10, step_tokens=600)
    tokens = torch.arange(2 * 1000).view(2, 1000)
    batch = warmup.cut({"tokens": tokens, "labels": tokens + 1}, 0)
    expected = torch.stack([tokens[0, :256], tokens[1, :256], tokens[0, 256:512]])
    assert torch.equal(batch["tokens"], expected)
    assert torch.equal(batch["labels"], expected + 1)


@pytest.mark.parametrize(
    ("step", "step_tokens", "shape"),
    [
        (0, 1, (1, 256)),
        (0, 256, (1, 256)),
        (0, 257, (2, 256)),
        (0, 5000, (6, 256)),
        (0, None, (2, 256)),
        (10, 600, (1, 1000)),
        (10, 1001, (2, 1000)),
        (10, None, (2, 1000)),
    ],
)
def test_every_step_reads_the_tokens_it_is_given(step, step_tokens, shape):
    warmup = ContextWarmup(start=256, steps=10, step_tokens=step_tokens)
    assert warmup.cut({"tokens": torch.zeros(2, 1000)}, step)["tokens"].shape == shape


@pytest.mark.parametrize("name", ["start", "steps", "step_tokens"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got {name}=0"):
        ContextWarmup(**{"start": 8, "steps": 8, name: 0})


@pytest.mark.parametrize("power", [0, -1.0, float("nan")])
def test_the_power_must_be_positive(power):
    with pytest.raises(ValueError, match=f"power must be above 0, got {power}"):
        ContextWarmup(start=8, steps=8, power=power)


def test_packed_documents_are_refused():
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "cu_seqlens": torch.tensor([0, 3, 8])}
    with pytest.raises(ValueError, match="confine_to_document=True packs them into one"):
        ContextWarmup(start=4, steps=2).cut(batch, 0)
