import longnet_zoo as lz


def test_public_names_exist_and_are_documented():
    for name in lz.__all__:
        assert getattr(lz, name).__doc__, name


def test_public_names_are_those_of_the_readme():
    assert set(lz.__all__) == {
        "BigBirdBlocks",
        "BlockSparse",
        "DilatedAttention",
        "DilatedPattern",
        "HashBuckets",
        "ModelInfo",
        "MultiheadDilatedAttention",
        "MultimodalDilatedAttention",
        "RingAttention",
        "StreamingCache",
        "TokenSubset",
        "create_model",
        "create_model_and_transforms",
        "dilated_attention",
        "explain_backend",
        "from_torchscale",
        "generate_text",
        "get_tokenizer",
        "list_models",
        "model_info",
        "parallelize",
        "score_file",
        "to_torchscale_state_dict",
        "zero_shot_classifier",
        "zero_shot_logits",
    }
