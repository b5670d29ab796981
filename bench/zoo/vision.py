"""Models of torchvision and timm: every family, at the smallest of its widths or with the widths made small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_lip.bench.zoo.entry import CLASSES, Entry, vector
from lightning_lip.reporting.extras import extra


def _torchvision(name: str, size: int = 32, build: Callable[[Any], nn.Module] | None = None, **options: Any) -> Entry:
    """Return an entry of torchvision; `build` makes the model from torchvision.models where a name does not."""

    def made() -> nn.Module:
        models = extra("torchvision.models", "zoo")
        model: nn.Module = build(models) if build else models.get_model(name, num_classes=CLASSES, **options)
        return model

    return vector(f"torchvision/{name}", made, (3, size, size))


def _video(name: str, **options: Any) -> Entry:
    def made() -> nn.Module:
        model: nn.Module = extra("torchvision.models", "zoo").get_model(name, num_classes=CLASSES, **options)
        return model

    return vector(f"torchvision/{name}", made, (3, 8, 32, 32))


def _timm(name: str, size: int = 32, build: Callable[[Any], nn.Module] | None = None, **options: Any) -> Entry:
    """Return an entry of timm; `build` makes the model from timm.models, of a smaller size than its names have."""

    def made() -> nn.Module:
        timm = extra("timm", "zoo")
        model: nn.Module = build(timm.models) if build else timm.create_model(name, num_classes=CLASSES, **options)
        return model

    return vector(f"timm/{name}", made, (3, size, size))


def _convnext(models: Any) -> nn.Module:
    setting = [models.convnext.CNBlockConfig(*sizes) for sizes in ((24, 48, 2), (48, 96, 2), (96, None, 2))]
    model: nn.Module = models.ConvNeXt(setting, num_classes=CLASSES)
    return model


def _swin(models: Any, version: str) -> nn.Module:
    transformer = models.swin_transformer
    block = {"block": transformer.SwinTransformerBlockV2, "downsample_layer": transformer.PatchMergingV2}
    model: nn.Module = models.SwinTransformer(
        [2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **(block if version == "v2" else {})
    )
    return model


def _maxvit(models: Any) -> nn.Module:
    model: nn.Module = models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=CLASSES)
    return model


def _vit(models: Any) -> nn.Module:
    model: nn.Module = models.VisionTransformer(32, 8, 3, 4, 48, 96, num_classes=CLASSES)
    return model


def _resnet(models: Any, **options: Any) -> nn.Module:
    model: nn.Module = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, **options)
    return model


def _standardised(models: Any) -> nn.Module:
    layers = extra("timm.layers", "zoo")
    model: nn.Module = models.ResNetV2(
        [1, 1, 1, 1],
        channels=(32, 64, 128, 256),
        num_classes=CLASSES,
        stem_chs=16,
        conv_layer=layers.StdConv2d,
        norm_layer=partial(layers.GroupNormAct, num_groups=8),
    )
    return model


def _mixer(models: Any, **options: Any) -> nn.Module:
    model: nn.Module = models.MlpMixer(CLASSES, img_size=32, patch_size=8, num_blocks=3, embed_dim=64, **options)
    return model


def _gmlp(models: Any) -> nn.Module:
    layers = extra("timm.layers", "zoo")
    return _mixer(models, block_layer=models.mlp_mixer.SpatialGatingBlock, mlp_layer=layers.GatedMlp, mlp_ratio=2)


def _resmlp(models: Any) -> nn.Module:
    return _mixer(models, block_layer=models.mlp_mixer.ResBlock, norm_layer=models.mlp_mixer.Affine, mlp_ratio=2)


def _volo(models: Any) -> nn.Module:
    model: nn.Module = models.VOLO(
        [1, 1, 1, 1], 64, num_classes=CLASSES, embed_dims=(48, 96, 96, 96), num_heads=(2, 4, 4, 4), use_mix_token=False
    )
    return model


def _gcvit(models: Any) -> nn.Module:
    sizes = {"window_size": (2, 2, 2, 2), "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    model: nn.Module = models.GlobalContextVit(num_classes=CLASSES, img_size=(64, 64), window_ratio=None, **sizes)
    return model


def _focalnet(models: Any) -> nn.Module:
    model: nn.Module = models.FocalNet(num_classes=CLASSES, embed_dim=24, depths=(1, 1, 1, 1))
    return model


def _coat(models: Any) -> nn.Module:
    model: nn.Module = models.CoaT(
        img_size=64,
        patch_size=4,
        num_classes=CLASSES,
        embed_dims=(32, 32, 32, 32),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        num_heads=8,
        mlp_ratios=(2, 2, 2, 2),
    )
    return model


def _densenet(models: Any) -> nn.Module:
    model: nn.Module = models.DenseNet(12, (3, 4, 4), 24, num_classes=CLASSES)
    return model


# At 32 pixels the last maps of some have one pixel, and batch normalisation is over the 8 numbers of the batch. SGD is
# chaotic then: a coefficient of 1e-9 changes the loss after 20 steps from .9 to 0, or from 1.3 to 9.
TORCHVISION = [
    _torchvision("alexnet", 64),
    _torchvision("vgg11", 32),
    _torchvision("vgg11_bn", 32),
    _torchvision("resnet18"),
    _torchvision("resnet-bottleneck", build=_resnet),
    _torchvision("resnext", build=lambda models: _resnet(models, groups=8, width_per_group=4)),
    _torchvision("resnet-groupnorm", build=lambda models: _resnet(models, norm_layer=lambda n: nn.GroupNorm(8, n))),
    _torchvision("densenet", build=_densenet),
    _torchvision("squeezenet1_1", 64),
    _torchvision("googlenet", 64, aux_logits=True, init_weights=True),
    _torchvision("inception_v3", 96, aux_logits=False, init_weights=True),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("mnasnet0_5", 64),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("efficientnet_b0", 64),
    _torchvision("regnet_x_400mf"),
    _torchvision("regnet_y_400mf"),
    _torchvision("convnext", build=_convnext),
    _torchvision("vit", build=_vit),
    _torchvision("swin", build=lambda models: _swin(models, "v1")),
    _torchvision("swin_v2", build=lambda models: _swin(models, "v2")),
    _torchvision("maxvit", 64, build=_maxvit),
    _torchvision("lraspp_mobilenet_v3_large", 64, weights_backbone=None),
    _video("mc3_18"),
]

TIMM = [
    _timm("resnetv2-standardised", build=_standardised),
    _timm("resnet10t"),
    _timm("seresnext26d_32x4d", layers=[1, 1, 1, 1]),
    _timm("resnest14d", layers=[1, 1, 1, 1]),
    _timm("res2net50_26w_4s", layers=[1, 1, 1, 1]),
    _timm("nf_regnet_b0"),
    _timm("nf_resnet26"),
    _timm("convnextv2_atto"),
    _timm("convnext_atto"),
    _timm("inception_next_atto"),
    _timm("mixer", build=_mixer),
    _timm("gmlp", build=_gmlp),
    _timm("resmlp", build=_resmlp),
    _timm("deit_tiny_patch16_224", 64, img_size=64, depth=4),
    _timm("deit_tiny_distilled_patch16_224", 64, img_size=64, depth=2),
    _timm("cait_xxs24_224", 64, img_size=64, depth=4),
    _timm("beit_base_patch16_224", 64, img_size=64, embed_dim=64, depth=3, num_heads=4),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=3),
    _timm("volo", 64, build=_volo),
    _timm("mobileone_s0"),
    _timm("repvgg_a0"),
    _timm("ghostnet_050"),
    _timm("edgenext_xx_small"),
    _timm("levit_128s", 64, img_size=64),
    _timm("poolformer_s12"),
    _timm("xcit_nano_12_p16_224", 64, img_size=64, depth=4),
    _timm("coat", 64, build=_coat),
    _timm("convit_tiny", 64, img_size=64, depth=4),
    _timm("crossvit_tiny_240", 120, img_size=120, depth=((1, 1, 0),)),
    _timm("pit_ti_224", 64, img_size=64),
    _timm("pvt_v2_b0"),
    _timm("twins_svt_small", 64, img_size=64, embed_dims=[16, 32, 64, 128]),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", 64, img_size=64),
    _timm("fastvit_t8"),
    _timm("repvit_m0_9"),
    _timm("hrnet_w18_small"),
    _timm("dla46_c"),
    _timm("dpn48b"),
    _timm("lcnet_050"),
    _timm("rexnet_100", 64),
    _timm("skresnet18"),
    _timm("ese_vovnet19b_slim_dw"),
    _timm("swinv2_cr_tiny_224", 64, img_size=64, embed_dim=24, depths=(1, 1, 1, 1)),
    _timm("coatnet_pico_rw_224", 64, img_size=64),
    _timm("gcvit", 64, build=_gcvit),
    _timm("sequencer2d_s", 64, img_size=64, layers=(1,) * 4, embed_dims=(24, 48, 48, 48), hidden_sizes=(8,) * 4),
    _timm("hgnetv2_b0"),
    _timm("starnet_s1"),
    _timm("focalnet", build=_focalnet),
    _timm("mambaout_femto"),
]

ENTRIES = TORCHVISION + TIMM
