import lightning as L
import pytest
from helpers import Flat, Net, batches, fit, scalars
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_noisy import GradientNoise
from lightning_noisy.schedules import InverseDecay


def test_gradient_noise_is_logged_at_the_steps_of_lightnings_own_logging(tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    trainer = fit(
        Logs(),
        [GradientNoise(eta=0.3, seed=0)],
        batches(24),
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        logger=TensorBoardLogger(tmp_path, "", ""),
    )
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["gradient_noise/std"]] == [step for step, _ in logged["loss"]] == [2, 5, 8, 11]
    for step, value in logged["gradient_noise/std"]:
        assert value == pytest.approx(InverseDecay(0.3)(step), rel=1e-6)
    assert trainer.callback_metrics["gradient_noise/std"].item() == pytest.approx(InverseDecay(0.3)(11))


def test_gradient_noise_logs_norms_and_the_signal_to_noise_ratio(tmp_path):
    class Steep(Flat):
        def training_step(self, batch, batch_idx):
            return 3 * self.w.sum()

    fit(
        Steep(10_000),
        [GradientNoise(eta=0.04, seed=0)],
        gradient_clip_val=50.0,
        logger=TensorBoardLogger(tmp_path, "", ""),
        log_every_n_steps=2,
    )
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["gradient_noise/snr"]] == [1, 3]
    for step, value in logged["grad_norm/before_clipping"]:
        assert value == pytest.approx(300)
        assert dict(logged["grad_norm/after_clipping"])[step] == pytest.approx(50, rel=1e-5)
        expected = 50 / (InverseDecay(0.04)(step) * 10_000**0.5)
        assert dict(logged["gradient_noise/snr"])[step] == pytest.approx(expected, rel=1e-5)
    assert set(logged) == {
        "gradient_noise/std", "gradient_noise/snr", "grad_norm/before_clipping", "grad_norm/after_clipping"
    }  # fmt: skip
    assert all(f"``{tag}``" in GradientNoise.__doc__ for tag in logged)


def test_gradient_noise_shows_sigma_on_the_progress_bar_if_asked_for():
    shown = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown.append(trainer.progress_bar_metrics.get("gradient_noise/std"))

    for prog_bar in (False, True):
        fit(Net(), [GradientNoise(eta=1.0, gamma=0, seed=0, prog_bar=prog_bar), Watch()], batches(1))
    assert shown == [None, 1.0]


@pytest.mark.parametrize(("names", "tags"), [(("a", ""), ("/a", "")), (("", ""), ("/noise0", "/noise1"))])
def test_several_instances_have_tags_of_their_own(tmp_path, names, tags):
    callbacks = [GradientNoise(eta=eta, seed=0, name=name) for eta, name in zip((0.1, 0.2), names, strict=True)]
    fit(Flat(100), callbacks, logger=TensorBoardLogger(tmp_path, name="", version=""))
    logged = scalars(tmp_path)
    for eta, tag in zip((0.1, 0.2), tags, strict=True):
        assert logged[f"gradient_noise/std{tag}"][0] == (0, pytest.approx(eta**0.5))
