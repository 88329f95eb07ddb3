"""ResNet18 with a CIFAR stem and the recipe that suits it: SGD, one cycle, translation, cutout, label smoothing.

python -m flax_dlvc.main --config configs/resnet18_strong.py

Not yet run in full: its accuracy is to be measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import resnet18


def get_config() -> ConfigDict:
    config = resnet18.get_config()
    config.splits.train = 'train[:90%]'
    config.splits.validation = 'train[90%:]'
    config.model.stem = 'cifar'
    config.batch_size = 512
    config.num_epochs = 100
    config.early_stopping.patience = 0
    config.compute_dtype = 'bfloat16'

    config.augment.random_mirror = True
    config.augment.random_translate = 4
    config.augment.cutout = 8
    config.label_smoothing = 0.1

    config.learning_rate = 0.4
    config.optimizer.name = 'sgd'
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = 'one_cycle'
    return config
