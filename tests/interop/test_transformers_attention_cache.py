"""Decoding with the caches of Transformers gives what one pass over the sequence gives."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from longnet_zoo.interop.transformers import attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.prefix_attention import attend_last_rows

from .hugging_face_toys import (
    CLOSE,
    CONFIGS,
    NESTED,
    ONE_SEGMENT,
    UNEVEN,
    build_dilated,
    draw,
    every_model,
    left_padded,
    run,
    unpatched,
)


@every_model
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pattern", [ONE_SEGMENT, UNEVEN])
def test_generation_equals_that_of_the_unpatched_model_or_without_a_cache(
    name: str, cache: str, pattern: DilatedPattern
) -> None:
    model = build_dilated(CONFIGS[name], pattern)
    tokens, mask = left_padded([9, 4])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    if pattern is ONE_SEGMENT:
        wanted = unpatched(model).generate(tokens, **options)
    else:
        wanted = model.generate(tokens, use_cache=False, **options)
    got = model.generate(tokens, cache_implementation=cache, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), **CLOSE)


@every_model
@pytest.mark.parametrize("pattern", [UNEVEN, NESTED])
@pytest.mark.parametrize("lengths", [[47, 47], [47, 39, 40, 2]])
def test_a_cache_changes_no_logit(name: str, pattern: DilatedPattern, lengths: list[int]) -> None:
    model = build_dilated(CONFIGS[name], pattern)
    tokens, mask = left_padded(lengths)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = run(model, tokens, attention_mask=mask, position_ids=positions)
    cache = DynamicCache(config=model.config)
    parts = []
    # A prefill, a chunk too large and a chunk small enough to be looked at at once, single tokens.
    for first, stop in [(0, 17), (17, 38), (38, 42), *((i, i + 1) for i in range(42, 47))]:
        parts.append(
            run(
                model,
                tokens[:, first:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, first:stop],
                past_key_values=cache,
            )
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], wanted[real])


def test_decoding_after_a_mask_with_holes_equals_the_full_pass() -> None:
    model = build_dilated(CONFIGS["llama"])
    tokens = draw(2, 26)
    mask = torch.ones(2, 26, dtype=torch.int64)
    mask[0, 15:20] = 0
    wanted = run(model, tokens, attention_mask=mask)[:, 25:]
    cache = DynamicCache(config=model.config)
    run(model, tokens[:, :25], attention_mask=mask[:, :25], past_key_values=cache)
    got = run(model, tokens[:, 25:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(got, wanted)


def test_a_step_looks_at_the_keys_behind_the_last_common_border(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def spy(q: Tensor, k: Tensor, *others: object, **options: object) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return attend_last_rows(q, k, *others, **options)

    monkeypatch.setattr(attention, "attend_last_rows", spy)
    model = build_dilated(CONFIGS["llama"], NESTED)
    cache = DynamicCache(config=model.config)
    for num_rows in (21, 19, 3, 1):
        run(model, draw(2, num_rows), past_key_values=cache)
    # Two layers; segments of 16 end before token 32, and 19 rows are too many.
    assert seen == [(3, 11)] * 2 + [(1, 12)] * 2


def test_free_places_of_a_static_cache_are_not_seen() -> None:
    model = build_dilated(CONFIGS["llama"])
    tokens = draw(2, 30)
    wanted = run(model, tokens)
    for mask in (None, torch.ones(2, 30, dtype=torch.int64)):
        cache = StaticCache(config=model.config, max_cache_len=40)
        for first, stop in [(0, 17), (17, 29), (29, 30)]:
            part = None if mask is None else mask[:, :stop]
            got = run(model, tokens[:, first:stop], past_key_values=cache, attention_mask=part)
            torch.testing.assert_close(got, wanted[:, first:stop], **CLOSE)
