"""The report's ViT with what a vision transformer needs on 45,000 images: augmentation, mixing, averaging, time.

python -m flax_dlvc.main --config configs/vit_strong.py

A convolutional patch stem instead of the linear one: --config.model.patch_stem=convolutional. Not yet run in full: its
accuracy is to be measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import vit


def get_config() -> ConfigDict:
    config = vit.get_config()
    config.splits.train = 'train[:90%]'
    config.splits.validation = 'train[90%:]'
    config.batch_size = 512
    config.learning_rate = 1e-3
    config.num_epochs = 300
    config.early_stopping.patience = 0
    config.compute_dtype = 'bfloat16'

    config.augment.random_mirror = True
    config.augment.random_translate = 4
    config.augment.trivial_augment = True
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.label_smoothing = 0.1
    config.model.stochastic_depth_rate = 0.1
    config.ema_decay = 0.998

    config.optimizer.weight_decay = 0.05
    config.optimizer.gradient_clip_norm = 1.0
    config.schedule.name = 'cosine'
    config.schedule.warmup_epochs = 10.0
    return config
