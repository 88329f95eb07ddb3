"""DOC"""

from ml_collections import ConfigDict

from configs import vit_augment


def get_config() -> ConfigDict:
    config = vit_augment.get_config()
    config.dropout_rate = 0.2
    return config
