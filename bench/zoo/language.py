"""Models of transformers, of tiny configurations: text, images, sound, series, and their pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip.bench.zoo.entry import BATCH, CLASSES, Batch, Entry, generator, labels
from lightning_lip.reporting.extras import extra

WIDTH, LENGTH, VOCABULARY = 32, 12, 99

SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
}
"""What most configurations call their sizes."""

IMAGES = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}


def _build(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return what builds a model of this class from options of its configuration."""

    def made() -> nn.Module:
        cls = getattr(extra("transformers", "zoo"), name)
        model: nn.Module = cls(cls.config_class(**options))
        return model

    return made


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that the model computes from labels among its arguments."""
    loss: Tensor = model(**batch).loss
    return loss


def _tokens() -> Tensor:
    # Above the special tokens, of which some models allow a certain number only.
    return torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator())


def _embedded(width: int) -> Tensor:
    return torch.randn(BATCH, LENGTH, width, generator=generator())


def _classifier(name: str, config: str, width: int = WIDTH, **options: Any) -> Entry:
    """Return an entry for a classifier of text."""

    def batch() -> Batch:
        return {"input_ids": _tokens(), "labels": labels()}

    build = _build(f"{config}ForSequenceClassification", options | {"num_labels": CLASSES})
    return Entry(f"transformers/{name}", build, batch, own_loss, lambda _: {"inputs_embeds": _embedded(width)})


def _causal(name: str, model: str, **options: Any) -> Entry:
    """Return an entry for a language model."""

    def batch() -> Batch:
        return {"input_ids": _tokens(), "labels": _tokens()}

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    build = _build(model, special | options)
    return Entry(f"transformers/{name}", build, batch, own_loss, lambda _: {"inputs_embeds": _embedded(WIDTH)})


def _translator(name: str, config: str, **options: Any) -> Entry:
    """Return an entry for an encoder and decoder of text."""

    def batch() -> Batch:
        return {"input_ids": _tokens(), "labels": _tokens()}

    def example(_: Batch) -> dict[str, Tensor]:
        return {"inputs_embeds": _embedded(WIDTH), "decoder_inputs_embeds": _embedded(WIDTH)}

    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    build = _build(f"{config}ForConditionalGeneration", special | {"vocab_size": VOCABULARY} | options)
    return Entry(f"transformers/{name}", build, batch, own_loss, example)


def _fed(
    name: str, model: str, inputs: Mapping[str, tuple[int, ...]], target: Callable[[], Batch], **options: Any
) -> Entry:
    """Return an entry for a model of floating-point inputs, of these shapes, and the entries that `target` makes."""

    def floating() -> Batch:
        return {key: torch.randn(BATCH, *shape, generator=generator()) for key, shape in inputs.items()}

    def example(_: Batch) -> Batch:
        rest = {key: value for key, value in target().items() if key.startswith("decoder")}
        return floating() | rest

    return Entry(f"transformers/{name}", _build(model, options), lambda: floating() | target(), own_loss, example)


def _image(name: str, config: str, size: int = 32, **options: Any) -> Entry:
    """Return an entry for a classifier of images."""
    inputs = {"pixel_values": (3, size, size)}
    target = {"num_labels": CLASSES}
    return _fed(name, f"{config}ForImageClassification", inputs, lambda: {"labels": labels()}, **(options | target))


def _clip() -> Entry:
    def batch() -> Batch:
        pixels = torch.randn(BATCH, 3, 32, 32, generator=generator())
        return {"input_ids": _tokens(), "pixel_values": pixels}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(**batch, return_loss=True).loss
        return value

    text = SMALL | {"max_position_embeddings": 16, "eos_token_id": 2}
    build = _build("CLIPModel", {"text_config": text, "vision_config": IMAGES, "projection_dim": 16})
    return Entry("transformers/clip", build, batch, loss, lambda batch: batch)


ENTRIES = [
    _classifier("bert", "Bert", **SMALL),
    _classifier("roberta", "Roberta", **SMALL),
    _classifier("electra", "Electra", embedding_size=WIDTH, **SMALL),
    _classifier("albert", "Albert", width=16, embedding_size=16, **SMALL),
    _classifier("deberta", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], **SMALL),
    _classifier("distilbert", "DistilBert", dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY),
    _classifier("xlnet", "XLNet", d_model=WIDTH, n_layer=2, n_head=4, d_inner=64, vocab_size=VOCABULARY),
    _classifier("modernbert", "ModernBert", pad_token_id=0, **SMALL),
    _causal("gpt2", "GPT2LMHeadModel", n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    _causal("gpt_neox", "GPTNeoXForCausalLM", **SMALL),
    _causal("opt", "OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=WIDTH, **SMALL),
    _causal("bloom", "BloomForCausalLM", hidden_size=WIDTH, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    _causal("llama", "LlamaForCausalLM", **SMALL),
    _causal("mistral", "MistralForCausalLM", num_key_value_heads=2, **SMALL),
    _causal("gemma", "GemmaForCausalLM", num_key_value_heads=2, head_dim=8, **SMALL),
    _causal("qwen2", "Qwen2ForCausalLM", num_key_value_heads=2, **SMALL),
    _causal("phi", "PhiForCausalLM", **SMALL),
    _causal("mixtral", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, **SMALL),
    _causal("mamba", "MambaForCausalLM", hidden_size=WIDTH, num_hidden_layers=2, state_size=4, vocab_size=VOCABULARY),
    _translator("t5", "T5", d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    _translator(
        "bart",
        "Bart",
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    ),
    _image("vit", "ViT", **IMAGES),
    _image("dinov2", "Dinov2", **(IMAGES | {"mlp_ratio": 2})),
    _image("beit", "Beit", **IMAGES),
    _image("swin", "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    _image("convnext", "ConvNext", hidden_sizes=[16, 32, 48], depths=[1, 1, 2], num_stages=3),
    _image("resnet", "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    _image(
        "segformer",
        "Segformer",
        64,
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        sr_ratios=[2, 1],
        num_attention_heads=[2, 4],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    _fed(
        "whisper",
        "WhisperForConditionalGeneration",
        {"input_features": (16, 40)},
        lambda: {"labels": _tokens(), "decoder_input_ids": _tokens()},
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    ),
    _fed(
        "wav2vec2",
        "Wav2Vec2ForSequenceClassification",
        {"input_values": (800,)},
        lambda: {"labels": labels()},
        **SMALL,
        conv_dim=[16, 16],
        conv_kernel=[8, 4],
        conv_stride=[4, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_feat_extract_layers=2,
        classifier_proj_size=16,
        mask_time_length=2,
        num_labels=CLASSES,
    ),
    _fed(
        "patchtst",
        "PatchTSTForPrediction",
        {"past_values": (32, 3)},
        lambda: {"future_values": torch.randn(BATCH, 8, 3, generator=generator())},
        num_input_channels=3,
        context_length=32,
        prediction_length=8,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=32,
        loss="mse",
    ),
    _clip(),
]
