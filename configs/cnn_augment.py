"""DOC"""

from ml_collections import ConfigDict

from configs import cnn


def get_config() -> ConfigDict:
    config = cnn.get_config()
    config.augment.random_resized_crop = True
    config.augment.random_mirror = True
    return config
