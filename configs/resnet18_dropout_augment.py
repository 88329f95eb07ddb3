"""DOC"""

from ml_collections import ConfigDict

from configs import resnet18_augment


def get_config() -> ConfigDict:
    config = resnet18_augment.get_config()
    config.dropout_rate = 0.5
    return config
