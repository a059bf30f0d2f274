"""Train a small character-level transformer on the standard library's own sources: an ordinary DDP script.

    torchrun --standalone --nproc-per-node 2 train.py --out DIR

Nothing in here knows of sosa: it stands for a script that somebody has already. It is deterministic from ``--seed``
on a CPU. Each rank leaves ``metrics-rank<r>.jsonl`` and ``result-rank<r>.json`` in ``--out``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

# Modules that have been one file of pure Python in every CPython since 3.11.
TRAIN_MODULES = """
    argparse ast calendar codecs configparser contextlib copy dataclasses difflib dis enum fractions
    ftplib functools getopt gzip heapq imaplib inspect ipaddress mailbox mimetypes opcode optparse os
    pickle platform poplib posixpath pprint random reprlib sched selectors shelve shlex shutil smtplib
    socket socketserver statistics subprocess tarfile tempfile textwrap threading timeit traceback types
    typing uuid warnings weakref webbrowser
"""
HELD_OUT_MODULES = "bdb cmd csv fileinput filecmp gettext plistlib queue tokenize"

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
CONTEXT = 64
VALIDATION_BATCHES = 24


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.feed_forward(self.norm_feed_forward(x))
        return out


class CharTransformer(nn.Module):
    """Predicts the next character; ``forward`` gives the mean loss over the positions, weighted by ``weights``."""

    def __init__(self, *, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Tokens and targets: int64 of shape (batch, length); weights: float of that shape, 0 leaves a position out."""
        x = self.characters(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = self.head(self.norm(self.blocks(x)))
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss: Tensor = (losses * weights.flatten()).sum() / weights.sum()
        return loss


def read_corpus(data: Path | None) -> tuple[Tensor, Tensor]:
    """The training and the held-out text as indices into ``ALPHABET``; of a given file the last tenth is held out."""
    if data is not None:
        indices = encode(data.read_text(encoding="utf-8"))
        split = len(indices) * 9 // 10
        return indices[:split], indices[split:]
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [
        encode("".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names.split()))
        for names in (TRAIN_MODULES, HELD_OUT_MODULES)
    ]
    return parts[0], parts[1]


def encode(text: str) -> Tensor:
    known = {character: index for index, character in enumerate(ALPHABET)}
    return torch.tensor([known[character] for character in text if character in known])


def batch_at(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and weights of the windows of ``text`` that begin at ``starts``."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    tokens, targets = windows[:, :-1], windows[:, 1:]
    return tokens, targets, torch.ones(tokens.shape)


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor) -> float:
    """Mean loss over the same windows of the held-out text, whatever the seed."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, VALIDATION_BATCHES * 32).long()
    model.eval()
    losses = torch.stack([model(*batch_at(text, chunk)) for chunk in starts.chunk(VALIDATION_BATCHES)])
    model.train()
    return float(losses.mean())


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A hash of every parameter's and every optimizer state's bits: equal on all ranks, or they have drifted apart."""
    hasher = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter.detach(), *(state[name] for name in sorted(state))):
            hasher.update(tensor.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character-level transformer with DDP on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics and results")
    parser.add_argument("--data", type=Path, help="text file to learn; default: the standard library's sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=12, help="windows of text per rank and step")
    parser.add_argument("--lr", type=float, default=8e-3, help="peak of the schedule")
    parser.add_argument("--warmup", type=int, default=40, help="steps until the peak")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    sampler = torch.Generator().manual_seed(arguments.seed * world_size + rank)
    arguments.out.mkdir(parents=True, exist_ok=True)

    train_text, held_out_text = read_corpus(arguments.data)
    network = CharTransformer()
    model = DistributedDataParallel(network)
    optimizer = AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)

    steps: int = arguments.steps
    warmup: int = arguments.warmup

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.49 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    scheduler = LambdaLR(optimizer, schedule)
    started = time.perf_counter()
    with (arguments.out / f"metrics-rank{rank}.jsonl").open("w", encoding="utf-8", buffering=1) as metrics:
        for step in range(steps):
            starts = torch.randint(len(train_text) - CONTEXT, (arguments.batch_size,), generator=sampler)
            loss = model(*batch_at(train_text, starts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            value = loss.item()
            metrics.write(json.dumps({"step": step, "loss": finite_or_none(value)}) + "\n")
            if rank == 0 and (step % 50 == 0 or step + 1 == steps):
                print(f"step {step + 1}/{steps} loss {value:.4f}", flush=True)
    seconds = time.perf_counter() - started

    result = {
        "val_loss": finite_or_none(validation_loss(network, held_out_text)),
        "steps": steps,
        "seconds": seconds,
        "digest": digest(network, optimizer),
    }
    (arguments.out / f"result-rank{rank}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    if rank == 0:
        print(f"validation loss {result['val_loss']} after {seconds:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
