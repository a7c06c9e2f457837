"""Private interfaces of torch, Lightning and DeepSpeed: where they are used, and that they are as they are used."""

import ast
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import Net, batches, loader, quiet_trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lightning_noisy
from lightning_noisy import _torch_internals as internals
from lightning_noisy.callbacks import _lightning_internals as of_lightning

ROOT = Path(lightning_noisy.__file__).parent
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
# A module's children, parameters and buffers: what torch's own guide to state dicts names.
EVERYWHERE = {"_modules", "_parameters", "_buffers"}
HOMES = {
    "_torch_internals.py": None,  # any
    "callbacks/_lightning_internals.py": None,
    "gradient_noise/deepspeed.py": {"_hp_mapping"},
    "gradient_noise/fsdp1.py": {"_handle", "_params", "_shard_param_infos"},
    "metrics/_pooled.py": {"_plot"},  # what torchmetrics' own guide to plots names
    "metrics/moments.py": {"_plot"},
    "nn/recurrent.py": {"_flat_weights"},  # of torch's recurrent layers, which this extends
    "replacement/replace.py": {"_is_full_backward_hook"},
}


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and name.strip("_") != "" and not name.startswith("__")


def own_names():
    """What the package defines: modules, functions, classes, class attributes, and attributes of its own objects."""
    names = {part for path in TREES for part in path.removesuffix(".py").split("/")}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return names


OWN = own_names() | {"_redirected_calls", "_original_class"}  # written into the subclasses by their names


def foreign_private(tree):
    """Private names in attributes, imports and strings that the package doesn't define."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            found |= {
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
    return {name for name in found if is_private(name) and name not in OWN | EVERYWHERE}


@pytest.mark.parametrize("path", sorted(TREES))
def test_private_interfaces_are_used_in_their_homes_alone(path):
    allowed = HOMES.get(path, set())
    assert allowed is None or foreign_private(TREES[path]) <= allowed


def test_homes_have_no_more_than_they_need():
    for path, allowed in HOMES.items():
        assert foreign_private(TREES[path]) >= (allowed or set()) - OWN
        assert allowed is not None or foreign_private(TREES[path])


@pytest.mark.parametrize(
    "source",
    ["from torch._dynamo import config", "import torch._C", "x._grad_fn", "getattr(x, '_old')", "from torch import _C"],
)
def test_check_sees_a_private_name(source):
    assert foreign_private(ast.parse(source))


def test_hooks_of_a_module_are_all_known():
    """Those on its calls and on its state; hooks of another kind would not be taken over."""
    of_module = {
        name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))
    }
    of_state = {name for name in of_module if "state_dict" in name}
    assert of_module == {*internals.HOOKS, *of_state}
    assert internals.LOAD_HOOKS in of_state
    assert nn.Module()._is_full_backward_hook is None


def test_recomputing_is_seen_in_the_second_pass_of_checkpointing_alone():
    seen = []

    def forward(x):
        seen.append((internals.is_recomputing(), bool(internals.recomputing(x))))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False).sum().backward()
    assert seen == [(False, False), (True, True)]


def test_transforms_are_seen():
    seen = []

    def function(x):
        seen.append(internals.is_transforming())
        return x * x

    function(torch.tensor(1.0))
    torch.func.grad(function)(torch.tensor(1.0))
    torch.vmap(function)(torch.ones(2))
    torch.func.jvp(function, (torch.tensor(1.0),), (torch.tensor(1.0),))
    assert seen == [False, True, True, True]


def test_fake_tensors_have_no_values():
    with FakeTensorMode():
        assert not internals.has_values(torch.ones(2))
    assert internals.has_values(torch.ones(2))


def test_version_counts_changes_in_place():
    x = torch.zeros(2)
    before = internals.version(x)
    x += 1
    torch.autograd.graph.increment_version(x)
    assert internals.version(x) == before + 2


def test_storages_are_told_apart_even_when_they_are_gone():
    tensor = torch.zeros(1000)
    known = internals.storage_of(tensor)
    assert known == internals.storage_of(tensor[1:].detach())
    del tensor
    assert known.expired()
    later = [torch.zeros(1000) for _ in range(10)]  # one of them in the same memory, perhaps
    assert all(known != internals.storage_of(each) for each in later)
    assert torch.vmap(lambda x: x + (internals.storage_of(x) is not None))(torch.zeros(2, 3)).sum() == 0


def test_each_tensor_gets_its_own_addend():
    tensors = [torch.zeros(2), torch.ones(3)]
    internals.add_each(tensors, [torch.full((2,), 5.0), torch.full((3,), 7.0)])
    assert [each.tolist() for each in tensors] == [[5.0] * 2, [8.0] * 3]


def test_compiled_model_is_taken_apart():
    model = nn.Linear(2, 2)
    assert internals.uncompiled(torch.compile(model, backend="eager")) is model
    assert internals.uncompiled(model) is model
    assert internals.uncompiled(None) is None
    model._orig_mod = nn.Linear(2, 2)  # a child of that name is no compiled model
    assert internals.uncompiled(model) is model


def test_batch_norms_have_one_base():
    classes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm1d)
    assert all(issubclass(cls, internals.BatchNorm) for cls in classes)
    assert not issubclass(nn.InstanceNorm1d, internals.BatchNorm)


def test_step_hooks_of_an_optimizer_are_read():
    optimizer, hook = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), lambda *_: None
    optimizer.register_step_pre_hook(hook)
    assert internals.has_step_hooks(optimizer)
    assert internals.step_pre_hooks(optimizer) == [hook]
    assert internals.step_pre_hooks(None) == []


def test_metadata_of_a_state_dict_is_read_and_written():
    model = nn.Sequential(nn.BatchNorm1d(2))
    state = model.state_dict()
    assert internals.metadata_of(state) == internals.versions(model) == {"": {"version": 1}, "0": {"version": 2}}
    internals.set_metadata(state, {"0": {"version": 1}})
    del state["0.num_batches_tracked"]
    model.load_state_dict(state)  # which batch norms of version 2 have
    assert internals.metadata_of(dict(state)) is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("gradient", "overflows"), [(2.0, False), (float("inf"), True)])
def test_scaler_hands_scale_and_overflow_to_fused_optimizers_alone(fused, gradient, overflows):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    optimizer.register_step_pre_hook(lambda each, *_: seen.append(internals.amp_state(each)))
    scaler.scale((weight * gradient).sum()).backward()
    scaler.step(optimizer)
    assert internals.unscales_in_step(optimizer) is fused
    # Without fusion gradients are unscaled before the step, which is not taken where they overflow.
    assert seen == ([(8.0, overflows)] if fused else [] if overflows else [(1.0, False)])
    assert internals.amp_state(optimizer) == (1.0, False)


def test_compiled_lightning_module_is_seen():
    seen = []

    class Look(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(of_lightning.is_compiled(pl_module))

    for model in (Net(), torch.compile(Net(), backend="eager")):
        quiet_trainer(max_steps=1, callbacks=[Look()]).fit(model, loader(batches(1)))
    assert seen == [False, True]


def averages():
    """The callbacks of Lightning that average weights in a copy; the second came with lightning 2.5.5."""
    yield pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    if hasattr(pl.callbacks, "WeightAveraging"):
        yield pl.callbacks.WeightAveraging()


def test_averaging_callback_that_has_copied_the_model_is_seen():
    for callback in averages():
        assert not of_lightning.has_copied_model(callback)
        seen = []

        class Look(pl.Callback):
            def on_fit_start(self, *_, callback=callback, seen=seen):
                seen.append(of_lightning.has_copied_model(callback))

        quiet_trainer(max_steps=1, callbacks=[callback, Look()]).fit(Net(), loader(batches(1)))
        assert seen == [True]


@pytest.mark.parametrize(("strategy", "copies"), [("auto", False), ("ddp", False), ("ddp_fork", True)])
def test_strategy_that_trains_a_copy_is_seen(strategy, copies):
    trainer = quiet_trainer(strategy=strategy, devices=1 if strategy == "auto" else 2)
    assert of_lightning.copies_model(trainer) is copies


def test_calls_can_be_hidden_from_modes():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    with Mode():
        with internals.without_overrides():
            x + 1
        assert seen == []
        x + 1
        assert len(seen) == 1
