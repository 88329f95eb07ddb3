"""DOC"""

from ml_collections import ConfigDict

from configs import cnn_augment


def get_config() -> ConfigDict:
    config = cnn_augment.get_config()
    config.dropout_rate = 0.5
    return config
