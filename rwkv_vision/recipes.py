"""Training runs as functions: each docstring says what it takes and what it gave."""

from rwkv_core.train.config import TrainConfig, TrainSettings
from rwkv_vision.config import ClassifyConfig

__all__ = ["cifar10", "classify", "digits", "imagenet", "mnist"]


def classify() -> TrainConfig:
    """Your own pictures, one subfolder per class: ``rwkv train classify --data FOLDER``.

    Trains from nothing on 64 × 64 colour pictures with random crops, mirroring and colour jitter.
    For letters and digits, which must not be mirrored, see :func:`mnist`.

    436 CPU-seconds on one thread of a shared EPYC core, 233,162 parameters, less than three epochs
    of CIFAR-10 in a mirror of lossy JPEG files: 58.5 % of its 10,000 test pictures, 2026-11-21.
    More steps (``--set train.steps=20000``) and a larger model are the first things to give it.
    """
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            model_options={"patch_size": 8},
            data="pictures",
            image_size=(64, 64),
            crop_scale=(0.35, 1.0),
            crop_ratio=(0.75, 1.3333),
            hflip=0.5,
            color_jitter=0.3,
            smoothing=0.1,
        ),
        train=TrainSettings(
            steps=2000, lr=2e-3, lr_final=2e-5, warmup_steps=50, weight_decay=0.05, eval_every=500
        ),
    )


def digits() -> TrainConfig:
    """Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels: ``rwkv train digits``.

    45 s on one thread of a shared EPYC core, 218,058 parameters: 98.33 % of the 359 test pictures
    with seed 0, 97.77 % with seed 1; k nearest neighbours reach 98.61 % (k = 3), 2026-11-21. The
    settings were chosen on the training side alone, the initialisation too: with the authors'
    σ = 0.02 in place of 1/√(inputs), 3.5 % of the pictures kept for such choices went wrong in
    place of 1.4 %.
    """
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            model_options={"patch_size": 2},
            data="digits",
            channels=1,
            image_size=(8, 8),
            crop_scale=(0.75, 1.0),
            crop_ratio=(0.8, 1.25),
            smoothing=0.1,
        ),
        train=TrainSettings(
            steps=600, lr=2e-3, lr_final=2e-5, warmup_steps=20, weight_decay=0.05, log_every=50
        ),
    )


def mnist() -> TrainConfig:
    """MNIST as PNG files, ``train/`` and ``test/``: ``rwkv train mnist --data FOLDER``.

    339 CPU-seconds on one thread of a shared EPYC core, 220,938 parameters, not quite three epochs:
    99.04 % of the 10,000 test pictures, 2026-11-21.
    """
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            data="mnist",
            channels=1,
            image_size=(28, 28),
            batch_size=128,
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.8, 1.25),
        ),
        train=TrainSettings(
            steps=1200, lr=2e-3, lr_final=2e-5, warmup_steps=50, weight_decay=0.05, log_every=100
        ),
    )


def cifar10() -> TrainConfig:
    """CIFAR-10 as files, ``train/`` and ``test/``: ``rwkv train cifar10 --data FOLDER``.

    Ten epochs. Any model of timm takes the same road, so that two can be compared, for instance
    ``--set task.model=vit_tiny_patch16_224 --set task.model_options.embed_dim=64 --set
    task.model_options.depth=4 --set task.model_options.num_heads=4``; docs/vision.md has such a
    comparison over seeds.

    Cut short to three epochs (``--set train.steps=1170 --set train.warmup_steps=60``): 859
    CPU-seconds on one thread of a shared EPYC core, 223,946 parameters, 64.7 % of the 10,000 test
    pictures of a JPEG mirror, 2026-11-21. docs/vision.md says what a model of a fifth of its size
    reaches in ten epochs, beside others.
    """
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_nano_patch4_28",
            model_options={"patch_size": 4},
            data="cifar10",
            image_size=(32, 32),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            batch_size=128,
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.75, 1.3333),
            hflip=0.5,
            smoothing=0.1,
        ),
        train=TrainSettings(
            steps=3900, lr=4e-3, lr_final=4e-5, warmup_steps=200, weight_decay=0.05, log_every=100
        ),
    )


def imagenet() -> TrainConfig:
    """ImageNet-1k as the authors trained VRWKV-T on it: ``rwkv train imagenet --data FOLDER``.

    300 epochs of 1,281,167 pictures in batches of 1,024, 20 of them warm-up, AdamW at 1e-3, the
    cosine ending at a hundredth, weight decay 0.05, gradients clipped at 5, no running mean of the
    weights. Random crops of 8 to 100 % of the picture, mirroring, RandAugment of magnitude 9,
    rectangles erased with a chance of 1/4, labels smoothed. The tiny models mix no pictures and
    have no stochastic depth; the others take the same 300 epochs with::

        --set task.model=vrwkv_small_patch16_224 --set task.model_options.drop_path_rate=0.3
        --set task.model=vrwkv_base_patch16_224 --set task.model_options.drop_path_rate=0.5
        and for both --set task.mixup=0.8 --set task.cutmix=1.0

    Published, on 8 GPUs or 16: 75.1 % (tiny), 80.1 % (small), 82.0 % (base); of generation 6 by the
    same recipe 76.6, 81.1 and 82.6 %. Source: OpenGVLab/Vision-RWKV, classification/configs. The
    largest was made with more pictures, and fine-tuned at 384 pixels for 20 epochs at 1e-5 with
    ``task.ema=0.9999``, gradients clipped at 1 and a ``drop_path_rate`` of 0.1.

    Two things differ. The authors decay every parameter but norms and biases; here it is only the
    weights of linear maps. They evaluate on the middle of the picture (``crop_pct`` 0.875), ``rwkv
    eval`` on all of it, stretched: for their protocol give the weights to timm's ``validate.py``.

    Not trained by us, for want of such a machine; that it runs is tested, 2026-11-21.
    """
    epoch = 1_281_167 / 1024
    return TrainConfig(
        adapter="classify",
        task=ClassifyConfig(
            model="vrwkv_tiny_patch16_224",
            data="imagenet",
            image_size=(224, 224),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            interpolation="bicubic",
            batch_size=1024,
            workers=16,
            crop_scale=(0.08, 1.0),
            crop_ratio=(3 / 4, 4 / 3),
            hflip=0.5,
            auto_augment="rand-m9-mstd0.5-inc1",
            erase=0.25,
            smoothing=0.1,
        ),
        train=TrainSettings(
            steps=round(300 * epoch),
            lr=1e-3,
            lr_final=1e-5,
            warmup_steps=round(20 * epoch),
            weight_decay=0.05,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            grad_clip=5.0,
            log_every=100,
            eval_every=round(epoch),
            checkpoint_every=round(epoch),
        ),
    )
