"""What our models return under Transformers' conventions, with padding anywhere."""

import pytest
import torch

from .longnet_toys import CLASSES, make, make_tokens, output_of


@pytest.mark.parametrize("norm", ["sub_ln", "deepnorm"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_hidden_states_are_those_of_the_stack(model_class, norm):
    model, tokens = make(model_class, norm=norm), make_tokens()
    outputs = model(tokens, output_hidden_states=True)
    network = model.base_model.network
    _, states = network.stack(network.embedding(tokens), return_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    for ours, theirs in zip(states[:-1], outputs.hidden_states[:-1], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    last = model.base_model(tokens).last_hidden_state
    torch.testing.assert_close(outputs.hidden_states[-1], last, rtol=0, atol=0)
    assert model(tokens).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 4


def test_hidden_states_carry_gradients_and_leave_no_hooks():
    model, tokens = make(), make_tokens()
    outputs = model(tokens, output_hidden_states=True)
    (grad,) = torch.autograd.grad(outputs.logits[0, -1, 3], outputs.hidden_states[1])
    assert grad.abs().sum() > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("model_class", CLASSES)
def test_tuples_hold_what_output_objects_hold(model_class):
    model, tokens = make(model_class), make_tokens()
    outputs = model(tokens, output_hidden_states=True)
    values = model(tokens, output_hidden_states=True, return_dict=False)
    assert type(values) is tuple
    torch.testing.assert_close(values, outputs.to_tuple(), rtol=0, atol=0)
    model.config.return_dict = False
    assert type(model(tokens)) is tuple


@pytest.mark.parametrize("model_class", CLASSES)
def test_attention_matrices_are_refused(model_class):
    model, tokens = make(model_class), make_tokens()
    with pytest.raises(NotImplementedError, match="got output_attentions=True"):
        model(tokens, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(NotImplementedError, match="got output_attentions=True"):
        model(tokens)
    model(tokens, output_attentions=False)


def test_logits_of_some_positions():
    model, tokens = make(), make_tokens()
    logits = output_of(model, tokens)
    torch.testing.assert_close(output_of(model, tokens, logits_to_keep=3), logits[:, -3:])
    torch.testing.assert_close(output_of(model, tokens, logits_to_keep=0), logits)
    places = torch.tensor([4, 2])
    torch.testing.assert_close(output_of(model, tokens, logits_to_keep=places), logits[:, places])
    with pytest.raises(ValueError, match=r"logits_to_keep .* got \(2, 17\)"):
        model(tokens, logits_to_keep=tokens)


@pytest.mark.parametrize("position", ["xpos", "alibi"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_padding_anywhere_leaves_each_sequence_as_it_is(model_class, position):
    model = make(model_class, position=position).double()
    lengths, width = [13, 17, 1, 6], 17
    rows = [make_tokens(1, length)[0] for length in lengths]
    tokens, mask = torch.full((4, width), 60), torch.zeros(4, width, dtype=torch.int64)
    places = [range(width - 13, width), range(width), [5], [0, 3, 4, 9, 10, 16]]
    for number, (row, where) in enumerate(zip(rows, places, strict=True)):
        tokens[number, list(where)] = row
        mask[number, list(where)] = 1
    outputs = model(tokens, attention_mask=mask, output_hidden_states=True)
    for number, (row, where) in enumerate(zip(rows, places, strict=True)):
        alone = model(row[None], output_hidden_states=True)
        torch.testing.assert_close(outputs[0][number, list(where)], alone[0][0])
        for batch_state, state in zip(outputs.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(batch_state[number, list(where)], state[0])
    embeds = model.get_input_embeddings()(tokens)
    again = model(inputs_embeds=embeds, attention_mask=mask.bool())
    torch.testing.assert_close(again[0][mask.bool()], outputs[0][mask.bool()])


def test_a_mask_of_another_shape_is_refused():
    model, tokens = make(), make_tokens()
    with pytest.raises(ValueError, match=r"= \(2, 17\), .* got \(2, 1, 17, 17\)"):
        model(tokens, attention_mask=torch.ones(2, 1, 17, 17))
    with pytest.raises(ValueError, match=r"= \(2, 17\), .* got \(2, 16\)"):
        model(tokens, attention_mask=torch.ones(2, 16))
