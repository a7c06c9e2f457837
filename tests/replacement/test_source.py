"""Whether a source is that of the running code, on every version of Python."""

import ast
import importlib.util
import itertools
import linecache
import sys
import textwrap
import warnings

import pytest
import torch

from lightning_noisy.replacement.source import UnreadError, rewritten, source_of

NUMBERS = itertools.count()
PREFACE = """from __future__ import annotations

import functools
import torch
import torch.nn.functional as F
from torch.nn.functional import relu

"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / f"source_{next(NUMBERS)}.py"


def imported(file, text):
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method(body, arguments="self, x, *rest"):
    return f"class Model:\n    def forward({arguments}):\n{textwrap.indent(textwrap.dedent(body), ' ' * 8)}\n"


DEFINITIONS = {
    "module's": "def found(x):\n    return F.relu(torch.nn.functional.elu(relu(x)))\n",
    "method": method("return super().__init__()") + "found = Model.forward\n",
    "private": method("return self.__a(x) + self.__b") + "found = Model.forward\n",
    "closure": """
def outer(scale):
    class Model:
        def forward(self, x):
            def inner(y):
                return F.relu(y) * scale + self.bias
            return [inner(x) for _ in range(3) if (lambda: x)() is not None]
    return Model
found = outer(3).forward
""",
    "decorated": """
def plain(function):
    return function
class Model:
    @plain
    @torch.no_grad()
    @plain
    def forward(self, x: NotThere = 1) -> NeitherThis:
        return F.relu(x)
found = Model.forward.__wrapped__
""",
    "conditional": """
try:
    import not_there_at_all
except ImportError:
    class Model:
        if True:
            def forward(self, x):
                try:
                    return F.relu(x) in (1, 2.0, (-0.0, "a")) or x in {1, 2, 3}
                except (ValueError, TypeError) as error:
                    raise KeyError from error
found = Model.forward
""",
    "second of its name": """
class First:
    def forward(self, x):
        return F.relu(x)
class Second:
    def forward(self, x):
        return F.relu(x) + 1
found = Second.forward
""",
    "tabs and characters": """
class Model:
\tdef forward(self, ö):
\t\t"Ünï"
\t\treturn relu(ö)
found = Model.forward
""",
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_source_of_what_is_as_it_was_imported_is_its_definition(file, name):
    found = imported(file, PREFACE + DEFINITIONS[name]).found
    tree, first = source_of(found)
    assert tree.name == found.__name__
    assert first == found.__code__.co_firstlineno
    assert min(node.lineno for node in (tree, *tree.decorator_list)) == first


@pytest.mark.parametrize("name", DEFINITIONS)
def test_rewritten_without_a_change_is_the_same_code(file, name):
    found = imported(file, PREFACE + DEFINITIONS[name]).found
    code, same = found.__code__, rewritten(found, lambda tree, first: None)
    for part in ("co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags", "co_filename", "co_firstlineno"):
        assert getattr(same, part) == getattr(code, part), part
    assert {line for *_, line in same.co_lines()} == {line for *_, line in code.co_lines()}


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("return x + self.b", "return x - self.b"),
        ("return x + self.b", "return self.b + x"),
        ("return x.a", "return x.b"),
        ("return F.relu(F.elu(x))", "return F.elu(F.relu(x))"),
        ("return x < 1", "return x <= 1"),
        ("return x is self", "return x is not self"),
        ("return x * 1", "return x * 1.0"),
        ("return x * 1", "return x * True"),
        ("return x * 0.0", "return x * -0.0"),
        ("return x, (1, 2)", "return x, (1, 2.0)"),
        ("return x in {1, 2}", "return x in {1, 3}"),
        ("return f(a=x)", "return f(b=x)"),
        ("return lambda y: x + y", "return lambda y: x - y"),
        ("return lambda y: y", "return lambda y=1: y"),
        ("return lambda y: y", "return lambda *y: y"),
        ("return [y for y in x]", "return [y for y in x if y]"),
        ("y = 1; z = 2; return y", "y = 1; z = 2; return z"),
        ("global a; a = x", "a = x"),
        ("if x: a()\nelse: b()", "if x: b()\nelse: a()"),
        ("while x: a()\nb()", "while x: a()\nelse: c()"),
        ("try: a(); b()\nexcept E: c()", "try: a()\nexcept E: c()\nb()"),
        ("for y in x: break", "for y in x: continue"),
        ("return x[1:2]", "return x[1:3]"),
        ("return f'{x!r}'", "return f'{x!s}'"),
        ("yield x", "return x"),
    ],
)
def test_source_of_an_edited_file_is_refused(file, was, becomes):
    found = imported(file, PREFACE + method(was)).Model.forward
    file.write_text(PREFACE + method(becomes))
    with pytest.raises(UnreadError, match="its source has changed since it was imported"):
        source_of(found)


@pytest.mark.parametrize(
    ("was", "becomes"), [("self, x", "self, x, y"), ("self, x", "self, *, x"), ("self, x", "self, x, /")]
)
def test_source_of_other_arguments_is_refused(file, was, becomes):
    found = imported(file, PREFACE + method("return x", was)).Model.forward
    file.write_text(PREFACE + method("return x", becomes))
    with pytest.raises(UnreadError, match="its source has changed"):
        source_of(found)


def test_source_of_an_unchanged_method_in_a_changed_file_is_found_where_it_is_now(file):
    text = method("return F.relu(x)")
    found = imported(file, PREFACE + text).Model.forward
    file.write_text(PREFACE + "import math\n\ndef forward(self, x):\n    return 1\n\n" + text)
    _, first = source_of(found)
    assert file.read_text().splitlines()[first - 1] == "    def forward(self, x, *rest):"
    assert rewritten(found, lambda tree, first: None).co_firstlineno == first


def test_source_of_a_file_that_is_gone_or_no_python_any_more_is_refused(file):
    for rest in ("def (", None):
        found = imported(file, PREFACE + method("return F.relu(x)")).Model.forward
        file.write_text(rest) if rest else file.unlink()
        with pytest.raises(UnreadError, match="there is no source to read"):
            source_of(found)


def test_source_of_a_lambda_is_refused(file):
    with pytest.raises(UnreadError, match="no plain method"):
        source_of(imported(file, "found = lambda x: x\n").found)


def test_source_of_cells_of_a_notebook_that_run_statement_by_statement_is_found():
    name = f"<notebook {next(NUMBERS)}>"
    text = PREFACE + method("return F.relu(relu(x))") + "Model.forward\nawait other()\n"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    scope = {}
    for statement in ast.parse(text).body[:-1]:
        exec(compile(ast.Module([statement], []), name, "exec", dont_inherit=True), scope)
    assert source_of(scope["Model"].forward)[0].name == "forward"
    del linecache.cache[name]


def test_source_of_what_ran_often_or_is_traced_is_found(file):
    model = imported(file, PREFACE + method("return [y + 1 for y in (x, *rest)][0] + self.a")).Model()
    model.a = 1
    tracer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        for _ in range(1000):  # by now Python has specialized it
            model.forward(1)
        assert source_of(type(model).forward)[0].name == "forward"
    finally:
        sys.settrace(tracer)


def test_source_of_a_method_that_pytest_rewrote_is_refused_with_a_hint():
    class Model(torch.nn.Module):
        def forward(self, x):
            assert x is not None
            return torch.relu(x)

        def other(self, x):
            return torch.relu(x)

    assert source_of(Model.other)[0].name == "other"
    with pytest.raises(UnreadError, match="not as written.*pytest rewrites assert"):
        source_of(Model.forward)


def test_source_of_a_file_is_read_without_its_warnings_again(file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = imported(file, "pattern = '\\d' is 1\n" + method("return '\\d'")).Model.forward
    assert source_of(found)[0].name == "forward"
    rewritten(found, lambda tree, first: None)
