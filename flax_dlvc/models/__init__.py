"""The models: a dict from name to constructor. They know nothing of configs."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_dlvc.models.airbench import Airbench
from flax_dlvc.models.cnn import CNN
from flax_dlvc.models.resnet import ResNet18
from flax_dlvc.models.vit import ViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    'airbench': Airbench,
    'cnn': CNN,
    'resnet18': ResNet18,
    'vit': ViT,
}


def create_model(name: str, *, num_classes: int, dropout_rate: float, dtype: str, **options: Any) -> nn.Module:
    """Builds the model `name`.

    Args:
        name: a key of `MODELS`.
        num_classes: outputs of the classifier.
        dropout_rate: probability to drop.
        dtype: compute dtype; parameters are float32.
        **options: fields of any of the models; a model takes those it has.
    """
    constructor = MODELS[name]
    fields = inspect.signature(constructor).parameters
    options = {option: value for option, value in options.items() if option in fields}
    return constructor(num_classes=num_classes, dropout_rate=dropout_rate, dtype=jnp.dtype(dtype), **options)
