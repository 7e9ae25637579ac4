"""The quickstart's reasoning task: the last digit of a sum of five digits, one addition at a time.

    94580=  ->  9458=358=88=6$

Each step adds any one adjacent pair modulo 10 until one digit is left, so 24 orders are right. `$` ends it.

    python examples/quickstart/task.py make runs/quickstart/data

writes prompts, likelihood-training rows and two randomly initialised models in Hugging Face format. No row
that a model is trained on has a held-out problem. The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NUM_DIGITS = 5
END = "$"
PADDING = "<pad>"

NUM_HELDOUT = 256
NUM_TRAIN_PROMPTS = 20_000
SFT_BATCH = 64
TEACHER_SFT_STEPS, STUDENT_SFT_STEPS = 700, 550
STUDENT_NOISE = 0.1  # makes the student weak: it learns from rows whose sums are often wrong

# Layers and width; four heads and two key-value heads, so that tensor parallel 2 divides them.
TEACHER_SIZE, STUDENT_SIZE = (3, 96), (2, 48)
MAX_POSITIONS = 2048


def split_problems(seed: int) -> tuple[list[str], list[str]]:
    """(training, held out): all 10^5 problems in a seeded order, the first 256 of it held out."""
    problems = [f"{number:0{NUM_DIGITS}d}" for number in range(10**NUM_DIGITS)]
    random.Random(seed).shuffle(problems)
    return problems[NUM_HELDOUT:], problems[:NUM_HELDOUT]


def answer(problem: str) -> str:
    return str(sum(map(int, problem)) % 10)


def solution(problem: str, rng: random.Random, noise: float = 0.0) -> str:
    """A response in a random order of additions, `$` included; a sum is random with chance `noise`."""
    digits, steps = problem, []
    while len(digits) > 1:
        pair = rng.randrange(len(digits) - 1)
        total = str((int(digits[pair]) + int(digits[pair + 1])) % 10)
        if noise and rng.random() < noise:
            total = str(rng.randrange(10))
        digits = digits[:pair] + total + digits[pair + 2 :]
        steps.append(digits)
    return "=".join(steps) + END


def is_valid_solution(problem: str, response: str) -> bool:
    """Whether every step adds one adjacent pair rightly and one digit is left; the final `$` may lack."""
    digits = problem.removesuffix("=")
    steps = response.removesuffix(END).split("=")
    if len(steps) != len(digits) - 1:
        return False
    for step in steps:
        if step not in _one_addition(digits):
            return False
        digits = step
    return True


def _one_addition(digits: str) -> set[str]:
    return {
        digits[:pair] + str((int(digits[pair]) + int(digits[pair + 1])) % 10) + digits[pair + 2 :]
        for pair in range(len(digits) - 1)
    }


def prompt_rows(problems: Iterable[str]) -> list[dict[str, str]]:
    return [
        {"id": problem, "prompt": f"{problem}=", "answer": answer(problem), "task": "math"}
        for problem in problems
    ]


def sft_rows(
    problems: Sequence[str], count: int, rng: random.Random, noise: float = 0.0
) -> list[dict[str, str]]:
    """`count` different problems with one response each."""
    return [
        {"prompt": f"{problem}=", "response": solution(problem, rng, noise)}
        for problem in rng.sample(problems, count)
    ]


def make_tokenizer() -> Any:
    """One token per byte and no merges, so that any text survives; digits, `=` and `$` are one token each.

    A Qwen2 tokenizer, since that is what AutoTokenizer makes of any Qwen2 folder.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, PADDING])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=END,
        pad_token=PADDING,
        unk_token=None,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, size: tuple[int, int], seed: int) -> None:
    """A randomly initialised Qwen2 with its tokenizer, as Hugging Face folders have them."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    layers, width = size
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,  # tied, the student does not learn in its 550 steps
        initializer_range=0.5 / width**0.5,  # the usual 0.02 suits wider models
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(out_dir: Path, seed: int = 1234) -> None:
    """Writes {train,heldout,teacher_sft,student_sft}.jsonl and the folders {teacher,student}_init."""
    out_dir.mkdir(parents=True, exist_ok=True)
    training, heldout = split_problems(seed)
    teacher_rows = sft_rows(training, TEACHER_SFT_STEPS * SFT_BATCH, random.Random(f"{seed} teacher"))
    student_rows = sft_rows(
        training, STUDENT_SFT_STEPS * SFT_BATCH, random.Random(f"{seed} student"), STUDENT_NOISE
    )
    _write_rows(out_dir / "train.jsonl", prompt_rows(training[:NUM_TRAIN_PROMPTS]))
    _write_rows(out_dir / "heldout.jsonl", prompt_rows(heldout))
    _write_rows(out_dir / "teacher_sft.jsonl", teacher_rows)
    _write_rows(out_dir / "student_sft.jsonl", student_rows)
    write_model(out_dir / "teacher_init", TEACHER_SIZE, seed)
    write_model(out_dir / "student_init", STUDENT_SIZE, seed + 1)


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Data and starting models of the quickstart.")
    commands = parser.add_subparsers(dest="command", required=True)
    make_parser = commands.add_parser("make", help="write the data and the randomly initialised models")
    make_parser.add_argument("out_dir", type=Path)
    make_parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(arguments)
    make(options.out_dir, options.seed)
    print(f"wrote prompts, likelihood-training rows and two starting models to {options.out_dir}")


if __name__ == "__main__":
    main()
