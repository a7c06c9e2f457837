"""The callback that logs what the activations do."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_noisy.callbacks._board import (
    write_classes,
    write_figures,
    write_findings,
    write_histograms,
    write_layout,
)
from lightning_noisy.callbacks._lightning_internals import batches_until, step_to_log
from lightning_noisy.callbacks._logging import log_scalars
from lightning_noisy.callbacks._monitored_sites import agreed_sites
from lightning_noisy.gradient_noise.parameter_names import parameter_names
from lightning_noisy.monitoring.classes import ClassWatch
from lightning_noisy.monitoring.diagnosis import Findings, Site, Thresholds, diagnose
from lightning_noisy.monitoring.recorder import ActivationRecorder
from lightning_noisy.monitoring.report import SignalReport, described, signal_report, table_of
from lightning_noisy.monitoring.statistics import DEFAULT, STATISTICS
from lightning_noisy.monitoring.weights import WeightSums
from lightning_noisy.nn.registry import check_name
from lightning_noisy.replacement.report import say
from lightning_noisy.replacement.sites import activation_sites

__all__ = ["ActivationMonitor"]

_STAGES = ("train", "validate")
# What findings are made from, and next to nothing to compute.
_FOR_FINDINGS = ("rho", "rho_prime", "saturation", "dead_units", "mean", "std", "input_std", "rejected")
_HISTORY = 500  # logged steps


class ActivationMonitor(pl.Callback):
    r"""Log what each activation does to signal and gradient: the ANAct scores, saturation, sparsity and dead units.

    Every call site of the model counts, as :func:`~lightning_noisy.activation_sites` lists them: modules, each use of a
    shared one, functions, methods. By default these are logged, with the site's name after the slash:

    ========================= ==================================================================================
    ``rho/<site>``            :math:`E[\varphi(h)^2] / \mathrm{Var}[h]`, the gain of the signal (Eq. 5 of Yuan et
                              al., "ANAct", 2022)
    ``rho_prime/<site>``      :math:`E[\varphi'(h)^2]`, the gain of the gradient (Eq. 6)
    ``r_score/<site>``        :math:`\ln(\mathrm{Var}[\varphi(h)] / (\mathrm{Var}[h]\, E[\varphi'(h)^2]))` (Eq. 19)
    ``saturation/<site>``     share of elements with a slope below ``saturation_threshold`` times the function's
                              largest (Gulcehre et al., "Noisy Activation Functions", 2016, Def. 2.2 and 2.3)
    ``sparsity/<site>``       share of elements that are inactive: φ(h) <= 0, for a normalized activation before
                              its shift (Pretorius et al., 2019, Table 1)
    ``dead_units/<site>``     share of units (channels or features) without a slope at any element of the window
    ``lambda/<site>``         of a normalized activation: its factor λ + f(α) (ANAct, Eq. 13 and 15)
    ``mu/<site>``             of a normalized activation: its shift μ (Eq. 16)
    ``anact_score``           :math:`\sum (|\ln\rho| + |\ln\rho'|) / 2` over the hidden sites (Eq. 22), 0 at best
    ``anact_score_mean``      the same divided by their number
    ========================= ==================================================================================

    On request by ``statistics``: ``saturation_left``, ``saturation_right`` (by the sign of h), ``saturation_hard`` (a
    slope of 0), ``saturation_magnitude`` (E|Δ| of a noisy activation, Eq. 8), ``dormant_units`` (at most 0.025 of the
    mean \|φ\| of all units, Sokar et al. 2023), ``mean``, ``std``, ``input_mean``, ``input_std``, ``grad_rms`` (of the
    gradient of φ(h)), ``rejected`` (batches in a row that a normalized activation rejected); and of each weight matrix
    ``weight_mean/<parameter>`` (\|E[W]\|), ``weight_mean_sum``, ``grad_variance/<parameter>`` (after unscaling, before
    clipping and noise; Eq. 8) and ``update_ratio/<parameter>`` (‖ΔW‖ / ‖W‖ of the step).

    Only the batches of a logging step are looked at; at the others the model has no hooks. Sums are pooled over the
    batches of the window and over all ranks, with one reduction and one host sync per logging step. In those steps,
    what is compiled runs eagerly. Training is bit for bit the same as without the monitor, except that compiled code
    rounds differently from eager code. Values go to every logger and to ``trainer.callback_metrics``; undefined ones,
    such as ρ of a site whose input doesn't vary, as NaN. Tensor-parallel ranks count their own units.

    Args:
        every_n_steps: log at every n-th step, >= 1; by default the Trainer's ``log_every_n_steps``.
        window: how many batches to pool for a logging step, up to and including its own, >= 1; at most those since the
            last one.
        sites: patterns of the names of sites, such as ``"encoder.*"``; by default all. A pattern that matches nothing
            warns, and shows the closest names.
        statistics: which to log; ``"default"`` stands for those above, ``"all"`` for all.
        stages: ``"train"``, and ``"validate"`` for tags that begin with ``val_``, pooled over all validation batches.
        prog_bar: tags to show in the progress bar, such as ``("anact_score",)``.
        histograms: write the distribution of each site's pre-activations to TensorBoard, ``pre_activation/<site>``.
        figures: write two pictures to TensorBoard at the end of each epoch: the saturation over depth and time, and how
            large signal and gradient are at each site. Needs matplotlib.
        classes: number of classes, >= 1, of batches that are inputs and class numbers: ``figures`` then has for each of
            the first 8 hidden sites the median and the deviation of each unit by class (Pretorius et al., 2019, Fig. 5
            to 7), of the recorded batches of the first process in this epoch.
        signal_report: print :func:`~lightning_noisy.signal_report` of the first training batch.
        warn: warn of a finding during training, once for each kind.
        thresholds: from which values on something is a finding.
        saturation_threshold: share of the largest slope, in (0, 1).

    Attributes:
        report: what the activations did, with findings, worst first: a
            :class:`~lightning_noisy.monitoring.report.SignalReport` of the last logged step, also after the fit.

    Raises:
        ValueError: if an argument is outside its range, or a name is unknown.
        ImportError: if ``figures`` needs matplotlib.

    >>> trainer = pl.Trainer(callbacks=[ActivationMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        window: int = 1,
        sites: str | Sequence[str] | None = None,
        statistics: str | Sequence[str] = "default",
        stages: str | Sequence[str] = "train",
        prog_bar: str | Sequence[str] = (),
        histograms: bool = False,
        figures: bool = False,
        classes: int | None = None,
        signal_report: bool = False,
        warn: bool = False,
        thresholds: Thresholds | None = None,
        saturation_threshold: float = 0.05,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("window", window), ("classes", classes)):
            if value is None and name != "window":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
        if not (0 < saturation_threshold < 1):
            raise ValueError(f"saturation_threshold must be in (0, 1), got {saturation_threshold!r}.")
        self.every_n_steps = every_n_steps
        self.window = window
        self.sites = None if sites is None else _names(sites)
        for name, given in (("sites", sites), ("statistics", statistics), ("stages", stages)):
            if given is not None and not given:
                raise ValueError(f"{name} must not be empty, got {given!r}.")
        if classes is not None and not figures:
            raise ValueError("classes are drawn in figures: pass figures=True, too.")
        if thresholds is not None and not isinstance(thresholds, Thresholds):
            raise TypeError(f"thresholds must be a Thresholds, such as Thresholds(saturation=0.3), got {thresholds!r}.")
        self.statistics = _chosen(_names(statistics))
        self.stages = _names(stages)
        for stage in self.stages:
            if stage not in _STAGES:
                raise ValueError(f"stages must be of {_STAGES}, got {stage!r}.")
        self.prog_bar = _names(prog_bar)
        if figures and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("figures=True needs matplotlib: pip install matplotlib.")
        self.histograms = histograms
        self.figures = figures
        self.classes = classes
        self.signal_report = signal_report
        self.warn = warn
        self.thresholds = thresholds or Thresholds()
        self.saturation_threshold = saturation_threshold
        self._history: list[tuple[int, dict[str, float]]] = []
        self._is_new = True  # whether nothing was logged in this fit: the history is that of the last one
        self._classes: ClassWatch | None = None
        self._order: list[Site] = []  # in the order of their first calls
        self._has_layout = False
        self._warned: set[str] = set()
        self._recorder: ActivationRecorder | None = None
        self._validation: ActivationRecorder | None = None  # has sums of its own: it may interrupt a window
        self._weights: WeightSums | None = None
        self._recorded = 0  # batches of the window
        self._is_logging = False  # whether this batch completes a logged step

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the activations."""
        self._release()
        self._is_new, self._has_layout, self._warned = True, False, set()
        self._classes = ClassWatch(self.classes) if self.classes is not None and self.figures else None
        found = activation_sites(pl_module)
        sites = agreed_sites(trainer, found, self.sites)
        mesh = getattr(pl_module, "device_mesh", None)
        split = (
            mesh["tensor_parallel"] if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()) else None
        )
        make = partial(
            ActivationRecorder,
            pl_module,
            sites,
            statistics=tuple(
                dict.fromkeys((*self.statistics, *_FOR_FINDINGS, *(("grad_rms",) if self.figures else ())))
            ),
            saturation_threshold=self.saturation_threshold,
            histograms=self.histograms,
            shards=1 if split is None else split.size(),
            shard=0 if split is None else split.get_local_rank(),
        )
        self._recorder = make(classes=self._classes)
        self._validation = make() if "validate" in self.stages else None
        self._weights = WeightSums(parameter_names(pl_module), self.statistics, device=self._recorder.sums.table.device)
        unseen = [f"{name}: {reason}" for name, reason in self._recorder.unseen.items()] + found.unresolved
        if not self._recorder.sites:
            rank_zero_warn(
                f"ActivationMonitor found no activations in {type(pl_module).__name__} that it can look at."
                + (f" Not seen: {'; '.join(unseen)}." if unseen else ""),
                category=UserWarning,
            )
            return
        say(
            f"ActivationMonitor looks at {len(self._recorder.sites)} activations; anact_score sums over"
            f" {self._recorder.scored} hidden ones." + (f" Not seen: {'; '.join(unseen)}." if unseen else "")
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record this batch, if it is of a window."""
        if self.signal_report and trainer.global_step == 0 and batch_idx == 0:
            self._report_first(pl_module, batch)
        if self._recorder is None or "train" not in self.stages:
            return
        left = batches_until(trainer, self.every_n_steps)
        self._is_logging = left == 0
        if left is not None and left < self.window:
            self._recorder.attach()
            self._recorded += 1
            if self._classes is not None:
                self._classes.begin(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients, after unscaling and before clipping."""
        if self._weights is not None and self._is_logging:
            self._weights.before_step(each for group in optimizer.param_groups for each in group["params"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window, if it is due."""
        if self._recorder is None or not self._recorded:
            return
        self._recorder.detach()
        if self._is_logging:
            cast(WeightSums, self._weights).after_step()
            self._recorded, self._is_logging = 0, False
            self._log(trainer, pl_module, self._recorder)

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, recorder: ActivationRecorder, prefix: str = ""
    ) -> None:
        """Pool and log what was recorded."""
        weights, step = cast(WeightSums, self._weights), step_to_log(trainer)

        def add_up(sums: Tensor) -> Tensor:
            return trainer.strategy.reduce(sums.clone(), reduce_op="sum")

        pooled = recorder.pooled(add_up if trainer.world_size > 1 else None, weights.extra())
        recorder.reset()
        found = recorder.compute(pooled) | weights.values(pooled)
        chosen = {tag: value for tag, value in found.items() if tag.partition("/")[0] in self.statistics}
        values = {prefix + tag: value for tag, value in chosen.items()}
        log_scalars(trainer, values, step)
        shown = {tag: values[tag] for tag in self.prog_bar if tag in values}
        if shown:
            pl_module.log_dict(shown, prog_bar=True, logger=False)
        if self.histograms:
            write_histograms(trainer, pooled.extra["histograms"], [prefix + site.name for site in recorder.sites], step)
        if not prefix:
            self._keep(step, found)
            self._order = described([recorder.sites[number] for number in recorder.called])
            if len(self._history) == 2:
                self._write_layout(trainer)
            if self.warn:
                self._warn()

    def _keep(self, step: int, values: dict[str, float]) -> None:
        """Keep the values for the report; of long runs every other, every fourth, ..."""
        if self._is_new:
            self._history, self._is_new = [], False
        if len(self._history) >= _HISTORY:
            del self._history[1:-1:2]
        self._history.append((step, values))

    def _write_layout(self, trainer: pl.Trainer) -> None:
        if not self._has_layout:
            self._has_layout = True
            write_layout(trainer, dict.fromkeys([*map(str, trainer.callback_metrics)]))

    def _report_first(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Print what the activations do to the first batch."""
        try:
            say(f"The first batch:\n{signal_report(pl_module, batch, thresholds=self.thresholds)}")
        except Exception as error:  # of the user's code, without a Trainer
            rank_zero_warn(f"There is no report of the first batch: {error}")

    def _warn(self) -> None:
        """Warn of findings, once for each kind."""
        for finding in self._findings():
            if finding.kind not in self._warned:
                self._warned.add(finding.kind)
                rank_zero_warn(str(finding))

    def _findings(self) -> Findings:
        return diagnose(self._history, self._order, thresholds=self.thresholds)

    @property
    def report(self) -> SignalReport:
        """What the activations did, up to the last logged step.

        Raises:
            RuntimeError: if nothing was logged yet.
        """
        if not self._history:
            raise RuntimeError(
                "ActivationMonitor has logged nothing of a training yet, so there is no report. It logs at every n-th"
                " step of a fit: n is every_n_steps, or the Trainer's log_every_n_steps, 50 by default."
            )
        last = self._history[-1][1]
        prefix = "grad_variance/"
        weights = [
            {"name": tag.removeprefix(prefix), "grad_variance": value}
            for tag, value in last.items()
            if tag.startswith(prefix)
        ]
        return SignalReport(table_of(last, self._order), weights, self._findings())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation; no training batch, as a skipped one has no ``on_train_batch_end``."""
        if self._recorder is not None:
            self._recorder.detach()
        if self._validation is not None and not trainer.sanity_checking:
            self._validation.attach()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation."""
        if self._validation is not None and not trainer.sanity_checking:
            self._validation.detach()
            self._log(trainer, pl_module, self._validation, "val_")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the pictures; stop recording after a skipped batch, which has no ``on_train_batch_end``."""
        if self._recorder is not None:
            self._recorder.detach()
        if self.figures:
            write_figures(trainer, self._history, [site.name for site in self._order])
        if self._recorder is not None and self._classes is not None and self._history:
            names = [site.name for site in self._recorder.sites]
            write_classes(trainer, self._classes, names, self._history[-1][0])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was found, and leave the model as it was."""
        self._conclude(trainer)

    def _conclude(self, trainer: pl.Trainer) -> None:
        self._release()
        if self._is_new or not self._order:
            return
        self._is_new = True
        self._write_layout(trainer)
        findings = self._findings()
        write_findings(trainer, findings, self._history[-1][0])
        steps = f"{len(self._history)} logged step{'s' if len(self._history) > 1 else ''}"
        say(
            f"ActivationMonitor found, in {steps}:\n{findings}"
            if findings
            else f"ActivationMonitor has no findings, in {steps}."
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what was found so far, and leave the model as it was."""
        self._conclude(trainer)

    def _release(self) -> None:
        for recorder in filter(None, (self._recorder, self._validation)):
            recorder.detach()
        self._recorder = self._validation = self._weights = self._classes = None
        self._recorded, self._is_logging = 0, False

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_recorder": None,
            "_validation": None,
            "_weights": None,
            "_classes": None,
            "_recorded": 0,
            "_is_logging": False,
        }


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The statistics that these names stand for."""
    chosen: list[str] = []
    for name in names:
        if name not in ("default", "all"):
            check_name(name, STATISTICS, what="the name of a statistic")
        chosen += DEFAULT if name == "default" else STATISTICS if name == "all" else [name]
    return tuple(dict.fromkeys(chosen))
