"""What all models have in common."""

import jax.numpy as jnp
import pytest

from flax_dlvc.config import MODEL_FIELDS
from flax_dlvc.models import MODELS, create_model

OPTIONS = {
    'stem': 'cifar', 'embed_dim': 32, 'hidden_dim': 48, 'num_heads': 4, 'num_layers': 3, 'patch_size': 8,
    'patch_stem': 'convolutional', 'stochastic_depth_rate': 0.1, 'widths': (8, 16, 24), 'depth': 3,
}  # fmt: skip


@pytest.mark.parametrize('name', MODEL_FIELDS)
def test_create_model_takes_the_options_it_has(name):
    model = create_model(name, num_classes=3, dropout_rate=0.25, dtype='bfloat16', **OPTIONS)
    taken = {option: OPTIONS[option] for option in MODEL_FIELDS[name]}
    assert model == MODELS[name](num_classes=3, dropout_rate=0.25, dtype=jnp.dtype('bfloat16'), **taken)
    assert {option for option in OPTIONS if hasattr(model, option)} == taken.keys()
