"""What the programs of this folder share: runs that may be interrupted, results and tables; `training.py` has the rest.

A program is a list of rows (settings), a function that trains one of them with a seed, and functions that make tables
and a picture of the results. `Program.main` does the rest; `--help` shows the options. Finished runs are lines of
`<out>/<name>.csv`, what they measured after each epoch is in `<out>/<name>_epochs.csv`; the same command skips those
and continues what was interrupted. A continued run gives the numbers of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "by_feature")]
from quickstart import load_mnist

Settings = Mapping[str, str | float]
Record = dict[str, Any]  # a line of a CSV file: settings, seed and what was measured


# --- Runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: a row, a seed, and where its files go."""

    settings: Settings
    seed: int
    epochs: int
    data: Path | None
    out: Path
    program: str = ""

    @property
    def checkpoint(self) -> Path:
        """The folder of its checkpoint until it is finished."""
        words = "_".join(map(str, (self.program, *self.settings.values(), self.epochs, self.seed)))
        return self.out / "unfinished" / "".join(each if each.isalnum() or each in "_.-" else "-" for each in words)

    def __str__(self) -> str:
        return f"{', '.join(str(value) for value in self.settings.values() if value != '')}, seed {self.seed}"


@dataclass
class Result:
    """What a run measured: numbers, and numbers after each epoch."""

    values: dict[str, float]
    epochs: dict[str, list[float]] = field(default_factory=dict)


def quiet() -> None:
    """Without Lightning's hints, with one thread: runs side by side are faster."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_noisy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


# --- Results ------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table in Markdown."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(len(line[i]) for line in (self.head, *self.lines)) for i in range(len(self.head))]
        lines = [self.head, ["-" * width for width in widths], *self.lines]
        rows = (
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )
        return f"{self.title}\n\n" + "\n".join(rows)


def select(records: Sequence[Record], **settings: Any) -> list[Record]:
    """The records that have these settings."""
    return [record for record in records if all(record[name] == value for name, value in settings.items())]


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Median, least and greatest of the finite values: ``"94.5 (93.9 to 95.0)"``; a dash if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    others = f"{len(values) - len(finite)} not finite" if len(finite) < len(values) else ""
    if not finite:
        return others or "-"
    least, middle, greatest = (form.format(each) for each in (min(finite), statistics.median(finite), max(finite)))
    return (middle if least == greatest else f"{middle} ({least} to {greatest})") + (others and f"; {others}")


def draw_sorted(path: Path, runs: Mapping[str, tuple[str, Sequence[float]]], ylabel: str) -> None:
    """A picture of the values of many runs, sorted; by label a format of matplotlib's and the values."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for label, (form, values) in runs.items():
        axes.plot(range(1, len(values) + 1), sorted(values), form, markersize=3, label=label)
    axes.set(xlabel="run, from the best on", ylabel=ylabel, ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_csv(path: Path) -> list[Record]:
    """The records of a CSV file; what looks like a number is one.

    Raises:
        SystemExit: if the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} is damaged: {error}. Mend it, or move it away.") from None
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise SystemExit(f"{path}, line {number}, has not as many cells as the first. Mend it, or move it away.")
    return [{name: _number(value) for name, value in line.items()} for line in lines]


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text or "e" in text or "n" in text else int(text)
    except ValueError:
        return text


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write records, all with the same names, in one step: an interrupted write loses nothing."""
    beside = path.with_suffix(".writing")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()})
    os.replace(beside, path)


# --- Programs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A table or figure of a paper.

    Attributes:
        name: of its files.
        text: what it does, for ``--help``.
        rows: settings, all with the same names.
        train: makes one run.
        tables: of the records.
        draw: writes a picture of the records, and of those after each epoch, to a path; or None.
        epochs: by default; 0 if there is no such thing.
        seeds: by default; 1 if nothing is random.
        on_images: whether ``--data`` is needed.
        only: the default of ``--rows``.
    """

    name: str
    text: str
    rows: Sequence[Settings]
    train: Callable[[Run], Result]
    tables: Callable[[list[Record]], list[Table]]
    draw: Callable[[list[Record], list[Record], Path], None] | None
    epochs: int
    seeds: int = 5
    on_images: bool = True
    only: Sequence[str] = ()

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Do what the command line says."""
        options = self._options(arguments)
        quiet()
        path = options.out / f"{self.name}.csv"
        by_epoch, picture = _by_epoch(path), path.with_suffix(".png")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(f"--out: this program is running for {options.out} already.") from None
        except OSError as error:
            raise SystemExit(f"--out: {options.out} can't be written: {error}.") from None
        try:
            if options.smoke:
                for file in (path, by_epoch, picture):
                    file.unlink(missing_ok=True)
                for folder in path.parent.glob(f"unfinished/{self.name}_*"):
                    shutil.rmtree(folder)
            failed = self._work(options, path)
        except KeyboardInterrupt:
            raise SystemExit("\nInterrupted. The same command goes on.") from None
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        records, epochs = (
            [each for each in read_csv(file) if each["epochs"] == options.epochs] for file in (path, by_epoch)
        )
        for table in self.tables(records):
            print(f"\n{table}")
        print(f"\nEach run: {path}")
        if self.draw is not None:
            self.draw(records, epochs, picture)
            print(f"Picture: {picture}")
        if failed:
            raise SystemExit(f"{failed} runs failed; the same command tries them again.")

    def _options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            prog=f"{self.name}.py", description=self.text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if self.on_images:
            parser.add_argument(
                "--data", type=Path, metavar="DIR", help="with MNIST's idx files; for others take another --out"
            )
        if self.seeds > 1:
            parser.add_argument("--seeds", type=int, metavar="N", default=self.seeds, help="default: %(default)s")
        if self.epochs:
            parser.add_argument("--epochs", type=int, metavar="N", default=self.epochs, help="default: %(default)s")
        parser.add_argument("--jobs", type=int, metavar="N", default=1, help="runs side by side, one thread each")
        parser.add_argument(
            "--rows",
            metavar="SETTING",
            nargs="+",
            default=self.only,
            help=f"only rows with all of these: {self._choices()}",
        )
        parser.add_argument("--out", type=Path, metavar="DIR", default=Path("reproduced"), help="default: %(default)s")
        parser.add_argument("--smoke", action="store_true", help="only check that it runs: a minute, small data")
        options = parser.parse_args(arguments)
        for name in ("seeds", "epochs", "jobs"):
            if getattr(options, name, 1) < 1:
                raise SystemExit(f"--{name} must be at least 1, got {getattr(options, name)}.")
        if options.out.exists() and not options.out.is_dir():
            raise SystemExit(f"--out: {options.out} is not a directory.")
        for name, value in (("data", None), ("epochs", 0), ("seeds", 1)):
            setattr(options, name, getattr(options, name, value))
        if options.smoke and options.data is not None:
            raise SystemExit("--smoke takes scikit-learn's digits: leave out --data, or --smoke.")
        if options.smoke:
            options.seeds, options.out = 1, options.out / "smoke"
            options.epochs = min(options.epochs, 1)
        elif self.on_images and options.data is None:
            raise SystemExit(
                "--data: say where MNIST's idx files are, or --smoke to try it with scikit-learn's digits."
            )
        elif options.data is not None:
            load_mnist(options.data)  # says at once what is wrong with them
            options.data = options.data.resolve()
        return options

    def _work(self, options: argparse.Namespace, path: Path) -> int:
        """Make the runs that are not in the file yet; return how many failed."""
        records = read_csv(path)
        missing = {*self.rows[0], "seed", "epochs"} - set(records[0] if records else (*self.rows[0], "seed", "epochs"))
        if missing:
            raise SystemExit(f"{path} has no columns {sorted(missing)}: it is of another version. Move it away.")
        done = {self._key(record) for record in records}
        runs = [
            Run(row, seed, options.epochs, options.data, path.parent, self.name)
            for seed in range(options.seeds)
            for row in self.rows
            if set(options.rows) <= set(map(str, row.values()))
        ]
        if not runs:
            raise SystemExit(f"--rows: no row has {' and '.join(options.rows)}. The settings are {self._choices()}.")
        left = [run for run in runs if self._key({**run.settings, "seed": run.seed, "epochs": run.epochs}) not in done]
        print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before.", flush=True)
        started, failed = time.monotonic(), 0
        with closing(self._results(left, options.jobs)) as results:
            for number, (run, result) in enumerate(results, 1):
                if isinstance(result, BaseException):
                    failed += 1
                    print(f"Failed: {run}: {type(result).__name__}: {result}", flush=True)
                    continue
                self._add(path, run, result)
                shutil.rmtree(run.checkpoint, ignore_errors=True)
                if run.checkpoint.parent.is_dir() and not any(run.checkpoint.parent.iterdir()):
                    run.checkpoint.parent.rmdir()
                rest = (time.monotonic() - started) / number * (len(left) - number)
                first = ", ".join(f"{name} {value:.4g}" for name, value in list(result.values.items())[:2])
                print(f"{number}/{len(left)}  {run}: {first}. {_duration(rest)} left.", flush=True)
        return failed

    def _results(self, runs: Sequence[Run], jobs: int) -> Generator[tuple[Run, Result | BaseException], None, None]:
        if jobs == 1:
            for run in runs:
                try:
                    result: Result | BaseException = self.train(run)
                except Exception as error:
                    result = error
                except SystemExit:  # which Lightning makes of Ctrl-C
                    raise KeyboardInterrupt from None
                yield run, result
            return
        pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_in_worker)
        try:
            futures: dict[Future[Result], Run] = {pool.submit(self.train, run): run for run in runs}
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], future.result() if error is None else error
        finally:  # also if the results can't be saved: what is still running ends
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()

    def _add(self, path: Path, run: Run, result: Result) -> None:
        """Add a run to the files, whose lines are in the order of rows and seeds, however the runs ended."""
        about = {**run.settings, "seed": run.seed, "epochs": run.epochs}
        lines: list[Record] = [
            {**about, "epoch": epoch, **dict(zip(result.epochs, values, strict=True))}
            for epoch, values in enumerate(zip(*result.epochs.values(), strict=True), 1)
        ]
        order = {tuple(map(str, row.values())): number for number, row in enumerate(self.rows)}
        # The short file last: it says that the run is finished.
        for file, added in ((_by_epoch(path), lines), (path, [{**about, **result.values}])):
            if added:
                records = [each for each in read_csv(file) if self._key(each) != self._key(about)]
                if records and set(records[0]) != set(added[0]):
                    raise SystemExit(
                        f"{file} has other columns than {list(added[0])}: it is of another version. Move it away."
                    )
                records = sorted(
                    records + added,
                    key=lambda each: (order.get(self._key(each)[:-2], -1), each["epochs"], each["seed"]),
                )
                write_csv(file, records)

    def _choices(self) -> str:
        """All settings."""
        columns = {name: dict.fromkeys(str(row[name]) for row in self.rows if row[name] != "") for name in self.rows[0]}
        return "; ".join(f"{name} {', '.join(values)}" for name, values in columns.items())

    def _key(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(record[name]) for name in (*self.rows[0], "seed", "epochs"))


def _in_worker() -> None:
    """Settings of a process that makes runs: it ends with the process that started it, however that ends."""
    quiet()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _by_epoch(path: Path) -> Path:
    return path.with_name(f"{path.stem}_epochs.csv")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
