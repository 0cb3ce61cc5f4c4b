"""The loss by chunks of rows, in Triton's interpreter, against whole logits in fp64 and the torch way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from gloo import run_ranks
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_lopd.config import ParallelConfig, TrainConfig, WeightsConfig
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.objectives import SampledReverseKlOptions, TopKReverseKlOptions
from megatron_lopd.ops.row_chunks import rows_at_once
from megatron_lopd.ops.softmax import ResponseLogProbs, VocabularySlice
from megatron_lopd.ops.token_loss import SummedLoss, vocab_parallel_loss
from tests.interpreter import run_interpreted
from tests.log_prob_oracle import Watch, inputs, naive, unaligned

HIDDEN = 32


@dataclass(frozen=True)
class Shape:
    """R rows, `vocab` tokens, k ids beside each row's own, `rows` at a time; inputs have 3 padding rows."""

    R: int
    vocab: int
    k: int = 0
    temperature: float = 1.0
    rows: int | None = None


SHAPES = (
    Shape(0, 300, 3),
    Shape(1, 300),
    Shape(1, 2, 1),
    Shape(23, 517, rows=5),
    Shape(23, 517, 64, rows=5),
    Shape(24, 512, 8, rows=8),
    Shape(24, 512, 8, temperature=0.7, rows=7),
    Shape(40, 5003, rows=16),
    Shape(40, 5003, 64, temperature=1.3),
    Shape(3, 9001, 2),  # rows of more than two of the kernels' blocks
    Shape(9, 67, 66, rows=2),
    Shape(300, 131, 4),
)


def of_everything(scored: ResponseLogProbs, rows: slice) -> Tensor:
    """A loss with another gradient for everything that has one, and other for other rows."""
    spread = (scored.top_k_log_probs.exp() * scored.top_k_log_probs).sum(1)
    tail = scored.tail_log_probs.exp() * scored.tail_log_probs
    place = torch.arange(rows.start, rows.stop, dtype=spread.dtype) / 100
    return scored.log_probs * (1 + place) + 0.1 * scored.log_sum_exp + spread + tail


def of_token(scored: ResponseLogProbs, rows: slice) -> Tensor:
    return -scored.log_probs


def loss_weights(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(rows))


def shape_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs(shape.R, shape.vocab, shape.k, dtype, hidden_size=HIDDEN, scale=0.5)


def fused(shape: Shape, given: tuple[Tensor, ...], weight: Tensor, **options: Any) -> SummedLoss:
    hidden, _, tokens, ids = given
    options = {"temperature": shape.temperature, "rows": shape.rows, **options}
    ids = None if shape.k == 0 else ids  # type: ignore[assignment]
    weights = loss_weights(shape.R)
    return vocab_parallel_loss(
        hidden, weight, tokens, ids, of_everything, weights, vocab_size=shape.vocab, **options
    )


def losses_of_shapes() -> list[tuple[SummedLoss, Tensor, Tensor]]:
    """In a rank, of each shape: the loss, its gradients by hidden (a share) and by its own weight rows."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = []
    for shape in SHAPES:
        hidden, weight, *_ = given = shape_inputs(shape)
        padded = torch.nn.functional.pad(weight.detach(), (0, 0, 0, len(weight) % 2), value=90.0)
        mine = padded.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
        summed = fused(shape, given, mine, group=dist.group.WORLD)
        gradients = torch.autograd.grad(summed.total, (hidden, mine))
        found.append((SummedLoss(*(x.detach() for x in vars(summed).values())), *gradients))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_whole_logits_in_fp64(world_size: int) -> None:
    ranks = run_interpreted(world_size, losses_of_shapes)
    for shape, found in zip(SHAPES, zip(*ranks, strict=True), strict=True):
        hidden, weight, tokens, ids = shape_inputs(shape)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        expected = naive(*exact, tokens, ids, shape.vocab, shape.temperature)
        # A row whose ids are all of the vocabulary has no tail, and so no gradient of it.
        tail = expected.tail_log_probs
        expected = replace(expected, tail_log_probs=torch.where(tail.isinf(), -1e30, tail))
        losses = of_everything(expected, slice(0, shape.R))
        total = (loss_weights(shape.R).double() * losses).sum()
        by_hidden, by_weight = torch.autograd.grad(total, exact)
        for summed, _, _ in found:
            close = {"rtol": 0, "atol": 1e-5}  # nats: fp32 sums of up to 9,001 terms, logits of up to 15
            torch.testing.assert_close(summed.log_probs.double(), expected.log_probs, **close)
            torch.testing.assert_close(summed.entropy.double(), expected.entropy, rtol=0, atol=2e-5)
            torch.testing.assert_close(summed.token_loss.double(), losses, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(summed.total.double(), total, rtol=1e-5, atol=2e-5)
        assert relative(sum(share for _, share, _ in found), by_hidden) < 1e-4, shape
        rows = torch.cat([of_rank for _, _, of_rank in found])[: len(weight)]
        assert relative(rows, by_weight) < 1e-4, shape
        assert rows[shape.vocab :].count_nonzero() == 0


def relative(found: Any, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


OBJECTIVES = {
    "sft": None,
    "fixed_negative": {},
    "sampled_reverse_kl": {},
    "sampled_reverse_kl clipped": {"options": SampledReverseKlOptions("clipped", 0.9)},
    "sampled_reverse_kl weighted": {
        "weights": WeightsConfig(position=3.0, horizon=4),
        "options": SampledReverseKlOptions(extrapolation=1.5),
    },
    "topk_reverse_kl": {},
    "topk_reverse_kl with entropy": {"options": TopKReverseKlOptions(entropy=1.0)},
    "topk_forward_kl": {},
    "topk_forward_kl weighted": {"weights": WeightsConfig(position=2.0, horizon=5)},
}


def test_every_objective_is_as_by_the_torch_operation() -> None:
    """Its loss, metrics' values and gradients, in fp64: the loss called a few rows at a time, or once."""
    (by_chunks,) = run_interpreted(1, losses_of_objectives)
    (at_once,) = run_ranks(1, losses_of_objectives)
    for name in OBJECTIVES:
        for found, expected in zip(by_chunks[name], at_once[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # asked for; 1e-12 seen


def losses_of_objectives() -> dict[str, list[Tensor]]:
    """In a rank, of each objective: total, token losses, entropies, log-probs, both gradients."""
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.objectives import get_objective
    from megatron_lopd.training.step import _Finish

    vocab, found = 101, {}
    with model_parallel(ParallelConfig(), seed=0):
        for name, options in OBJECTIVES.items():
            hidden, weight, batch = random_batch(29, vocab, 7)
            # A stand-in for the model: all that the loss asks of it.
            model: Any = SimpleNamespace(
                arch=SimpleNamespace(vocab_size=vocab),
                config=SimpleNamespace(sequence_parallel=False),
                output_weight=lambda weight=weight: weight,
                output_grad_ready=None,
            )
            objective_name = name.partition(" ")[0]
            config = (
                TrainConfig(steps=1, objective=objective_name, **options) if options is not None else None
            )
            finish = _Finish(get_objective(objective_name, config), rows=5, with_gradient=True)
            total, _, values = finish(model, batch, hidden[:, None])
            gradients = torch.autograd.grad(total, (hidden, weight))
            seen = (total, values.loss, values.entropy, values.log_probs.current)
            found[name] = [x.detach() for x in (*seen, *gradients)]
    return found


def random_batch(rows: int, vocab: int, k: int) -> tuple[Tensor, Tensor, MicroBatch]:
    """Hidden states and weight in fp64, and a micro-batch with all an objective can need, ids repeated."""
    hidden, weight, tokens, _ = inputs(rows, vocab, 0, torch.float64)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, vocab, generator=generator).mul(3).log_softmax(-1)
    top = teacher.topk(k)
    taken = torch.cat([top.indices, tokens[:, None]], 1)
    empty = torch.empty(0, dtype=torch.int64)
    batch = MicroBatch(
        tokens=empty,
        position_ids=empty,
        cu_seqlens=empty,
        max_seqlen=0,
        predict_index=torch.arange(rows),
        response_tokens=tokens,
        sequence_index=torch.zeros(rows, dtype=torch.int64),
        response_position=torch.arange(rows),
        loss_weights=loss_weights(rows),
        loss_count=1,
        behaviour_log_probs=-torch.rand(rows, generator=generator) * 5,
        sampled_log_probs=None,
        teacher_log_probs=teacher.gather(1, tokens[:, None])[:, 0],
        prefix_discrepancy=torch.rand(rows, generator=generator),
        top_k_ids=top.indices,
        top_k_log_probs=top.values,
        tail_log_probs=teacher.scatter(1, taken, float("-inf")).logsumexp(-1),
        num_samples=1,
        num_tokens=rows,
    )
    return hidden, weight, batch


def test_the_weight_s_gradient_is_added_to_main_grad() -> None:
    """Two micro-batches; then one without gradients; then an upstream gradient that cannot be had."""
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):  # a logit's gradient keeps 8 bits
        (results,) = run_interpreted(1, main_grads, dtype)
        main_grad, expected, ready, unchanged, of_two = results
        assert relative(main_grad - 1, expected) < close
        assert ready == 2, "once a backward pass"
        assert unchanged
        assert of_two.isnan().all()


def main_grads(dtype: torch.dtype) -> tuple[Tensor, Tensor, int, bool, Tensor]:
    shape = Shape(24, 512, 8, rows=8)
    hidden, weight, *_ = given = shape_inputs(shape, dtype)
    _, expected = torch.autograd.grad(fused(shape, given, weight).total, (hidden, weight))
    weight.main_grad = torch.ones(weight.shape)
    ready: list[bool] = []
    for _ in range(2):
        summed = fused(shape, given, weight, grad_ready=lambda: ready.append(True))
        summed.total.backward()
    assert weight.grad is None
    before = weight.main_grad.clone()
    with torch.no_grad():
        fused(shape, given, weight)
    unchanged = torch.equal(weight.main_grad, before)
    (of_two,) = torch.autograd.grad(fused(shape, given, weight).total * 2, hidden)
    return before, expected.double() * 2, len(ready), unchanged, of_two


def test_ids_in_another_order_and_a_second_time() -> None:
    (same, moved, unordered, off) = run_interpreted(1, reordered)[0]
    assert same, "the same bits twice"
    for found, expected in moved:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32 sums in another order
    assert unordered == 0
    assert off == []


def reordered() -> tuple[bool, list[tuple[Tensor, Tensor]], int, list[Any]]:
    """(whether bits are the same, pairs that agree, places written twice, unaligned products)."""
    from megatron_lopd.ops import row_chunks, token_loss

    off: list[Any] = []

    def watched(module: Any, name: str) -> None:
        product = getattr(module, name)

        def called(*matrices: Tensor, out: Tensor | None = None) -> Any:
            off.extend(unaligned(*matrices, out))
            return product(*matrices) if out is None else product(*matrices, out=out)

        setattr(module, name, called)

    watched(row_chunks, "matmul_fp32")
    watched(token_loss, "matmul_fp32")
    watched(token_loss, "add_product")
    shape = Shape(23, 517, 12, rows=5)
    hidden, weight, tokens, ids = shape_inputs(shape)
    ids[:, 1] = ids[:, 2] = ids[:, 3]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def results(ids: Tensor) -> list[Tensor]:
        summed = fused(shape, (hidden, weight, tokens, ids), weight)
        return [*vars(summed).values(), *torch.autograd.grad(summed.total, (hidden, weight))]

    with Watch(trash=shape.vocab) as watch:
        first = results(ids)
    again, other = results(ids), results(ids[:, order])
    same = all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    moved = [(one.detach(), two.detach()) for one, two in zip(other, first, strict=True)]
    return same, moved, watch.unordered, off


def test_memory_is_a_chunk_s_logits_and_what_is_as_small_as_hidden_states() -> None:
    """Nothing of the weight's size beside main_grad; rows of 16 kB of logits, 64 at once."""
    shape = Shape(1000, 4093, rows=64)
    (peak,) = run_interpreted(1, peak_bytes, shape)
    logits, hidden = 64 * 4096 * 4, shape.R * HIDDEN * 4
    # The gradient of hidden; a chunk's product with it; and 40 numbers a row, of which a dozen a row stay.
    assert logits < peak < logits + hidden + 64 * HIDDEN * 4 + 64 * 40 * 8 + shape.R * 12 * 4
    assert 0.4 * logits < 4093 * HIDDEN * 4, "a second copy would show"


def peak_bytes(shape: Shape) -> int:
    """The most that torch's allocator has given out at once, forward and backward, above the inputs."""
    from torch.profiler import ProfilerActivity, profile

    given = shape_inputs(shape)
    weight = given[1]
    weight.main_grad = torch.zeros_like(weight)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fused(shape, given, weight).total.backward()
    given_out = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(given_out, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_ranks_take_as_many_rows_though_the_last_has_fewer_columns() -> None:
    """They meet once a chunk. Vocabularies, as with tokens added, that two ranks do not share evenly."""
    hidden = torch.empty(10**6, 1)
    for vocab_size in range(64_001, 66_000, 2):
        half = -(-vocab_size // 256) * 128
        slices = [
            VocabularySlice.of(torch.empty(half, 0), vocab_size, cast(ProcessGroup, _FakeGroup(rank)))
            for rank in range(2)
        ]
        assert slices[0].size != slices[1].size
        first, last = (rows_at_once(hidden, each, None) for each in slices)
        assert first == last


@dataclass(frozen=True)
class _FakeGroup:
    number: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return 2
