"""The role of each activation is the one that was written down by hand."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from trunks import TRUNKS

from lightning_noisy import activation_sites
from lightning_noisy.replacement.decision import GATE_OR_OUTPUT


@pytest.mark.parametrize("name", TRUNKS)
def test_roles_are_those_written_down_with_example_inputs(name):
    make, inputs, roles = TRUNKS[name]
    torch.manual_seed(0)
    sites = activation_sites(make(), inputs)
    assert {site.name: site.role for site in sites} == roles
    assert sites.unresolved == []


@pytest.mark.parametrize("name", TRUNKS)
def test_roles_without_example_inputs_are_the_same_or_unknown(name):
    make, _, roles = TRUNKS[name]
    for site in activation_sites(make()):
        # A ReLU or the like whose fate is unknown counts as hidden if a layer comes later.
        by_default = site.is_hidden is None and site.function not in GATE_OR_OUTPUT and site.role == "hidden"
        assert by_default or site.role in (roles[site.name], "unknown")


GUIDE = Path(__file__).parents[2] / "docs/activations.md"
ROWS = re.findall(r"^\| `(.*)` \| (\w+: \w+(?:, \w+: \w+)*) \|$", GUIDE.read_text(), re.MULTILINE)
MODULE = """
import torch
from torch import lerp, nn, randn_like, relu, sigmoid, tanh
from torch.nn.functional import elu, gelu, silu, softplus


class Example(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, y, mask):
        return {code}
"""


def test_guide_has_a_table_of_roles():
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("code", "expected"), ROWS)
def test_roles_are_those_of_the_guide(code, expected, tmp_path):
    file = tmp_path / "example.py"
    file.write_text(MODULE.format(code=re.sub(r"\b([abc])\(", r"self.\1(", code)))
    spec = importlib.util.spec_from_file_location("example", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, y = torch.randn(2, 8, 6)
    for inputs in ((x, y, (x > 0).float()), None):
        sites = activation_sites(module.Example(), inputs)
        found = {site.function: site.role for site in sites}
        known = dict(each.split(": ") for each in expected.split(", "))
        assert found == known or (inputs is None and all(found[name] in (known[name], "unknown") for name in known))
