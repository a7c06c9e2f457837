"""examples/quickstart.py: `make demo`."""

import gzip
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_idx(path, array, *, header=None):
    shape = struct.pack(f">{array.dim()}I", *array.shape)
    raw = (header or struct.pack(">HBB", 0, 8, array.dim())) + shape + array.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def mnist(tmp_path):
    """Four idx files, two of them gzipped."""
    images = torch.arange(3 * 4 * 5).reshape(3, 4, 5)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.tensor([3, 1, 9]))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:2])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", torch.tensor([0, 2]))
    return tmp_path


def test_mnist_files_are_read(quickstart, mnist):
    data = quickstart.load_mnist(mnist)
    x, y = data.train.tensors
    assert x.shape == (3, 20)
    torch.testing.assert_close(x[1] * 255, torch.arange(20.0, 40.0))
    assert y.tolist() == [3, 1, 9]
    assert (len(data.test), data.inputs) == (2, 20)


def test_digits_are_split_without_overlap(quickstart):
    data = quickstart.load_digits()
    assert (len(data.train), len(data.test), data.inputs) == (1438, 359, 64)
    assert data.train.tensors[0].max() == 1
    assert torch.cat([data.train.tensors[1], data.test.tensors[1]]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", truncate, "damaged"),
        ("train-images-idx3-ubyte.gz", lambda path: path.write_bytes(b"<html>"), "damaged"),
        ("t10k-images-idx3-ubyte", truncate, "37 bytes for shape"),
        ("t10k-images-idx3-ubyte", lambda path: path.write_bytes(b""), "damaged"),
        ("t10k-labels-idx1-ubyte", lambda path: write_idx(path, torch.zeros(0)), "damaged"),
        ("t10k-images-idx3-ubyte", lambda path: path.unlink(), "neither t10k-images-idx3-ubyte nor"),
        ("t10k-images-idx3-ubyte", lambda path: write_idx(path, torch.zeros(2, 4, 4)), "differ in size"),
        ("t10k-labels-idx1-ubyte", lambda path: write_idx(path, torch.zeros(3)), "don't fit"),
        ("t10k-labels-idx1-ubyte", lambda path: write_idx(path, torch.tensor([1, 99])), "label 99"),
        (
            "t10k-labels-idx1-ubyte",
            lambda path: write_idx(path, torch.zeros(2), header=struct.pack(">HBB", 0, 13, 1)),
            "no idx file of bytes",
        ),
    ],
)
def test_damaged_files_get_one_clear_line(quickstart, mnist, name, damage, message):
    damage(mnist / name)
    with pytest.raises(SystemExit, match=message) as caught:
        quickstart.load_mnist(mnist)
    assert "\n" not in str(caught.value)


def test_wrong_path_gets_one_clear_line(quickstart, tmp_path):
    with pytest.raises(SystemExit, match="--data: .*nowhere is not a directory"):
        quickstart.load_mnist(tmp_path / "nowhere")


@pytest.mark.slow
def test_quickstart_runs_and_leaves_a_picture_and_curves(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"tensorboard --logdir {tmp_path / 'out'}" in result.stdout
    assert "ANAct score" in result.stdout
    assert (tmp_path / "out" / "quickstart.png").stat().st_size > 20_000
    assert len(list((tmp_path / "out").glob("*/events.out.tfevents.*"))) == 4


@pytest.mark.parametrize("option", ["--seed=-1", "--seed=4294967296", "--threads=0"])
def test_option_out_of_range_gets_one_clear_line(quickstart, monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", option])
    with pytest.raises(SystemExit, match=option.replace("=", ": ")) as caught:
        quickstart.main()
    assert "\n" not in str(caught.value)


@pytest.fixture
def in_process(monkeypatch):
    """Puts back what the script sets in its process: its seed, and threads too many for layers this small."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_second_run_replaces_the_curves_of_the_first(quickstart, tmp_path):
    data = quickstart.load_digits()
    for steps in (40, 20):
        run, _ = quickstart.rescue(data, steps, tmp_path)
    assert run.curve("accuracy")[0] == list(range(20))


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_swap_trains_twenty_layers_that_starve_without_it(quickstart, tmp_path):
    runs = quickstart.swap(quickstart.load_digits(), quickstart.SWAP_STEPS, tmp_path, seed=0)
    plain, normalized = (run.curve("accuracy")[1] for run in runs)
    assert max(plain) <= 0.25  # two of the ten digits, and a little
    assert normalized[-1] >= 0.9
