"""ResNet18, ImageNet stem, with random resized crops and mirroring.

python -m flax_dlvc.main --config configs/resnet18_augment.py

CIFAR-10, seed 0: runs for all 30 epochs; best epoch 30: 0.763 test accuracy, 0.699 nats.
An epoch takes about a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import resnet18


def get_config() -> ConfigDict:
    config = resnet18.get_config()
    config.augment.random_resized_crop = True
    config.augment.random_mirror = True
    return config
