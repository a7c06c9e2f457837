"""Batch norms around normalized activations."""

import copy
import pickle

import pytest
import torch
from patterns import IMAGE, BasicConv, made
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from lightning_noisy import replace_activations, restore_activations


def test_stripped_batch_norms_keep_their_statistics_and_what_is_lost_is_said():
    model = BasicConv(3, 4, kernel_size=3)
    model(IMAGE)
    expected = copy.deepcopy(model).eval()(IMAGE)
    plain = copy.deepcopy(model)
    replace_activations(plain, lambda site: nn.ReLU(inplace=True), batchnorm_affine="strip", outputs=True)
    assert plain.bn.weight is None
    assert torch.equal(plain.eval()(IMAGE), expected)
    assert restore_activations(plain).bn.weight is not None
    nn.init.constant_(model.bn.weight, 2.0)
    with pytest.warns(UserWarning, match="Weight and bias of bn were trained, and are gone"):
        replace_activations(model, "nsw", batchnorm_affine="strip", outputs=True)


def test_a_batch_norm_goes_before_the_head():
    model, _ = made("resnet")
    keys = set(model.state_dict())
    replace_activations(model, "nsw", buffer_batchnorm=True)
    inputs = []
    handle = model.fc.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(IMAGE)
    handle.remove()
    assert inputs[0].mean(0).abs().max() < 1e-3
    assert keys < set(model.state_dict())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.eval()(IMAGE), model.eval()(IMAGE))
    restore_activations(model)
    assert set(model.state_dict()) == keys
    assert len(model.fc._forward_pre_hooks) == 0


def test_a_layer_with_tokens_has_its_batch_norm_over_all_of_them():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    replace_activations(model, "nsw", buffer_batchnorm="2")
    model(torch.randn(3, 5, 6))
    assert model[2].buffer.num_batches_tracked == 1


def test_batch_norms_of_other_libraries_are_stripped_too():
    class Own(BatchNorm):
        def _check_input_dim(self, input):
            pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4), nn.ReLU(), nn.Linear(4, 4))
    replace_activations(model, "nrelu", batchnorm_affine="strip")
    assert not model[1].affine
