"""Presets: the recipes that have names, as data.

Sources: MoCo v1 (He et al., 2020, arXiv:1911.05722), MoCo v2 (Chen et al., 2020, arXiv:2003.04297), and for `cifar`
the authors' CIFAR-10 notebook; SimCLR (Chen et al., 2020, arXiv:2002.05709) with its code, google-research/simclr; for
`end-to-end` and `bank` the ablation of MoCo v1, and for the bank's momentum InstDisc (Wu et al., 2018,
arXiv:1805.01978) with its code.
"""

from __future__ import annotations

import dataclasses

from fastmoco.recipe import Augmentation, Recipe

V1_AUGMENTATION = Augmentation(hue=0.4, jitter_p=1.0, gray_first=True, blur_p=0.0)
CIFAR_AUGMENTATION = Augmentation(
    crop_scale=(0.08, 1.0), blur_p=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)
# Weaker than v2's: the set shares one palette, so there is no colour to hide, and blur would erase a texture at 32 px.
DEMO_AUGMENTATION = Augmentation(
    crop_scale=(0.6, 1.0), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, blur_p=0.0
)

# For drawings, products, scans: whole objects, whose colours tell them apart. What they share is the background.
SMALL_AUGMENTATION = Augmentation(crop_scale=(0.5, 1.0), hue=0.05, gray_p=0.0, blur_p=0.3, flip_p=0.0)

SIMCLR = Recipe(
    dictionary="batch",
    symmetric=True,
    same_view_negatives=True,
    zero_init=True,
    head="mlp-bn",
    bn_group=0,
    shuffle_bn=False,
    batch_size=4096,
    epochs=100,
    temperature=0.1,
    optimizer="lars",
    lars_momentum="inside",
    reference_lr=1.2,  # 0.075 sqrt(batch), and the 4.8 of linear scaling at 4096; at 256 it is 5 points better
    lr_scaling="sqrt",
    weight_decay=1e-6,
    warmup_epochs=10.0,
    schedule="cosine",
    schedule_per="step",
    schedule_from="warmup",
    augmentation=Augmentation(crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
)

PRESETS: dict[str, tuple[str, Recipe]] = {
    "v1": ("MoCo v1 as published: ResNet-50, ImageNet, 200 epochs", Recipe(augmentation=V1_AUGMENTATION)),
    "v2": (
        "MoCo v2 as published: MLP head, stronger augmentation, cosine schedule",
        Recipe(head="mlp", temperature=0.2, schedule="cosine"),
    ),
    "cifar": (
        "The authors' CIFAR-10 recipe: ResNet-18, 32 px, queue of 4096",
        Recipe(
            arch="resnet18",
            stem="cifar",
            batch_size=512,
            bn_group=64,
            queue_size=4096,
            ema_momentum=0.99,
            temperature=0.1,
            schedule="cosine",
            schedule_first_epoch=1,
            weight_decay=5e-4,
            crop_size=32,
            augmentation=CIFAR_AUGMENTATION,
            knn_features="projection",
        ),
    ),
    "simclr": (
        "SimCLR as published: negatives from a batch of 4096, LARS, 100 epochs; 256 on one GPU works, too",
        SIMCLR,
    ),
    "simclr-cifar": (
        "SimCLR for CIFAR-10, as its authors run it: ResNet-18, 32 px, batch 512, 1000 epochs",
        dataclasses.replace(
            SIMCLR,
            arch="resnet18",
            stem="cifar",
            batch_size=512,
            epochs=1000,
            temperature=0.5,
            reference_lr=1.0,
            lr_scaling="linear",
            weight_decay=1e-4,
            crop_size=32,
            augmentation=CIFAR_AUGMENTATION,
        ),
    ),
    "end-to-end": (
        "MoCo v1's rival: keys of the same batch of 1024, with gradients, all else as in v1",
        Recipe(dictionary="batch", batch_size=1024, augmentation=V1_AUGMENTATION),
    ),
    "bank": (
        "MoCo v1's other rival: negatives drawn from a memory bank of all images, all else as in v1",
        Recipe(dictionary="bank", augmentation=V1_AUGMENTATION),
    ),
    "small": (
        "Own sets of 1,000 to 100,000 images in half an hour of two cores: negatives of the batch, mild crops",
        Recipe(
            arch="resnet18",
            width=0.25,
            stem="cifar",
            head="mlp",
            dictionary="batch",
            symmetric=True,
            same_view_negatives=True,
            batch_size=128,
            epochs=0,
            temperature=0.1,
            reference_lr=0.16,
            schedule="cosine",
            schedule_per="step",
            warmup_epochs=1.0,
            weight_decay=5e-4,
            crop_size=32,
            augmentation=SMALL_AUGMENTATION,
            knn_k=10,
        ),
    ),
    "demo": (
        "Two minutes on a laptop: an embedded set of textures, a slim ResNet-18",
        Recipe(
            arch="resnet18",
            width=0.25,  # a step at width 0.5 costs three times as much, and the same time ends at a lower kNN
            stem="cifar",
            head="mlp",
            batch_size=128,
            epochs=12,
            queue_size=256,  # in so short a run the encoder moves fast, and older keys are told by their age alone
            ema_momentum=0.99,  # below 0.98 fresh keys are told from queued ones by drift alone
            temperature=0.1,
            schedule="cosine",
            schedule_per="step",
            warmup_epochs=1.0,
            weight_decay=5e-4,
            crop_size=32,
            lr=0.08,
            augmentation=DEMO_AUGMENTATION,
            knn_k=10,
        ),
    ),
}
