"""DOC"""

from ml_collections import ConfigDict

from configs import resnet18


def get_config() -> ConfigDict:
    config = resnet18.get_config()
    config.augment.random_resized_crop = True
    config.augment.random_mirror = True
    return config
