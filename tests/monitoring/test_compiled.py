"""What is compiled runs eagerly while it is recorded, and isn't compiled again."""

import pytest
import torch
from helpers import Net, all_equal, batches, loader, parameters_of, quiet_trainer
from torch import nn
from torch.nn import functional as F

from lightning_noisy import ActivationMonitor
from lightning_noisy.monitoring.recorder import ActivationRecorder


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.act(F.silu(self.first(x))))))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_parts(model, backend):
    for child in model.children():
        child.compile(backend=backend)
    return model


@pytest.mark.parametrize("compile_it", [compiled_whole, compiled_in_place, compiled_parts])
def test_recorder_sees_compiled_modules_and_compiles_nothing_again(compile_it):
    backend, model = Backend(), nn.Sequential(Mixed())
    recorder = ActivationRecorder(model)
    compiled, x = compile_it(model, backend), torch.randn(16, 8)
    counts = []
    for step in range(6):
        if step % 2:
            with recorder:
                compiled(x)
            counts.append(recorder.sums.table[:, 0].tolist())
        else:
            compiled(x)
        if step == 0:
            graphs, runs = backend.graphs, backend.runs
    assert graphs == backend.graphs > 0
    assert backend.runs == 3 * runs  # those that were not recorded
    assert counts == [[128.0 * n] * 3 for n in (1, 2, 3)]


def test_names_are_the_same_with_compiled_parts():
    def tags(net):
        monitor = ActivationMonitor(every_n_steps=1, sites="net.0*", statistics="rho")
        trainer = quiet_trainer(callbacks=[monitor])
        trainer.fit(Net(net), loader(batches(1)))
        return set(trainer.callback_metrics)

    parts = Mixed(), nn.Linear(3, 3)
    plain = tags(nn.Sequential(*parts))
    assert plain == {"rho/net.0.act", "rho/net.0:silu#0", "rho/net.0:tanh#0"}
    assert tags(nn.Sequential(*(torch.compile(each, backend="eager") for each in parts))) == plain


@pytest.mark.parametrize("part", [False, True])
def test_monitored_compiled_run_has_the_graphs_of_a_plain_one(part):
    def run(callbacks):
        torch.manual_seed(0)
        torch.compiler.reset()
        backend, model = Backend(), Net(Mixed())
        if part:
            model.net.compile(backend=backend)
        fitted = model if part else torch.compile(model, backend=backend)
        trainer = quiet_trainer(callbacks=callbacks)
        trainer.fit(fitted, loader(batches(8)))
        return backend, parameters_of(model), trainer.callback_metrics

    plain, expected, _ = run([])
    backend, found, metrics = run([ActivationMonitor(every_n_steps=2)])
    assert backend.graphs == plain.graphs > 0
    assert 0 < backend.runs < plain.runs
    assert {tag for tag in metrics if tag.startswith("rho/")} == {"rho/net.act", "rho/net:silu#0", "rho/net:tanh#0"}
    assert all_equal(found, expected)  # this backend rounds as eager code does


def test_compiler_is_as_before_after_recorders_that_end_in_another_order():
    backend, model = Backend(), Mixed()
    compiled, x = torch.compile(model, backend=backend), torch.randn(4, 8)
    first, second = ActivationRecorder(model), ActivationRecorder(model)
    first.attach()
    second.attach()
    first.detach()
    compiled(x)
    assert backend.runs == 0
    assert first.sums.table[:, 0].tolist() == [0, 0, 0]
    second.detach()
    compiled(x)
    assert backend.runs > 0
    assert second.sums.table[:, 0].tolist() == [32, 32, 32]
