"""BEiT-3 that writes: who sees what, the loss, decoding with kept keys, and dilated tasks."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from longnet_zoo.ops.dilated_attention import dilated_attention
from tests.models.beit3_draws import DILATED, NUM_IMAGE, NUM_PATCHES, TEXT_LEN, draw, make

PATTERNS = pytest.mark.parametrize("pattern", [{}, DILATED], ids=["dense", "dilated"])
# As DILATED, with a branch that reaches over image and text.
REACHING = {"segment_lengths": (7, 32), "dilation_rates": (1, 3)}
END = 0


def make_writer(**options):
    return make(heads=("masked_text",), **options).eval()


# --- Who sees what ---


@pytest.mark.parametrize("pattern", [{}, REACHING], ids=["dense", "dilated"])
def test_a_token_sees_the_image_and_the_text_up_to_itself(pattern):
    model, (image, tokens, _) = make_writer(**pattern), draw()
    logits = model.caption_logits(image, tokens)
    assert logits.shape == (3, TEXT_LEN, 61)
    for place in range(1, TEXT_LEN):
        others = tokens.clone()
        others[:, place] = (others[:, place] + 1) % 61
        changed = model.caption_logits(image, others)
        assert torch.equal(changed[:, :place], logits[:, :place])
        assert not torch.allclose(changed[:, place], logits[:, place])
    for patch in (0, NUM_PATCHES - 1):
        others = image.clone()
        row, column = 5 * (patch // 4), 5 * (patch % 4)
        others[:, :, row : row + 5, column : column + 5] += 1.0
        changed = model.caption_logits(others, tokens)
        assert ((changed - logits).abs().amax(2) > 1e-6).all()


def test_an_image_does_not_depend_on_its_text():
    model, (image, tokens, _) = make_writer(**DILATED), draw()
    states = []
    model.stack.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    model.caption_logits(image, tokens)
    model.forward_features(image)
    torch.testing.assert_close(states[0][:, :NUM_IMAGE], states[1])


def test_padding_changes_nothing():
    model, (image, tokens, _) = make_writer(**DILATED), draw()
    lengths = (9, 4, 2)
    padding = torch.arange(TEXT_LEN) >= torch.tensor(lengths)[:, None]
    logits = model.caption_logits(image, tokens, text_padding_mask=padding)
    for i, length in enumerate(lengths):
        alone = model.caption_logits(image[i : i + 1], tokens[i : i + 1, :length])
        torch.testing.assert_close(logits[i, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_memory_saving_changes_no_gradient():
    model, (image, tokens, _) = make_writer(**DILATED), draw()
    grads = []
    for saving in (None, MemorySaving(chunk_size=4), MemorySaving(chunk_size=None)):
        model.set_memory_saving(saving)
        model.zero_grad()
        model.caption_loss(image, tokens).backward()
        grads.append([x.grad for x in model.parameters() if x.grad is not None])
    torch.testing.assert_close(grads[1:], [grads[0]] * 2, atol=1e-6, rtol=1e-5)


def test_compiled_loss_equals_eager_in_one_graph():
    model, (image, tokens, _) = make_writer(**DILATED, num_layers=1), draw()
    compiled = torch.compile(model.caption_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, tokens), model.caption_loss(image, tokens))


# --- The loss ---


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_loss_is_that_of_the_next_token(chunk_size):
    model, (image, tokens, _) = make_writer(**DILATED), draw()
    loss = partial(model.caption_loss, image, tokens, chunk_size=chunk_size)
    logits = model.caption_logits(image, tokens)
    losses = functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(loss(), losses.mean())
    padding = torch.arange(TEXT_LEN) >= torch.tensor([[9], [4], [1]])
    expected = losses[~padding[:, 1:]].mean()
    torch.testing.assert_close(loss(text_padding_mask=padding), expected)


def test_longest_text_is_one_token_more_than_positions():
    model, image = make_writer(), draw(1)[0]
    assert model.caption_loss(image, torch.zeros(1, 14, dtype=torch.long)).isfinite()
    with pytest.raises(ValueError, match="max_text_len=13 per text, got 14"):
        model.caption_loss(image, torch.zeros(1, 15, dtype=torch.long))


# --- Writing ---


def written_by_whole_passes(model, image, tokens, lengths, steps):
    """Greedy texts, each by itself and every step by a pass over all of it."""
    texts = []
    for i, length in enumerate(lengths):
        text = tokens[i : i + 1, :length]
        for _ in range(steps):
            logits = model.caption_logits(image[i : i + 1], text)
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        new = text[0, length:].tolist()
        if END in new:
            new = new[: new.index(END)] + [END] * (steps - new.index(END))
        texts.append(new)
    return texts


@PATTERNS
@pytest.mark.parametrize("prompt", ["none", "equal", "padded"])
def test_greedy_texts_are_those_of_whole_passes(pattern, prompt):
    model, (image, tokens, _) = make_writer(**pattern), draw()
    lengths = {"none": (1, 1, 1), "equal": (5, 5, 5), "padded": (2, 5, 1)}[prompt]
    tokens = torch.full_like(tokens, END) if prompt == "none" else tokens[:, : max(lengths)]
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    options = {} if prompt == "none" else {"prompt": tokens}
    if prompt == "padded":
        options["prompt_padding_mask"] = padding
    written = []
    for bias in (0.0, 8.0):  # with the second, texts end early
        with torch.no_grad():
            model.masked_text_head.weight.normal_()
            model.masked_text_head.bias[END] = bias
        new = model.generate(image, max_new_tokens=8, end_id=END, **options)
        assert new.dtype == torch.int64
        assert new.tolist() == written_by_whole_passes(model, image, tokens, lengths, 8)
        written.append(new)
    assert len(written[0].unique()) > 5
    assert (written[1] == END).any()


@PATTERNS
def test_every_step_has_the_features_of_a_whole_pass(pattern):
    model, (image, tokens, _) = make_writer(**pattern), draw()
    seen = []
    hook = model.masked_text_head.register_forward_hook(lambda *call: seen.append(call[2]))
    new = model.generate(image, max_new_tokens=8, end_id=END, prompt=tokens[:, :4])
    hook.remove()
    steps = torch.stack(seen, dim=1)
    text = torch.cat([tokens[:, :4], new], dim=1)
    whole = model.caption_logits(image, text)[:, 3 : 3 + len(seen)]
    is_running = ((new == END).cumsum(1) - (new == END).long() == 0)[:, : len(seen)]
    assert is_running.sum() > 8
    torch.testing.assert_close(steps[is_running], whole[is_running], atol=1e-5, rtol=1e-5)


def test_the_image_runs_once_and_each_token_once():
    model, (image, tokens, _) = make_writer(**DILATED), draw()
    with torch.no_grad():
        model.masked_text_head.bias[END] -= 100.0
    lengths = []
    model.stack.blocks[0].register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    new = model.generate(image, max_new_tokens=5, end_id=END, prompt=tokens[:, :3])
    assert lengths == [NUM_IMAGE, 3, 1, 1, 1, 1]
    assert (new != END).all()


def test_a_batch_stops_when_all_texts_have_ended():
    model, (image, _, _) = make_writer(), draw()
    with torch.no_grad():
        model.masked_text_head.bias[END] += 100.0
    calls = []
    model.stack.register_forward_pre_hook(lambda *_: calls.append(1))
    assert model.generate(image, max_new_tokens=8, end_id=END).tolist() == [[END] * 8] * 3
    assert len(calls) == 2


def test_tokens_are_drawn_by_their_probabilities():
    model, image = make_writer(), draw(1)[0].expand(4000, -1, -1, -1)
    with torch.no_grad():
        model.masked_text_head.weight.zero_()
        model.masked_text_head.bias.fill_(-100.0)
        model.masked_text_head.bias[3:6] = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(1)
    draw_with = partial(model.generate, image, max_new_tokens=1, end_id=END, generator=generator)
    for options, expected in (
        ({"temperature": 1.0}, (0.5, 0.3, 0.2)),
        ({"temperature": 0.5}, (25 / 38, 9 / 38, 4 / 38)),
        ({"temperature": 1.0, "top_k": 2}, (0.625, 0.375, 0.0)),
        ({}, (1.0, 0.0, 0.0)),
    ):
        counts = draw_with(**options).flatten().bincount(minlength=61)
        shares = (counts[3:6] / 4000).tolist()
        assert shares == pytest.approx(expected, abs=0.03)
        assert counts[3:6].sum() == 4000
    again = [draw_with(temperature=1.0, generator=generator.manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)


def test_generation_learns_a_mapping():
    """Which of two colours an image has decides the word."""
    torch.manual_seed(3)
    model = make_writer(**DILATED)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    words = torch.tensor([[END, 7, 8, END], [END, 9, 10, END]])
    levels = torch.tensor([-1.0, 1.0])
    for _ in range(40):
        kinds = torch.randint(2, (16,))
        image = levels[kinds, None, None, None] + 0.1 * torch.randn(16, 3, 20, 20)
        optimizer.zero_grad()
        model.caption_loss(image, words[kinds]).backward()
        optimizer.step()
    image = levels[:, None, None, None].expand(-1, 3, 20, 20)
    new = model.generate(image, max_new_tokens=5, end_id=END)
    assert new.tolist() == [[7, 8, END, END, END], [9, 10, END, END, END]]


# --- Other tasks with a dilated pattern ---


@pytest.mark.parametrize("inputs", ["image", "text", "pair"])
def test_masked_modelling_trains_with_a_dilated_pattern(inputs):
    model = make(heads=("masked_image", "masked_text"), **DILATED)
    image, tokens, mask = draw(8)
    is_hidden = torch.rand(tokens.shape) < 0.3
    options = {}
    if inputs != "text":
        options |= {"image": image, "image_mask": mask}
        options["image_labels"] = image.unfold(2, 5, 5).unfold(3, 5, 5).flatten(4).mean((1, 4))
        options["image_labels"] = (options["image_labels"] > 0).long().flatten(1)
    if inputs != "image":
        options |= {"tokens": tokens.masked_fill(is_hidden, 60)}
        options["text_labels"] = tokens.masked_fill(~is_hidden, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.masked_loss(**options)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_questions_about_images_with_a_dilated_pattern():
    model, (image, tokens, _) = make(num_classes=5, **DILATED).eval(), draw()
    lengths = (9, 4, 1)
    padding = torch.arange(TEXT_LEN) >= torch.tensor(lengths)[:, None]
    logits = model(image, tokens, text_padding_mask=padding)
    for i, length in enumerate(lengths):
        alone = model(image[i : i + 1], tokens[i : i + 1, :length])
        torch.testing.assert_close(logits[i], alone[0], atol=1e-5, rtol=1e-5)
    other = model(image, tokens.masked_fill(padding, 7), text_padding_mask=padding)
    assert torch.equal(other, logits)
    # A question counts, and so does the image.
    assert not torch.allclose(model(image, tokens.roll(1, 1), text_padding_mask=padding), logits)
    assert not torch.allclose(model(image.roll(1, 0), tokens, text_padding_mask=padding), logits)


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "got max_new_tokens=0 and end_id=0"),
        ({"end_id": 61}, ValueError, r"end_id in \[0, 61\), got max_new_tokens=3 and end_id=61"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite, 0 or more, got -1.0"),
        ({"top_k": 2.5}, TypeError, "top_k must be None or an integer, got 2.5"),
        ({"end_id": None}, TypeError, "must be integers, got max_new_tokens=3 and end_id=None"),
        ({"top_k": 0}, ValueError, "top_k must be None, or 1 or more, got 0"),
        ({"max_new_tokens": 14}, ValueError, "= 14 tokens, got 1 and max_new_tokens=14"),
        ({"prompt": torch.zeros(3, 4)}, TypeError, "tokens must be int64 or int32, got torch.flo"),
        ({"prompt": torch.zeros(2, 4).long()}, ValueError, "got 3 images and 2 prompts"),
        ({"prompt_padding_mask": torch.zeros(3, 4).bool()}, ValueError, "got prompt=None"),
        (
            {"prompt": torch.zeros(3, 2).long(), "prompt_padding_mask": torch.ones(3, 2).bool()},
            ValueError,
            r"leave each prompt a token, got none for prompts \[0, 1, 2\]",
        ),
        (
            {
                "prompt": torch.zeros(3, 2).long(),
                "prompt_padding_mask": torch.tensor([[True, False]] * 3),
            },
            ValueError,
            r"prompt_padding_mask must be True on the right .* in rows \[0, 1, 2\]",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_options_of_generation_are_refused(options, error, message):
    model, image = make_writer(), draw()[0]
    with pytest.raises(error, match=message):
        model.generate(image, **({"max_new_tokens": 3, "end_id": END} | options))


def test_models_that_cannot_write_are_refused():
    image, tokens, _ = draw()
    write = {"max_new_tokens": 3, "end_id": END}
    with pytest.raises(ValueError, match="needs the head 'masked_text', got a model with heads="):
        make().eval().generate(image, **write)
    with pytest.raises(ValueError, match="needs the head 'masked_text'"):
        make().caption_loss(image, tokens)
    with pytest.raises(ValueError, match="got one in training mode"):
        make_writer().train().generate(image, **write)
    zero = make_writer(padded_keys="zero", **DILATED)
    with pytest.raises(ValueError, match="padded_keys='zero' an image would not"):
        zero.generate(image, **write)
    with pytest.raises(ValueError, match="padded_keys='zero' a prefix would not"):
        zero.caption_loss(image, tokens)
    with pytest.raises(ValueError, match=r"at least two tokens, .* got \(3, 1\)"):
        make_writer().caption_loss(image, tokens[:, :1])
    holes = torch.zeros(3, TEXT_LEN, dtype=torch.bool)
    holes[1, 4] = True
    with pytest.raises(ValueError, match=r"text_padding_mask must be True on .* in rows \[1\]"):
        make_writer().caption_logits(image, tokens, text_padding_mask=holes)
    parallel, message = make_writer(), "whose attention_op is functools.partial"
    parallel.stack.blocks[0].attention.attention_op = partial(dilated_attention)
    with pytest.raises(NotImplementedError, match=message):
        parallel.caption_loss(image, tokens)
    with pytest.raises(NotImplementedError, match=message):
        parallel.generate(image, **write)


def test_the_tiny_model_writes():
    model = create_model("longnet_beit3_tiny", heads=("masked_text",), **DILATED).eval()
    new = model.generate(torch.randn(1, 3, 64, 64), max_new_tokens=3, end_id=256)
    assert new.shape == (1, 3)
