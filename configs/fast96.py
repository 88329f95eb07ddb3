"""fast94 with a wider and deeper residual network, stronger augmentation and more epochs: towards 96 % on CIFAR-10.

python -m flax_dlvc.main --config configs/fast96.py

The network and the augmentation are airbench96's (github.com/KellerJordan/cifar10-airbench); the optimiser is that of
fast94. Not yet tested in full: its accuracy is to be measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import fast94


def get_config() -> ConfigDict:
    config = fast94.get_config()
    config.model.widths = (128, 384, 512)
    config.model.depth = 3
    config.augment.random_translate = 4
    config.augment.cutout = 12
    config.num_epochs = 36
    return config
