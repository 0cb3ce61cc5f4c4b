"""The log-prob operation, forward and backward: against fp64, then against the clock and other people's.

The floor is that of its products, 6 h R V (logits, and the gradients of hidden states and weight) at what a
large product reaches here. Liger's and cut-cross-entropy's are timed where they are installed; they give a
cross entropy alone, without top-k.
"""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_lopd.ops.kernel_trial import trial
from megatron_lopd.ops.log_probs import vocab_parallel_log_probs
from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.ops.token_loss import vocab_parallel_loss
from tools.gpu import device
from tools.gpu.context import CheckFailed, Part

WARMUP, ROUNDS = 2, 5
TOY = 16  # times smaller
CHUNK = 256  # rows, where exactness is looked at: more than one chunk
# Products of bf16 are exact in fp32, so that what is left is sums of h and of V terms; the gradient of a
# logit is rounded to bf16 before it is multiplied, and so is the result.
NATS, GRADIENT = 1e-4, 1e-2


@dataclass(frozen=True)
class Shape:
    """Rows, hidden size, vocabulary, top-k ids a row."""

    rows: int
    hidden: int
    vocab: int
    k: int

    def __str__(self) -> str:
        return f"R {self.rows:,}, h {self.hidden:,}, V {self.vocab:,}, k {self.k}"

    def toy(self) -> Shape:
        """For Triton's interpreter."""
        return Shape(-(-min(self.rows, 512) // TOY), self.hidden // TOY, self.vocab // (8 * TOY), self.k)

    @property
    def bytes(self) -> float:
        """About what the leanest takes: the matrix and its gradient, also in fp32, and 3 GB."""
        return 8.0 * self.hidden * self.vocab + 12.0 * self.rows * self.hidden + 3e9


EXACT = tuple(
    Shape(rows, 1024, vocab, k)
    for rows, vocab in ((0, 151_936), (1, 151_936), (511, 151_936), (300, 50_257))
    for k in (0, 64)
)
TIMED = tuple(
    Shape(13_777, hidden, vocab, k)
    for hidden, vocab in ((4096, 151_936), (4096, 37_984), (1024, 151_936))
    for k in (0, 64)
)


@dataclass(frozen=True)
class Inputs:
    """hidden [R, h] and weight [V, h], which take gradients; tokens, row_weights [R]; ids [R, k].

    `main_grad` [V, h], fp32, is where Megatron's data parallelism wants the weight's gradient added.
    """

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    ids: Tensor
    row_weights: Tensor
    main_grad: Tensor

    @classmethod
    def of(cls, shape: Shape, here: torch.device) -> Inputs:
        generator = torch.Generator(here).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, shape.hidden, device=here, generator=generator, dtype=torch.bfloat16)
            return values.mul_(scale).requires_grad_()

        # Logits of about 3, as a trained model's spread.
        hidden, weight = normal(shape.rows, 1.0), normal(shape.vocab, 3 / shape.hidden**0.5)
        chosen = torch.randint(shape.vocab, (shape.rows, 1 + shape.k), device=here, generator=generator)
        row_weights = torch.rand(shape.rows, device=here, generator=generator)
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        tokens, ids = chosen[:, 0].contiguous(), chosen[:, 1:].contiguous()
        return cls(hidden, weight, tokens, ids, row_weights, weight.main_grad)  # type: ignore[attr-defined]

    @property
    def top_k_ids(self) -> Tensor | None:
        return self.ids if self.ids.shape[1] else None

    def clear(self) -> None:
        """No gradients."""
        self.hidden.grad = self.weight.grad = None
        self.main_grad.zero_()

    def gradients(self) -> list[Tensor]:
        """Of hidden states and weight; the latter is where the operation puts it."""
        assert self.hidden.grad is not None
        weight = self.main_grad if self.weight.grad is None else self.weight.grad
        return [self.hidden.grad, weight]


# The weighted sum of the rows' losses, and those losses [R] without their weights.
Operation = Callable[[Inputs], tuple[Tensor, Tensor]]


def token_loss(scored: ResponseLogProbs, rows: slice) -> Tensor:
    """Of each row, a mean that all log-probs have a part in: off by no more than they are, however many."""
    k = scored.top_k_log_probs.shape[1]
    if not k:
        return -scored.log_probs
    parts = scored.log_probs + 0.5 * scored.tail_log_probs + 0.1 * scored.top_k_log_probs.sum(1)
    return -parts / (1.5 + 0.1 * k)


def ours(inputs: Inputs, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """What a training step runs."""
    summed = vocab_parallel_loss(
        inputs.hidden,
        inputs.weight,
        inputs.tokens,
        inputs.top_k_ids,
        token_loss,
        inputs.row_weights,
        vocab_size=len(inputs.weight),
        rows=rows,
    )
    return summed.total, summed.token_loss


def torch_operation(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The reference, by blocks of the vocabulary."""
    scored = vocab_parallel_log_probs(
        inputs.hidden, inputs.weight, inputs.tokens, inputs.top_k_ids, vocab_size=len(inputs.weight)
    )
    losses = token_loss(scored, slice(None))
    return (inputs.row_weights * losses).sum(), losses


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """By the book, in fp64."""
    all_log_probs = (inputs.hidden.double() @ inputs.weight.double().t()).log_softmax(-1)
    chosen = all_log_probs.gather(1, inputs.tokens[:, None])[:, 0]
    top_k = all_log_probs.gather(1, inputs.ids)
    outside = all_log_probs.scatter(1, torch.cat([inputs.tokens[:, None], inputs.ids], 1), -torch.inf)
    scored = ResponseLogProbs(chosen, chosen, chosen, top_k, outside.logsumexp(1))
    losses = token_loss(scored, slice(None))
    return (inputs.row_weights.double() * losses).sum(), losses


def others() -> dict[str, Operation]:
    """Those that are installed; they have one loss, the cross entropy, and weigh no rows: only timed."""
    found: dict[str, Operation] = {}
    if (liger := _module("liger_kernel.transformers.fused_linear_cross_entropy")) is not None:
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda inputs: (
            loss(inputs.weight, inputs.hidden, inputs.tokens),
            inputs.row_weights,
        )
    if (cut := _module("cut_cross_entropy")) is not None:
        cross_entropy = partial(cut.linear_cross_entropy, reduction="sum")
        found["cut-cross-entropy"] = lambda inputs: (
            cross_entropy(inputs.hidden, inputs.weight, inputs.tokens),
            inputs.row_weights,
        )
    return found


def _module(name: str):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001  not ours: whatever ails it, it is not timed
        print(f"{name} cannot be imported: {error}", flush=True)
        return None


def run(part: Part) -> None:
    """Exactness first: the time of a wrong number is worth nothing."""
    if part.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    here = device.open_device(part)
    part.attempt("kernels", lambda: _kernels(part, here))
    for shape in EXACT:
        small = shape.toy() if part.toy else shape
        chunk = CHUNK // TOY if part.toy else CHUNK
        for name, operation in (("ours", partial(ours, rows=chunk)), ("torch", torch_operation)):
            label = f"exact, {small}, {name}"
            part.attempt(label, partial(_compare, part, label, small, operation, here))
    ceiling = device.gemm_flops(256 if part.toy else 8192, here)
    for shape in TIMED:
        small = shape.toy() if part.toy else shape
        part.attempt(f"timed, {small}", partial(_time, part, small, here, ceiling))
        device.release()


def _kernels(part: Part, here: torch.device) -> None:
    if reason := trial(here.type):
        raise CheckFailed(f"the Triton kernels cannot be used, and torch's operations are slower: {reason}")
    part.figure("kernels", compiled="no: interpreted" if part.toy else "yes")


def _compare(part: Part, label: str, shape: Shape, operation: Operation, here: torch.device) -> None:
    device.need_memory(8e9, "no smaller one says what a real vocabulary does")
    results = []
    inputs = Inputs.of(shape, here)
    for compute in (operation, exact):
        inputs.clear()
        total, losses = compute(inputs)
        total.backward()  # type: ignore[no-untyped-call]
        results.append((losses.detach().double(), [each.double() for each in inputs.gradients()]))
    (found, gradients), (expected, references) = results
    nats = float((found - expected).abs().max()) if shape.rows else 0.0
    pairs = zip(gradients, references, strict=True)
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
    part.figure(label, nats=nats, gradient=error)
    if not (nats < NATS and error < GRADIENT):
        raise CheckFailed(f"off by {nats:.2g} nats, and by {error:.2g} of a gradient")


def _time(part: Part, shape: Shape, here: torch.device, ceiling: float) -> None:
    device.need_memory(shape.bytes, "fewer rows say less")
    inputs = Inputs.of(shape, here)
    operations: dict[str, Operation] = {"ours": ours, "torch": torch_operation}
    if not part.toy and not shape.k:
        operations |= others()
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    peaks: dict[str, int] = {}
    for turn in range(2 if part.toy else WARMUP + ROUNDS):
        for name, operation in operations.items():
            inputs.clear()
            held = device.start_peak()  # weight.main_grad is there in training as well
            taken = device.seconds_of(lambda run=operation: run(inputs)[0].backward())  # type: ignore[misc]
            peaks[name] = device.read_peak() - held
            if turn >= (1 if part.toy else WARMUP):
                seconds[name].append(taken)
    floor = 6 * shape.hidden * shape.rows * shape.vocab / ceiling
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        part.figure(
            f"timed, {shape}, {name}",
            ms=median * 1000,
            of_floor=median / floor,
            of_ours=median / medians["ours"],
            peak_gb=peaks[name] / 1e9,
        )
