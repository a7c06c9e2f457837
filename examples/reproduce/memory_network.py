"""Table 2 of Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", in small.

    python examples/reproduce/memory_network.py --jobs 2

An End-To-End Memory Network with three hops answers where a thing is, after a story of 20 sentences in which people go
to places, take things and drop them: a question that needs two of them, like bAbI's second task, in generated data.
Softmax attention from the start (one stage), or linear attention in the first fifth of the epochs (two stages), with
and without noise of variance 0.01 / (1 + t)^0.55 on the clipped gradients. As in the paper, of ten runs the one with
the lowest training error counts; here there are three such tens a row. The paper trains for 200 epochs, here 100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness import Program, Record, Result, Run, Table, draw_sorted, select, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from training import fit, in_order, shuffled

from lightning_noisy import GradientNoise

PEOPLE, THINGS, PLACES, SENTENCES = 4, 3, 6, 20
WORDS = PEOPLE + THINGS + PLACES + 3  # and three verbs
GOES, TAKES, DROPS = range(WORDS - 3, WORDS)
SIZE, HOPS, BATCH_SIZE, STORIES, RESTARTS = 20, 3, 32, 1000, 10
# Training and validation error in % in the paper's Table 2, on other data.
PAPER = {
    ("one stage", "no"): (10.5, 19.5),
    ("one stage", "yes"): (9.6, 16.6),
    ("two stages", "no"): (6.2, 10.9),
    ("two stages", "yes"): (5.9, 10.8),
}
ROWS = [{"training": training, "noise": noise} for training, noise in PAPER]


def stories(count: int, seed: int) -> TensorDataset:
    """Stories, shape (count, sentences, 3 words), the thing that is asked for, and its place."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    texts, questions, answers = [], [], []
    while len(texts) < count:
        at = [below(PLACES) for _ in range(PEOPLE)]
        holder, place = [-1] * THINGS, [-1] * THINGS  # -1: nobody; unknown
        known, told, text = set(), set(), []  # people and things whose place the text tells
        for _ in range(SENTENCES):
            person, thing, kind = below(PEOPLE), below(THINGS), below(3)
            if kind == 1 and holder[thing] == -1 and place[thing] in (-1, at[person]):
                holder[thing] = person
                text.append((person, TAKES, PEOPLE + thing))
            elif kind == 2 and person in holder:
                thing = holder.index(person)
                holder[thing], place[thing] = -1, at[person]
                text.append((person, DROPS, PEOPLE + thing))
            else:
                at[person] = below(PLACES)
                known.add(person)
                text.append((person, GOES, PEOPLE + THINGS + at[person]))
            for each in range(THINGS):
                if holder[each] >= 0:
                    place[each] = at[holder[each]]
                    told = told | {each} if holder[each] in known else told - {each}
        if told:
            asked = sorted(told)[below(len(told))]
            texts.append(text)
            questions.append(PEOPLE + asked)
            answers.append(place[asked])
    return TensorDataset(torch.tensor(texts), torch.tensor(questions), torch.tensor(answers))


class MemoryNetwork(L.LightningModule):
    """Sukhbaatar et al.'s network with adjacent weights: a hop's output embedding is the next one's input embedding.

    Args:
        linear_epochs: for so many epochs the attention is linear, without softmax.
    """

    def __init__(self, linear_epochs: int) -> None:
        super().__init__()
        self.linear_epochs, self.epochs_done = linear_epochs, 0
        self.words = nn.ParameterList([nn.Parameter(0.1 * torch.randn(WORDS, SIZE)) for _ in range(HOPS + 1)])
        self.times = nn.ParameterList([nn.Parameter(0.1 * torch.randn(SENTENCES, SIZE)) for _ in range(HOPS + 1)])

    def forward(self, story: Tensor, question: Tensor) -> Tensor:
        state = self.words[0][question]
        for hop in range(HOPS):
            inputs, outputs = (self.words[i][story].sum(2) + self.times[i] for i in (hop, hop + 1))
            weights = torch.einsum("bsd,bd->bs", inputs, state)
            if self.current_epoch >= self.linear_epochs or not self.training:
                weights = weights.softmax(1)
            state = state + torch.einsum("bs,bsd->bd", weights, outputs)
        first = PEOPLE + THINGS
        return state @ self.words[-1][first : first + PLACES].T

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(*batch[:2]), batch[2], reduction="sum")  # the sum, as there

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int) -> None:
        name = ("train_error", "error")[dataloader_idx]
        self.log(name, (self(*batch[:2]).argmax(1) != batch[2]).float().mean(), add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        every = max(1, self.trainer.max_epochs // 4)  # type: ignore[operator]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)]


def train(run: Run) -> Result:
    """One run: its errors at the end."""
    torch.manual_seed(run.seed)
    training, validation = stories(STORIES, 10**6 + run.seed // RESTARTS), stories(STORIES, 2 * 10**6)
    model = MemoryNetwork(run.epochs // 5 if run.settings["training"] == "two stages" else 0)
    epochs = fit(
        run,
        model,
        shuffled(training, BATCH_SIZE, run.seed),
        [in_order(training), in_order(validation)],
        callbacks=[GradientNoise(0.01, 0.55, seed=run.seed)] if run.settings["noise"] == "yes" else [],
        clip=40.0,
        read=lambda logged: {name: logged[name] for name in ("train_error", "error")},
    )
    return Result({name: 100 * values[-1] for name, values in epochs.items()}, epochs)


def tables(records: list[Record]) -> list[Table]:
    """The best of each ten."""
    lines = []
    for (training, noise), paper in PAPER.items():
        found = select(records, training=training, noise=noise)
        tens = [[each for each in found if each["seed"] // RESTARTS == ten] for ten in range(len(found))]
        best = [min(ten, key=lambda each: each["train_error"]) for ten in tens if len(ten) == RESTARTS]
        cells = [spread([each[name] for each in best]) for name in ("train_error", "error")]
        all_runs = spread([each["error"] for each in found])
        lines.append([training, noise, f"{paper[0]}", cells[0], f"{paper[1]}", cells[1], all_runs, f"{len(found)}"])
    title = (
        f"Errors in % of the run with the lowest training error of each {RESTARTS}, as median (least to greatest), and"
        " the validation errors of all runs. The paper's are of bAbI; here the stories are generated."
    )
    head = ["training", "noise", "training: paper", "here", "validation: paper", "here", "all runs", "n"]
    return [Table(title, head, lines)]


def draw(records: list[Record], epochs: list[Record], path: Path) -> None:
    """Validation error of all runs, sorted."""
    runs = {
        f"{training}, {'with' if noise == 'yes' else 'without'} noise": (
            f"{'o-' if noise == 'yes' else 'o:'}C{number // 2}",
            [each["error"] for each in select(records, training=training, noise=noise)],
        )
        for number, (training, noise) in enumerate(PAPER)
    }
    draw_sorted(path, runs, "validation error in %")


PROGRAM = Program("memory_network", __doc__, ROWS, train, tables, draw, epochs=100, seeds=30, on_images=False)

if __name__ == "__main__":
    PROGRAM.main()
