"""x"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset = 'digits'
    config.dropout_rate = 0.5
    return config
