"""One replayed file gives the same log-probs and the same full gradient at every layout and packing
(float32).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.models import save_llama, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows

ROWS = random_rows(num_prompts=6, num_samples=4, vocab_size=40)


@dataclasses.dataclass(frozen=True)
class Layout:
    num_ranks: int
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    micro_batch_tokens: int = 64
    student_stages: tuple[int, ...] | None = None
    teacher_stages: tuple[int, ...] | None = None
    recompute: str = "none"

    def __str__(self) -> str:
        words = [f"n{self.num_ranks}", f"tp{self.tensor}", f"pp{self.pipeline}"]
        words += ["sp"] * self.sequence + [f"mb{self.micro_batch_tokens}"]
        words += [f"stages{self.student_stages}"] * bool(self.student_stages)
        return "-".join([*words, *([self.recompute] * (self.recompute != "none"))])


LAYOUTS = [
    Layout(1),
    Layout(1, micro_batch_tokens=1),
    Layout(1, micro_batch_tokens=4096, recompute="full"),
    Layout(1, recompute="selective"),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True),
    Layout(2, pipeline=2),
    Layout(2, pipeline=2, student_stages=(2, 0), teacher_stages=(1, 2)),
    Layout(2),
    Layout(2, micro_batch_tokens=4096),
    Layout(4, tensor=2, pipeline=2, micro_batch_tokens=30),
    Layout(4, tensor=2, pipeline=2, sequence=True, recompute="full"),
    Layout(4, tensor=2, sequence=True),
    Layout(4, pipeline=2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Student and teacher of other depth, width and table length: a tied Qwen2 and an untied Llama, both ways
    round.
    """
    root = tmp_path_factory.mktemp("models")
    qwen2 = save_qwen2(root / "qwen2", seed=1, rows=43)
    llama = save_llama(root / "llama", seed=2)
    small = save_qwen2(root / "small", seed=3, num_hidden_layers=1, hidden_size=16, tie_word_embeddings=False)
    return {"tied": (qwen2, llama), "untied": (llama, small)}


def settings(models: tuple[Path, Path], rows: Path, out: Path, layout: Layout) -> dict[str, Any]:
    student, teacher = models
    return {
        "run": {"output_dir": str(out), "steps": 1, "dump_gradients": str(out / "gradient.safetensors")},
        "student": {"hf": str(student), "pipeline_layers": layout.student_stages},
        "teacher": {"hf": str(teacher), "pipeline_layers": layout.teacher_stages},
        "parallel": {"tensor": layout.tensor, "pipeline": layout.pipeline, "sequence": layout.sequence},
        "rollout": {"engine": "replay", "file": str(rows), "temperature": 0.7},
        "train": {
            "precision": "float32",
            "micro_batch_tokens": layout.micro_batch_tokens,
            "recompute": layout.recompute,
        },
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 0},
    }


def reference_logprobs(folder: Path) -> list[torch.Tensor]:
    """Each row's response log-probs by transformers, float32 with gradient, under the 40 shared ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = []
    for row in ROWS:
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :40].double()
        out.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(row["output_ids"])[:, None])[:, 0])
    return [*out, model]


def reference_gradient(student: Path, teacher: Path) -> dict[str, torch.Tensor]:
    """The gradient of Eq. 6 by transformers and autograd, written from the paper alone."""
    *student_logprobs, model = reference_logprobs(student)
    *teacher_logprobs, _ = reference_logprobs(teacher)
    loss = torch.zeros((), dtype=torch.float64)
    prompts = sorted({row["prompt_id"] for row in ROWS})
    for prompt in prompts:
        for kind in (True, False):
            members = [
                i for i, row in enumerate(ROWS) if row["prompt_id"] == prompt and row["correct"] == kind
            ]
            if not members:
                continue
            means = torch.stack([(student_logprobs if kind else teacher_logprobs)[i].mean() for i in members])
            weights = torch.softmax((-means if kind else means).detach(), 0)
            for weight, i in zip(weights, members, strict=True):
                logprob = student_logprobs[i]
                ratio = (logprob - logprob.detach()).exp()
                if kind:
                    loss = loss - weight * ratio.sum() / len(prompts)
                else:
                    log_ratio = (logprob - teacher_logprobs[i]).detach()
                    loss = loss + weight * (ratio * log_ratio).sum() / len(prompts)
    loss.backward()
    names = [name for name, _ in model.named_parameters()]
    return {name: model.get_parameter(name).grad for name in names}


def relative_l2(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    difference = sum((got[name].double() - expected[name].double()).square().sum() for name in expected)
    size = sum(value.double().square().sum() for value in expected.values())
    return float((difference / size).sqrt())


@pytest.fixture(scope="module")
def expected(models: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (student, teacher) in models.items():
        found[name] = {
            "gradient": reference_gradient(student, teacher),
            "student": [value.detach() for value in reference_logprobs(student)[:-1]],
            "teacher": [value.detach() for value in reference_logprobs(teacher)[:-1]],
        }
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pair", ["tied", "untied"])
def test_the_gradient_equals_the_papers_at_every_layout(pool, models, expected, tmp_path, layout, pair):
    if pair == "untied" and layout.student_stages:
        layout = dataclasses.replace(layout, student_stages=(1, 2), teacher_stages=(1, 0))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = settings(models[pair], rows, tmp_path / "run", layout)
    metrics = pool(layout.num_ranks).run("tests.helpers.jobs:train", config)[0]
    gradient = load_file(tmp_path / "run" / "gradient.safetensors")
    assert relative_l2(gradient, expected[pair]["gradient"]) < 1e-4
    norm = float(sum(value.double().square().sum() for value in expected[pair]["gradient"].values()).sqrt())
    # Tied tables count once in Hugging Face and in Megatron's norm alike.
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(4, tensor=2, pipeline=2, sequence=True), Layout(2)], ids=str
)
@pytest.mark.parametrize("pair", ["tied", "untied"])
def test_token_logprobs_equal_transformers_at_every_layout(pool, models, expected, tmp_path, layout, pair):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = settings(models[pair], rows, tmp_path / "run", layout)
    for name in ("student", "teacher"):
        found: dict[int, np.ndarray] = {}
        for result in pool(layout.num_ranks).run("tests.helpers.jobs:token_logprobs", config):
            found |= result[name]
        assert found.keys() == set(range(len(ROWS)))
        for index, logprobs in enumerate(expected[pair][name]):
            np.testing.assert_allclose(found[index], logprobs.numpy(), atol=2e-5)
