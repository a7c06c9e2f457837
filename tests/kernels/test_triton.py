"""What Triton makes of the kernels for a GPU, which needs no GPU."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lightning_noisy.kernels.triton import gaussian, noisy, normalized

F, D, I, N = "*fp32", "*fp64", "*i64", "i32"
numbers = lambda *names: dict.fromkeys(names, "fp32")
options = numbers("a", "b", "lower", "upper")
line = numbers("slope", "offset", "lower", "upper", "alpha", "level")
buffers = {name: F for name in ("alpha", "mean", "rho", "rho_prime")} | {"tracked": I, "rejected": I}
rule = numbers("momentum", "lower", "upper", "most", "beta", "smallest")
H = "*bf16"
cases = [
    (gaussian._draw, {"out": F, "first": I, "count": N, "second": "i64"}, {}),
    (gaussian._add, {"table": I, "ranges": N, "second": "i64", "std": "fp32", "like": H}, {}),
    (noisy._key, {"state": I, "key": I, "distance": "i64"}, {"ADVANCE": True}),
    (noisy._values, {"x": H, "out": H, "p": F, "c": F, "key": I, "count": N, "second": "i64"} | line,
     {"HALF": True, "NOISY": True}),
    (noisy._gradients, {"x": H, "gradient": H, "out": H, "sums": F, "p": F, "c": F, "key": I, "count": N,
     "second": "i64"} | line, {"HALF": True, "NOISY": True}),
]
for kind in range(8):
    cases += [
        (normalized._moments, {"x": H, "sums": D, "count": N, "columns": N, "step": N, "each": N} | options,
         {"KIND": kind}),
        (normalized._values, {"x": H, "out": H, "kept": F, "count": N} | options, {"KIND": kind}),
        (normalized._gradients, {"x": H, "gradient": H, "out": H, "kept": F, "sums": D, "count": N, "each": N}
         | options, {"KIND": kind}),
    ]
for mode in range(4):
    cases.append((normalized._statistics, {"sums": D, "parts": N, "count": N} | buffers | {"pending": D, "kept": F}
                  | rule, {"MODE": mode, "PARTS": 1024}))
cases.append((normalized._of_alpha, {"sums": D, "parts": N, "kept": F, "out": F, "beta": "fp32"}, {"PARTS": 1024}))
for function, signature, constants in cases:
    try:
        source = ASTSource(fn=function, signature=signature | dict.fromkeys(constants, "constexpr"),
                           constexprs={(function.arg_names.index(name),): value for name, value in constants.items()})
    except TypeError:  # Triton 3.2
        source = ASTSource(fn=function, signature=signature, constants=constants)
    made = compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"enable_fp_fusion": False})
    print("@@", function.__name__, "cubin" in made.asm, made.asm["ptx"].replace("\\n", " "))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_the_noise_rounds_each_operation(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = COMPILE.replace("CAPABILITY", str(capability))
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    made = [line.split(" ", 3)[1:] for line in told.stdout.splitlines() if line.startswith("@@")]
    assert len(made) == 5 + 24 + 4 + 1
    for name, cubin, ptx in made:
        assert cubin == "True", name
        if name in ("_draw", "_add"):
            assert "mul.f32" in ptx or "mul.rn.f32" in ptx
            assert not re.search(r"\bfma\.|sqrt\.approx", ptx)
            assert "sqrt.rn." in ptx
            old = tuple(map(int, version("triton").split(".")[:2])) < (3, 3)  # which flushes denormal numbers
            assert old or ".ftz" not in ptx
