"""The programs that repeat the papers' experiments: their data, what survives an interruption, and docs/results.md."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the built-in digits need scikit-learn")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "reproduce"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "PROGRAM = Program(" in path.read_text())


def imported(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(FOLDER))


harness, training = imported("harness"), imported("training")


@pytest.fixture(autouse=True)
def without_hints(monkeypatch):
    """Lightning's hints are no errors here; the settings of the process stay."""
    monkeypatch.setattr(harness, "quiet", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- Data ---------------------------------------------------------------------------------------------------


def test_batches_have_each_sample_once_and_differ_by_epoch():
    batches = training.Batches(23, 5, seed=3)
    first = torch.cat(list(batches))
    batches.set_epoch(1)
    second = torch.cat(list(batches))
    assert len(batches) == 5
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(23))
    assert first.tolist() != second.tolist()
    batches.set_epoch(0)
    assert torch.cat(list(batches)).equal(first)


def test_sums_are_those_of_integers():
    symbols, result = imported("neural_gpu").sums(12, torch.Generator().manual_seed(0), 200)
    for each, bits in zip(symbols.tolist(), result.tolist(), strict=True):
        a, b = (sum(((symbol - 1) >> n & 1) << i for i, symbol in enumerate(each[:-1])) for n in (0, 1))
        assert a + b == sum(bit << i for i, bit in enumerate(bits))


def test_answers_are_what_the_stories_tell():
    network = imported("memory_network")
    texts, questions, answers = network.stories(300, 5).tensors
    first_place = network.PEOPLE + network.THINGS
    for text, question, answer in zip(texts.tolist(), questions.tolist(), answers.tolist(), strict=True):
        where, holder, place = {}, {}, {}  # of people; of things
        for person, verb, other in text:
            if verb == network.GOES:
                where[person] = other - first_place
            elif verb == network.TAKES:
                assert other not in holder
                holder[other] = person
            else:
                assert holder.pop(other) == person
                place[other] = where.get(person)
        told = where.get(holder[question]) if question in holder else place[question]
        assert told == answer


# --- Runs ---------------------------------------------------------------------------------------------------


def program(train, **options):
    rows = options.pop("rows", [{"kind": "a", "lr": 0.1}, {"kind": "b", "lr": 0.1}])

    def tables(records):
        return [harness.Table("Means.", ["n"], [[f"{len(records)}"]])]

    return harness.Program("trial", "A trial.", rows, train, tables, None, epochs=2, on_images=False, **options)


def measure(run):
    return harness.Result({"value": run.seed + 0.5}, {"accuracy": [0.1, 0.2]})


def lines(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_results_are_in_order_and_each_run_is_made_once(tmp_path, capsys):
    made = []

    def train(run):
        made.append(str(run))
        return measure(run)

    trial = program(train)
    trial.main(["--seeds", "1", "--out", str(tmp_path)])
    trial.main(["--seeds", "2", "--out", str(tmp_path)])
    assert made == ["a, 0.1, seed 0", "b, 0.1, seed 0", "a, 0.1, seed 1", "b, 0.1, seed 1"]
    assert lines(tmp_path / "trial.csv") == [
        ["kind", "lr", "seed", "epochs", "value"],
        ["a", "0.1", "0", "2", "0.5"],
        ["a", "0.1", "1", "2", "1.5"],
        ["b", "0.1", "0", "2", "0.5"],
        ["b", "0.1", "1", "2", "1.5"],
    ]
    by_epoch = lines(tmp_path / "trial_epochs.csv")
    assert by_epoch[1:3] == [["a", "0.1", "0", "2", "1", "0.1"], ["a", "0.1", "0", "2", "2", "0.2"]]
    assert len(by_epoch) == 9
    assert "4 runs, 2 of them finished before." in capsys.readouterr().out


def test_other_epochs_are_other_runs(tmp_path):
    trial = program(measure)
    trial.main(["--seeds", "1", "--out", str(tmp_path)])
    trial.main(["--seeds", "1", "--epochs", "3", "--out", str(tmp_path)])
    assert [line[3] for line in lines(tmp_path / "trial.csv")] == ["epochs", "2", "3", "2", "3"]


def test_a_failure_stops_nothing_else_and_is_tried_again(tmp_path, capsys):
    broken = True

    def train(run):
        if broken and run.settings["kind"] == "a":
            raise RuntimeError("no luck")
        return measure(run)

    trial = program(train)
    with pytest.raises(SystemExit, match="1 runs failed; the same command tries them again"):
        trial.main(["--seeds", "1", "--out", str(tmp_path)])
    assert "Failed: a, 0.1, seed 0: RuntimeError: no luck" in capsys.readouterr().out
    assert [line[0] for line in lines(tmp_path / "trial.csv")] == ["kind", "b"]
    broken = False
    trial.main(["--seeds", "1", "--out", str(tmp_path)])
    assert [line[0] for line in lines(tmp_path / "trial.csv")] == ["kind", "a", "b"]


def test_finished_runs_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    trial, write = program(measure), harness.write_csv

    def stopped(path, records):
        if path.name == "trial.csv":
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(harness, "write_csv", stopped)
    with pytest.raises(SystemExit, match="Interrupted. The same command goes on"):
        trial.main(["--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(harness, "write_csv", write)
    trial.main(["--seeds", "1", "--out", str(tmp_path)])
    assert len(lines(tmp_path / "trial.csv")) == 3
    assert len(lines(tmp_path / "trial_epochs.csv")) == 5


def test_two_programs_at_once_are_refused(tmp_path):
    lock = harness.FileLock(tmp_path / "trial.lock")
    with lock, pytest.raises(SystemExit, match="is running for .* already"):
        program(measure).main(["--out", str(tmp_path)])
    program(measure).main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind,lr,seed\na,0.1,0\n", r"trial.csv has no columns \['epochs'\]"),
        ("kind,lr,seed,epochs,value\na,0.1,0,2,1.5\na,0.1\n", "trial.csv, line 3, has not as many cells"),
        ("kind,lr,seed,epochs,value\na,0.1,0,2,1.5,7\n", "trial.csv, line 2, has not as many cells"),
        ("kind,lr,seed,epochs,other\na,0.1,0,2,1.5\n", "trial.csv has other columns than"),
        (b"\xff\xfe\x00", "trial.csv is damaged"),
    ],
)
def test_damaged_files_are_named_and_kept(text, message, tmp_path):
    path = tmp_path / "trial.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=message):
        program(measure).main(["--out", str(tmp_path)])
    assert path.read_bytes() == before


def test_smoke_form_deletes_only_its_own_files(tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "thesis.txt").write_text("mine")
    for _ in range(2):
        program(measure).main(["--smoke", "--out", str(tmp_path)])
    assert (tmp_path / "smoke" / "thesis.txt").read_text() == "mine"
    assert len(lines(tmp_path / "smoke" / "trial.csv")) == 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"),
        ([1.0], "1.0"),
        ([3.0, 1.0, 2.0], "2.0 (1.0 to 3.0)"),
        ([math.nan, 1.0, 2.0, 3.0], "2.0 (1.0 to 3.0); 1 not finite"),
        ([math.inf], "1 not finite"),
    ],
)
def test_spread_is_that_of_finite_values(values, text):
    assert harness.spread(values) == text


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_pictures_stand_missing_runs(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    own = imported(name).PROGRAM
    path = ROOT / "docs" / "results" / f"{name}.csv"
    records, epochs = harness.read_csv(path), harness.read_csv(harness._by_epoch(path))
    for kept in ([], records[:1], records[::3]):
        keys = {own._key(record) for record in kept}
        assert all(str(table) for table in own.tables(kept))
        own.draw(kept, [each for each in epochs if own._key(each) in keys], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "-1"], "--epochs must be at least 1, got -1"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--rows", "c", "0.1"], "no row has c and 0.1. The settings are kind a, b; lr 0.1."),
        (["--out", __file__], "is not a directory"),
        (["--out", "/dev/null/x"], "can't be written"),
    ],
)
def test_wrong_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        program(measure).main(["--out", str(tmp_path), *arguments])


def test_images_are_asked_for(tmp_path):
    asking = imported("relu_sigmoid_nodes").PROGRAM
    with pytest.raises(SystemExit, match="--data: say where MNIST's idx files are"):
        asking.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is not a directory"):
        asking.main(["--out", str(tmp_path), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="leave out --data, or --smoke"):
        asking.main(["--out", str(tmp_path), "--data", str(tmp_path), "--smoke"])


SLEEPING = """
import os, sys, time
sys.path.insert(0, {folder!r})
from harness import Program, Result

def train(run):
    (run.out / f"{{os.getpid()}}.pid").touch()
    time.sleep(300)
    return Result({{"value": 1.0}})

rows = [{{"kind": "a"}}, {{"kind": "b"}}]
PROGRAM = Program("trial", "A trial.", rows, train, lambda records: [], None, epochs=1, on_images=False)
if __name__ == "__main__":
    PROGRAM.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes")
def test_interrupt_ends_all_processes_at_once(jobs, tmp_path):
    script = tmp_path / "trial.py"
    script.write_text(SLEEPING.format(folder=str(FOLDER)))
    command = [sys.executable, str(script), "--jobs", str(jobs), "--out", str(tmp_path)]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < jobs and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGINT)
    printed, _ = started.communicate(timeout=60)
    assert started.returncode
    assert "Interrupted. The same command goes on." in printed
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(workers) == jobs
    end = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class Interrupted(training.EachEpoch):
    """Stops before the second epoch, the first time."""

    stopped = False

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not Interrupted.stopped:
            Interrupted.stopped = True
            raise RuntimeError("interrupted")
        super().on_train_epoch_start(trainer, pl_module)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gradient_noise_mnist", {"init": "good", "clip": "10", "noise": noise, "optimizer": "sgd", "lr": 0.01})
        for noise in ("annealed", "no, dropout", "before clipping", "on weights")
    ]
    + [
        ("anact_lenet5", {"activation": "nsw"}),
        ("noisy_units", {"gates": "NAH, annealed"}),
        ("memory_network", {"training": "two stages", "noise": "yes"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@pytest.mark.slow
def test_continued_runs_are_those_without_interruption(name, settings, tmp_path, monkeypatch):
    module = imported(name)
    monkeypatch.setattr(module, "STEPS", 5, raising=False)
    whole = module.train(harness.Run(settings, 1, 2, None, tmp_path / "whole"))
    monkeypatch.setattr(training, "EachEpoch", Interrupted)
    Interrupted.stopped = False
    run = harness.Run(settings, 1, 2, None, tmp_path / "parts")
    with pytest.raises(RuntimeError, match="interrupted"):
        module.train(run)
    parts = module.train(run)
    assert Interrupted.stopped
    assert len(whole.epochs[next(iter(whole.epochs))]) == 2
    assert parts.epochs == whole.epochs
    assert parts.values == pytest.approx(whole.values, rel=0, abs=0, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_form_runs(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    jobs = "2" if name == "r_scores" else "1"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", "--jobs", jobs, "--out", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    records = harness.read_csv(tmp_path / "smoke" / f"{name}.csv")
    own = imported(name).PROGRAM
    rows = [row for row in own.rows if set(own.only) <= set(map(str, row.values()))]
    assert [{key: record[key] for key in rows[0]} for record in records] == [
        {key: harness._number(str(value)) for key, value in row.items()} for row in rows
    ]
    for table in own.tables(records):
        assert str(table) in printed
    assert (tmp_path / "smoke" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100_resnet50", "cifar100_vgg19"])
def test_large_programs_take_steps_in_two_processes(name, tmp_path):
    options = ["--smoke", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--out", str(tmp_path)]
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options, "--gradient-noise", "0.01"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "'anact_score':" in printed.stdout, printed.stderr
    assert "2 processes" in printed.stderr
    assert list(tmp_path.rglob("*.ckpt"))


# --- docs/results.md ----------------------------------------------------------------------------------------


def test_every_figure_of_the_page_is_in_the_files():
    page, path = imported("page"), ROOT / "docs" / "results.md"
    text = path.read_text()
    assert page.filled(text, path.parent / "results") == text
    named = set(re.findall(r"<!-- table \d+ of (\w+)\.csv -->", text))
    assert named == set(NAMES) == set(page.PROGRAMS)
    for name, own in page.PROGRAMS.items():
        count = len(own.tables(harness.read_csv(path.parent / "results" / f"{name}.csv")))
        assert text.count(f" of {name}.csv -->") == count
    prose, tables = page.PLACE.sub("", text), "".join(found[0] for found in page.PLACE.finditer(text))
    in_tables = set(re.findall(r"\d+(?:\.\d+)?", tables))
    percentages = re.findall(r"(\d+(?:\.\d+)?)(?: to (\d+(?:\.\d+)?))? %", prose)
    unknown = {number for pair in percentages for number in pair if number} - in_tables
    assert not unknown, f"in no table: {unknown}"


def test_figures_of_the_readme_are_those_of_the_page():
    page, readme = (path.read_text() for path in (ROOT / "docs" / "results.md", ROOT / "README.md"))
    learned, noise, none = re.search(r"(\d of \d) times \((.+?) %\), never without \((.+?) %\)", readme).groups()
    assert re.search(rf"\| SGD, noise after the clipping, annealed +\| {noise} .*\| {learned} +\|", page)
    assert re.search(rf"\| SGD, no noise +\| {none} +\| 0 of {learned[-1]} +\|", page)


def test_changed_figure_is_noticed(tmp_path):
    page, path = imported("page"), ROOT / "docs" / "results.md"
    records = harness.read_csv(path.parent / "results" / "r_scores.csv")
    records[0]["a"] += 0.1
    harness.write_csv(tmp_path / "r_scores.csv", records)
    only = re.search(r"<!-- table 1 of r_scores.csv -->.*?<!-- end -->", path.read_text(), re.DOTALL)[0]
    assert page.filled(only, tmp_path) != only
