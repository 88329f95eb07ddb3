"""The embedded data in a minute: the CNN with dropout on scikit-learn's handwritten digits.

python -m flax_dlvc.main --config configs/quickstart.py

On an Intel Xeon, seed 0: stops after epoch 13 of 30; best epoch 8: 0.987 test accuracy, 0.071 nats; half a minute on
two cores.
"""

from ml_collections import ConfigDict

from configs import cnn_dropout


def get_config() -> ConfigDict:
    config = cnn_dropout.get_config()
    config.dataset = 'digits'
    return config
