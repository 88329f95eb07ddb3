"""The vision transformer with random resized crops and mirroring.

python -m flax_dlvc.main --config configs/vit_augment.py

CIFAR-10, seed 0: runs for all 30 epochs; best epoch 30: 0.668 test accuracy, 0.944 nats.
An epoch takes about seven to eight minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import vit


def get_config() -> ConfigDict:
    config = vit.get_config()
    config.augment.random_resized_crop = True
    config.augment.random_mirror = True
    return config
