"""The embedded data in a minute: the CNN with dropout on scikit-learn's handwritten digits.

python -m flax_dlvc.main --config configs/quickstart.py
"""

from ml_collections import ConfigDict

from configs import cnn_dropout


def get_config() -> ConfigDict:
    config = cnn_dropout.get_config()
    config.dataset = 'digits'
    return config
