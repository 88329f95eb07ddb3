"""DOC"""

from ml_collections import ConfigDict

from configs import resnet18


def get_config() -> ConfigDict:
    config = resnet18.get_config()
    config.dropout_rate = 0.5
    return config
