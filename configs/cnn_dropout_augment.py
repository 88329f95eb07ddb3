"""The CNN with dropout 0.5 before the last layer, random resized crops and mirroring.

python -m flax_dlvc.main --config configs/cnn_dropout_augment.py

CIFAR-10, seed 0: 0.545 validation accuracy after two epochs.
An epoch takes about half a minute on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import cnn_augment


def get_config() -> ConfigDict:
    config = cnn_augment.get_config()
    config.dropout_rate = 0.5
    return config
