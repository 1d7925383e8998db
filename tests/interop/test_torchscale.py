"""Modules of the torchscale release on the package index against the models made of them.

`make setup` installs it (see the Makefile); the other tests of this folder do without.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longnet_zoo.interop.torchscale import from_torchscale, to_torchscale_state_dict
from longnet_zoo.models import BEiT3, LongNetLM, LongNetMLM

SIZES = {"embed_dim": 24, "attention_heads": 4, "ffn_embed_dim": 40, "layers": 3}
VOCAB_SIZE = 61
LENGTHS = [1, 7, 33]
NORMS = {
    "sub_ln": {},
    "pre_ln": {"subln": False},
    "deepnorm": {"subln": False, "deepnorm": True},
}
POSITIONS = {
    "none": {},
    "xpos": {"xpos_rel_pos": True, "xpos_scale_base": 16},
    "relative": {"rel_pos_buckets": 12, "max_rel_pos": 20},
}
BEIT3_SIZES = {"img_size": 20, "patch_size": 5, "max_source_positions": 40}


@pytest.fixture(scope="module")
def torchscale():
    """The classes of torchscale; imported late, since that takes seconds."""
    pytest.importorskip("torchscale", reason="needs torchscale", exc_type=ModuleNotFoundError)
    with warnings.catch_warnings():
        # Renamed in timm since torchscale's last release.
        warnings.filterwarnings("ignore", "Importing from timm.models.layers", FutureWarning)
        from torchscale.architecture import config, decoder, encoder, encoder_decoder, retnet
        from torchscale.model import BEiT3 as beit3
    classes = {"Encoder": encoder.Encoder, "Decoder": decoder.Decoder, "BEiT3": beit3.BEiT3}
    classes |= {name: value for name, value in vars(config).items() if name.endswith("Config")}
    classes["EncoderDecoder"] = encoder_decoder.EncoderDecoder
    classes["RetNetDecoder"] = retnet.RetNetDecoder
    return SimpleNamespace(**classes)


def shake(module):
    """Moves every parameter away from its special initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.eval()


def make_encoder(torchscale, *, embed_tokens=None, **options):
    sizes = {f"encoder_{name}": value for name, value in SIZES.items()}
    return shake(torchscale.Encoder(torchscale.EncoderConfig(**sizes, **options), embed_tokens))


def make_decoder(torchscale, *, has_embedding=True, **options):
    sizes = {f"decoder_{name}": value for name, value in SIZES.items()}
    config = torchscale.DecoderConfig(**{"vocab_size": VOCAB_SIZE, **sizes, **options})
    return shake(torchscale.Decoder(config, embedding() if has_embedding else None))


def make_beit3(torchscale, **options):
    sizes = {f"encoder_{name}": value for name, value in SIZES.items()}
    flags = {"multiway": True, "no_output_layer": True, "vocab_size": VOCAB_SIZE}
    return shake(
        torchscale.BEiT3(torchscale.EncoderConfig(**{**sizes, **BEIT3_SIZES, **flags, **options}))
    )


def embedding():
    return nn.Embedding(VOCAB_SIZE, SIZES["embed_dim"])


def padding(batch, length):
    """Right padding of different lengths; the first row has none."""
    kept = torch.linspace(length, 1, batch).long()
    return torch.arange(length) >= kept[:, None]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def assert_goes_back(model, module):
    """Our weights must fill another module of the same options, and give its outputs back."""
    other = shake(copy.deepcopy(module))
    other.load_state_dict(to_torchscale_state_dict(model), strict=True)
    theirs = module.state_dict()
    for name, tensor in other.state_dict().items():
        if name.startswith("self_attn_relative_position"):
            half = len(tensor) // 2  # the other half is for later keys
            assert torch.equal(tensor[:half], theirs[name][:half])
        elif name.endswith("xpos.scale"):  # constants
            torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=0)
        else:
            assert torch.equal(tensor, theirs[name]), name
    return other


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_encoder_gives_the_same_outputs(torchscale, norm, position):
    module = make_encoder(torchscale, **NORMS[norm], **POSITIONS[position])
    model = from_torchscale(module)
    assert isinstance(model, LongNetMLM)
    assert (model.config.norm, model.config.position or "none") == (norm, position)
    assert model.config.pattern.is_dense
    other = assert_goes_back(model, module)
    for length in LENGTHS:
        x, mask = torch.randn(3, length, 24), padding(3, length)
        scattered = torch.rand(3, length) < 0.4
        scattered[:, 0] = False
        for where in (None, mask, scattered):
            theirs = module(None, encoder_padding_mask=where, token_embeddings=x)["encoder_out"]
            ours = model(inputs_embeds=x, key_padding_mask=where)
            kept = torch.ones_like(mask) if where is None else ~where
            assert_close(ours[kept], theirs[kept])
            back = other(None, encoder_padding_mask=where, token_embeddings=x)["encoder_out"]
            assert_close(back, theirs)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_decoder_gives_the_same_outputs(torchscale, norm, position):
    module = make_decoder(torchscale, **NORMS[norm], **POSITIONS[position])
    model = from_torchscale(module)
    assert isinstance(model, LongNetLM)
    assert (model.config.norm, model.config.position or "none") == (norm, position)
    other = assert_goes_back(model, module)
    for length in LENGTHS:
        tokens, mask = torch.randint(VOCAB_SIZE, (3, length)), padding(3, length)
        theirs = module(tokens)[0]
        assert_close(model(tokens), theirs)
        assert_close(other(tokens)[0], theirs)
        features = module(tokens, features_only=True)[0]
        assert_close(model.forward_features(tokens), features)
        theirs = module(tokens, self_attn_padding_mask=mask)[0]
        assert_close(model(tokens, key_padding_mask=mask)[~mask], theirs[~mask])


def test_shared_embedding_becomes_a_tied_head(torchscale):
    module = make_decoder(
        torchscale, share_decoder_input_output_embed=True, no_scale_embedding=False
    )
    model = from_torchscale(module)
    assert model.config.tie_embeddings
    assert model.config.scale_embedding
    assert model.head is None
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    assert_close(model(tokens), module(tokens)[0])
    assert_goes_back(model, module)
    # What the module has counts, not what its options say.
    module.output_projection = nn.Linear(24, VOCAB_SIZE, bias=False)
    model = from_torchscale(module)
    assert not model.config.tie_embeddings
    assert_close(model(tokens), module(tokens)[0])


def test_encoder_with_tokens_and_a_shared_embedding(torchscale):
    sizes = {f"encoder_{name}": value for name, value in SIZES.items()}
    config = torchscale.EncoderConfig(
        **sizes, vocab_size=VOCAB_SIZE, share_encoder_input_output_embed=True
    )
    config.encoder_embedding_type = "language"  # asserted, and in no constructor
    module = shake(torchscale.Encoder(config, embedding()))
    model = from_torchscale(module)
    assert model.config.tie_embeddings
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    assert_close(model(tokens), module(tokens)["encoder_out"])
    assert_close(model.forward_features(tokens), module(tokens, features_only=True)["encoder_out"])
    assert_goes_back(model, module)


def test_decoder_without_output_layer_returns_features(torchscale):
    module = make_decoder(torchscale, no_output_layer=True)
    model = from_torchscale(module)
    assert model.config.head_size == 0
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    assert_close(model(tokens), module(tokens, features_only=True)[0])
    assert_goes_back(model, module)


def test_head_without_embedding(torchscale):
    module = make_encoder(torchscale, vocab_size=7)
    model = from_torchscale(module)
    assert (model.config.vocab_size, model.config.head_size) == (None, 7)
    x = torch.randn(2, 9, 24)
    assert_close(model(inputs_embeds=x), module(None, token_embeddings=x)["encoder_out"])
    assert_goes_back(model, module)


@pytest.mark.parametrize("options", [*NORMS.values(), {"normalize_output": False}], ids=str)
def test_beit3_gives_the_same_outputs(torchscale, options):
    module = make_beit3(torchscale, **options)
    model = from_torchscale(module)
    assert isinstance(model, BEiT3)
    other = assert_goes_back(model, module)
    hidden = torch.rand(3, 16) < 0.4
    for length in (1, 7, 38):
        image, tokens = torch.randn(3, 3, 20, 20), torch.randint(VOCAB_SIZE, (3, length))
        mask = padding(3, length)
        for x in (None, image):
            for text in (tokens, None) if x is not None else (tokens,):
                seen = None if text is None else mask
                hide = None if x is None else hidden
                theirs = module(text, x, seen, vision_masked_position=hide)["encoder_out"]
                ours = model.forward_features(x, text, text_padding_mask=seen, image_mask=hide)
                kept = torch.ones(theirs.shape[:2], dtype=torch.bool)
                if text is not None:
                    kept[:, -length:] = ~mask
                assert_close(ours[kept], theirs[kept])
                back = other(text, x, seen, vision_masked_position=hide)["encoder_out"]
                assert_close(back, theirs)


def test_gradients_are_the_same(torchscale):
    module = make_encoder(torchscale, **POSITIONS["relative"])
    model = from_torchscale(module)
    x, cotangent = torch.randn(2, 11, 24), torch.randn(2, 11, 24)
    module(None, token_embeddings=x)["encoder_out"].backward(cotangent)
    model(inputs_embeds=x).backward(cotangent)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    ours = to_torchscale_state_dict(model)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_and_mode_are_kept(torchscale, dtype):
    module = make_decoder(torchscale, attention_dropout=0.5).to(dtype)
    model = from_torchscale(module)
    assert {x.dtype for x in model.parameters()} == {dtype}
    assert not model.training
    assert from_torchscale(module.train()).training
    module.eval()
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    # torchscale's activations are float32 in any type.
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(model(tokens), module(tokens)[0], atol=tolerance, rtol=0)


def test_weights_are_copies(torchscale):
    module = make_decoder(torchscale)
    model = from_torchscale(module)
    before = model.embedding.weight.clone()
    shake(module)
    assert torch.equal(model.embedding.weight, before)


def test_rates_and_checkpointing_are_kept(torchscale):
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
    module = make_encoder(
        torchscale, **rates, drop_path_rate=0.4, checkpoint_activations=True, layernorm_eps=1e-3
    )
    model = from_torchscale(module)
    config = model.config
    assert {name: getattr(config, name) for name in rates} == rates
    assert (config.drop_path, config.eps) == (0.4, 1e-3)
    assert all(block.memory_saving is not None for block in model.stack.blocks)
    assert model.stack.blocks[2].drop_path.drop_prob == module.layers[2].drop_path.drop_prob == 0.4
    x = torch.randn(2, 9, 24, requires_grad=True)  # or checkpointing would warn
    assert_close(model(inputs_embeds=x), module(None, token_embeddings=x)["encoder_out"])
    plain = from_torchscale(make_encoder(torchscale))
    assert all(block.memory_saving is None for block in plain.stack.blocks)
    # A rate that was changed by hand is neither ignored nor guessed.
    module.layers[1].self_attn.dropout_module.p = 0.25
    message = r"layers\.1\.self_attn\.dropout_module\.p must be args\.attention_dropout=0\.2.*0\.25"
    with pytest.raises(ValueError, match=message):
        from_torchscale(module)


def make_encoder_decoder(torchscale, **options):
    sizes = {f"{part}_{x}": size for part in ("encoder", "decoder") for x, size in SIZES.items()}
    config = torchscale.EncoderDecoderConfig(**sizes, vocab_size=VOCAB_SIZE, **options)
    parts = torchscale.EncoderDecoder(config)
    parts.encoder.embed_tokens = embedding()
    return shake(parts)


def test_encoder_of_an_encoder_decoder(torchscale):
    module = make_encoder_decoder(torchscale).encoder
    model = from_torchscale(module)
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    assert_close(model(tokens), module(tokens)["encoder_out"])
    # DeepNorm has other factors there.
    module = make_encoder_decoder(torchscale, subln=False, deepnorm=True).encoder
    message = (
        r"norm='deepnorm' must go with .*alpha=1\.56508, got .* and alpha=1\.14179 in layers\.0"
    )
    with pytest.raises(NotImplementedError, match=message):
        from_torchscale(module)


def test_modules_without_a_counterpart_are_refused(torchscale):
    parts = make_encoder_decoder(torchscale)
    with pytest.raises(NotImplementedError, match=r"encoder_attn in layers\.0"):
        from_torchscale(parts.decoder)
    with pytest.raises(TypeError, match=r"got a EncoderDecoder of torchscale.*part 'encoder'"):
        from_torchscale(parts)
    config = torchscale.RetNetConfig(decoder_layers=1, vocab_size=VOCAB_SIZE)
    retnet = torchscale.RetNetDecoder(config, nn.Embedding(VOCAB_SIZE, 768))
    with pytest.raises(TypeError, match=r"got a RetNetDecoder of torchscale\.architecture\.retnet"):
        from_torchscale(retnet)
    with pytest.raises(NotImplementedError, match="activation_fn='relu'"):
        from_torchscale(make_encoder(torchscale, activation_fn="relu"))
    options = {"subln": False, "encoder_normalize_before": False}
    with pytest.raises(NotImplementedError, match="encoder_normalize_before=False"):
        from_torchscale(make_encoder(torchscale, **options))
    beit3 = make_beit3(torchscale, no_output_layer=False)
    with pytest.raises(NotImplementedError, match=r"no output_projection, got Linear\(in_fea"):
        from_torchscale(beit3)
    beit3.encoder.output_projection = None  # the cure
    image = torch.randn(1, 3, 20, 20)
    ours = from_torchscale(beit3).forward_features(image)
    assert_close(ours, beit3(visual_tokens=image)["encoder_out"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("decoder_attention_heads", 6, r"layers.0.self_attn.num_heads is 6, got 4"),
        ("layernorm_eps", 1e-3, r"eps is 0.001, got 1e-05"),
        ("no_scale_embedding", False, r"embed_scale is 4.*, got 1.0"),
        ("xpos_scale_base", 99, r"scale_base is 99.0, got 512"),
    ],
)
def test_options_changed_after_building_are_refused(torchscale, option, value, message):
    args = torchscale.DecoderConfig(
        **{f"decoder_{name}": size for name, size in SIZES.items()},
        vocab_size=VOCAB_SIZE,
        xpos_rel_pos=True,
    )
    module = torchscale.Decoder(args, nn.Embedding(VOCAB_SIZE, SIZES["embed_dim"]))
    from_torchscale(module)
    setattr(args, option, value)
    with pytest.raises(ValueError, match=message):
        from_torchscale(module)
    setattr(args, option, getattr(torchscale.DecoderConfig(), option))
    args.decoder_attention_heads = SIZES["attention_heads"]
    module.layers[0].ffn.activation_fn = torch.relu
    with pytest.raises(ValueError, match=r"ffn.activation_fn is .*gelu.*, got .*relu"):
        from_torchscale(module)


def test_odd_buckets_are_refused(torchscale):
    sizes = {f"decoder_{name}": size for name, size in SIZES.items()}
    args = torchscale.DecoderConfig(**sizes, rel_pos_buckets=33, max_rel_pos=64)
    with pytest.raises(ValueError, match=r"rel_pos_buckets must be even, .* got 33"):
        from_torchscale(torchscale.Decoder(args))
