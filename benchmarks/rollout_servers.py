"""The models and servers of `rollout.py`: random weights, real SGLang on the CPU, the embedded server."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import string
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402  (needs the path)
from transformers import PreTrainedTokenizerFast  # noqa: E402

from megatron_scope.rollout.embedded.options import ServeOptions  # noqa: E402
from megatron_scope.rollout.process import EmbeddedServer  # noqa: E402
from tests.helpers import sglang  # noqa: E402
from tests.helpers.models import CHARACTERS, END, save_qwen2  # noqa: E402

ENGINES = ("sglang", "embedded")
HEADS, KEY_VALUE_HEADS = 8, 2


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """A Qwen2 of random float32 weights with its own output table."""

    hidden: int
    layers: int
    vocab: int = 4096
    positions: int = 2048

    def save(self, folder: Path) -> Path:
        """Writes it with a tokenizer of `vocab` words, so that answers have as much text as real ones."""
        save_qwen2(
            folder,
            rows=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
        )
        _save_words(folder, self.vocab)
        return folder


def _save_words(folder: Path, count: int) -> None:
    """The tokenizer of the tests' models with words of three letters after its characters; it reads only
    the characters, and writes both.
    """
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3))
    tokens = [*CHARACTERS, *itertools.islice(words, count - len(CHARACTERS))]
    tokenizer = Tokenizer(
        models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=" ")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": END, "pad_token": END, "unk_token": " ", "bos_token": " "}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that listens; its other processes are children of `pid`."""

    engine: str
    url: str
    pid: int


@contextlib.contextmanager
def running(
    engine: str, model: Path, logs: Path, *, total_tokens: int, concurrency: int, cache_tokens: int
) -> Iterator[Running]:
    """A server of `model` for sequences of `total_tokens` at most, `concurrency` of them decoded at a time,
    with `cache_tokens` of key-value cache.
    """
    if engine == "embedded":
        options = ServeOptions(
            model=str(model), max_running_requests=concurrency, max_total_tokens=cache_tokens
        )
        with EmbeddedServer(options, log_path=logs / "embedded.log") as server:
            assert server.pid is not None
            yield Running(engine, server.url, server.pid)
        return
    margin = total_tokens // 2
    settings = {
        "data": {"max_prompt_tokens": margin},
        "rollout": {"max_new_tokens": total_tokens - margin, "max_concurrent_requests": concurrency},
    }
    extra = ("--max-total-tokens", str(cache_tokens))
    with sglang.SglangServer(
        sglang.install(), model, logs / "sglang.log", settings=settings, extra=extra
    ) as server:
        yield Running(engine, server.url, server.pid)
