"""DOC"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.model.name = 'vit'
    config.learning_rate = 3e-4  # the UvA tutorial's; 1e-3 without warm-up is too much for it
    return config
