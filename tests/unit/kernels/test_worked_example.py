"""The worked example of docs/kernels.md: its numbers are those that the code finds, to four decimals."""

import math
from pathlib import Path

import torch

from megatron_scope.kernels import tiles
from megatron_scope.kernels.vocab_parallel import distill_stats, jensen_shannon

PAGE = Path(__file__).resolve().parents[3] / "docs" / "kernels.md"
FIELDS = ("m_s", "S", "E", "y_s", "D", "m_t", "S'", "D'", "y_t")  # in the order of tiles.local_statistics
NAMES = {
    "logprob": "log p(y)",
    "teacher_logprob": "log q(y)",
    "reverse_kl": "KL(p‖q)",
    "forward_kl": "KL(q‖p)",
    "entropy": "H(p)",
}
STUDENT = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 0.0, math.log(6)]], dtype=torch.float64)
TARGET = torch.tensor([2])


def rows_of_the_page(first_columns):
    """{first column: the other columns} of the rows of the page's tables that begin so."""
    cells = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    found = {}
    for name, *others in cells:
        if name in first_columns and name not in found and len(others) == (3 if name in FIELDS else 4):
            found[name] = others
    return found


def shown(values):
    return [f"{value + 0.0:.4f}" for value in values]


def shard(start, num_valid):
    return tiles.Shard(start, num_valid, 1.0, None)


def test_what_each_rank_keeps_and_the_joined_numbers():
    parts = torch.stack(
        [
            tiles.local_statistics(STUDENT[:, :2], TEACHER[:, :2], TARGET, shard(0, 2), torch.float64),
            tiles.local_statistics(STUDENT[:, 2:], TEACHER[:, 2:], TARGET, shard(2, 1), torch.float64),
        ]
    )
    columns = [*parts[:, 0], tiles.join(parts, 1.0)[0]]
    computed = {name: shown(column[i].item() for column in columns) for i, name in enumerate(FIELDS)}
    assert rows_of_the_page(FIELDS) == computed


def test_statistics_and_gradients():
    student = STUDENT.clone().requires_grad_()
    found = {NAMES[name]: value for name, value in distill_stats(student, TEACHER, TARGET)._asdict().items()}
    found["Jensen-Shannon"] = jensen_shannon(student, TEACHER)
    computed = {}
    for name, value in found.items():
        gradient = ["", "", ""]
        if value.requires_grad:
            gradient = shown(torch.autograd.grad(value.sum(), student, retain_graph=True)[0][0].tolist())
        computed[name] = [*shown(value.tolist()), *gradient]
    assert rows_of_the_page(computed) == computed
