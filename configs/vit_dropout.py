"""DOC"""

from ml_collections import ConfigDict

from configs import vit


def get_config() -> ConfigDict:
    config = vit.get_config()
    config.dropout_rate = 0.2
    return config
