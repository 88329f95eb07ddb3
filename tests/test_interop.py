"""PyTorch's weights in and out."""

import jax
import numpy as np
import pytest

from flax_dlvc import interop
from flax_dlvc.errors import ConfigError
from flax_dlvc.setup import set_up
from flax_dlvc.transfer import load_trained, save_as_run


def test_importing_what_was_exported_is_the_identity(tmp_path, small_vit_config):
    setup = set_up(small_vit_config)
    variables = setup.create_state().variables
    save_as_run(tmp_path / 'a', setup, variables)
    interop.export_weights(tmp_path / 'a', 'best', tmp_path / 'w.safetensors')
    interop.import_weights(setup, tmp_path / 'w.safetensors', tmp_path / 'b')
    jax.tree.map(np.testing.assert_array_equal, variables, load_trained(tmp_path / 'b')[1])

    weights = interop.to_torch(setup, variables)
    weights['cls_token'] = weights['cls_token'][0]
    weights['extra'] = weights.pop('mlp_head.1.bias')
    with pytest.raises(ConfigError, match=r'missing: mlp_head\.1\.bias; surplus: extra; misshapen: cls_token is'):
        interop.from_torch(setup, weights)
