"""Context parallel: what ranks compute together is what one process computes."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nsagen.core.errors import InvalidInputError, LostRankError
from nsagen.distributed import (
    collectives,
    context_parallel,
    gathering,
    naming_lost_ranks,
    sparse_attention,
)
from nsagen.distributed.context_parallel import KEPT
from nsagen.distributed.gathering import Gathering
from nsagen.model import NativeSparseAttention, RopeConfig, ToyLlama, ToyNSALlama
from tests.distributed.ranks import on_ranks
from tests.model.forms import EVERY, PAPER
from tests.model.tiny import dense_config, nsa_config
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = {
    "one sequence": [75],
    "ragged": [0, 5, 130, 1, 33, 0],
    "shorter than a chunk": [3, 1, 2],
    "no token": [0, 0],
}

Found = dict[str, Tensor | None]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attention(**changes: Any) -> NativeSparseAttention:
    config = nsa_config(**changes)
    return NativeSparseAttention(
        hidden_size=48,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        rope_config=RopeConfig(1024, config.head_dim, rope_scaling=None),
        generator=torch.Generator().manual_seed(3),
        **config.settings(),
    ).double()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def passed(
    module: nn.Module,
    lengths: list[int],
    parallel: Any = None,
    call: Callable[..., Tensor] | None = None,
) -> Found:
    """Output and gradients of a module for random input; under `parallel`, the whole ones."""
    module.zero_grad()
    cu_seqlens = offsets_of(lengths)
    dtype = next(module.parameters()).dtype
    x = numbers(int(cu_seqlens[-1]), 48).to(dtype)
    weight = numbers(*x.shape, seed=1).to(dtype)
    layout = cu_seqlens
    if parallel is not None:
        layout = parallel.shard(cu_seqlens)
        x, weight = layout.take(x), layout.take(weight)
    x.requires_grad_()
    y = module(x, layout) if call is None else call(module, x, layout)
    (y * weight).sum().backward()
    found: Found = {name: p.grad for name, p in module.named_parameters()}
    if parallel is None:
        return {"output": y.detach(), "input": x.grad, **found}
    for gradient in found.values():
        if gradient is not None:
            dist.all_reduce(gradient)
    return {"output": layout.whole(y), "input": layout.whole(x.grad), **found}


def assert_equal(
    found: Mapping[str, Tensor | None], expected: Found, label: str, bound: float = 1e-12
) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        other = found[name]
        if one is None or other is None:
            assert one is None, (label, name)
            assert other is None or not other.any(), (label, name)
            continue
        scale = max(1.0, float(one.abs().max()) if one.numel() else 1.0)
        error = float((other - one).abs().max()) / scale if one.numel() else 0.0
        assert error < bound, (label, name, error)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_outputs_and_gradients_are_one_process_s(count: int) -> None:
    """For every form of the attention, and every kind of batch."""
    forms = EVERY if count == 2 else ()
    cases = {f"{form}, {BATCHES['ragged']}": (form, BATCHES["ragged"]) for form in forms}
    for form in ("avgpool", "the paper's"):
        cases |= {f"{form}, {batch}": (form, batch) for batch in BATCHES.values()}

    def run(parallel: Callable[[nn.Module], Any]) -> dict[str, Found]:
        found = {}
        for label, (form, lengths) in cases.items():
            module = attention(**EVERY[form])
            found[label] = passed(module, lengths, parallel(module))
        return found

    expected = run(lambda module: None)
    for found in on_ranks(count, lambda rank: run(context_parallel)):
        for label, one in expected.items():
            assert_equal(found[label], one, label)


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_a_model_s_loss_and_gradients(kind: str) -> None:
    ids = torch.randint(512, (142,), generator=torch.Generator().manual_seed(0))
    targets, cu_seqlens = ids.roll(-1), offsets_of([9, 0, 130, 3])

    def run(parallel: bool) -> tuple[Found, Tensor]:
        random = torch.Generator().manual_seed(1)
        model: Any = (
            ToyNSALlama(nsa_config(), generator=random)
            if kind == "nsa"
            else ToyLlama(dense_config(), generator=random)
        )
        model = model.double()
        if not parallel:
            logits = model(ids, cu_seqlens)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            loss.backward()
            return {n: p.grad for n, p in model.named_parameters()}, logits
        shard = context_parallel(model).shard(cu_seqlens)
        logits = model(shard.take(ids), shard)
        F.cross_entropy(logits, shard.take(targets), reduction="sum").backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        with torch.no_grad():
            assert torch.equal(model(shard.take(ids), shard), logits)
        return {n: p.grad for n, p in model.named_parameters()}, shard.whole(logits)

    expected, logits = run(parallel=False)
    for found, whole in on_ranks(3, lambda rank: run(parallel=True)):
        assert torch.equal(whole, logits)  # float32 of float64
        # The loss is float32, and so is its gradient.
        for name, one in expected.items():
            assert one is not None
            assert torch.allclose(found[name], one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_runs_repeat_to_the_bit() -> None:
    def run(rank: int) -> bool:
        module = attention(**PAPER).float()
        found = []
        for _ in range(2):
            module.zero_grad()
            shard = context_parallel(module).shard(offsets_of(BATCHES["ragged"]))
            x = shard.take(numbers(169, 48).float()).requires_grad_()
            y = module(x, shard)
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in module.parameters())])
        return all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    assert on_ranks(2, run) == [True, True]


def test_anomalies_are_looked_for_in_complete_sums() -> None:
    """Elsewhere nothing reads a sum before it has been awaited."""
    expected = passed(attention(), [41, 8])

    def run(rank: int) -> Found:
        module = attention()
        with torch.autograd.detect_anomaly():
            return passed(module, [41, 8], context_parallel(module))

    for found in on_ranks(2, run):
        assert_equal(found, expected, "anomalies")


def test_activation_checkpointing_and_frozen_weights() -> None:
    """Gathers happen again in recomputed layers; what asks for no gradient sums none."""

    def again(module: nn.Module, x: Tensor, layout: Any) -> Tensor:
        return checkpoint(module, x, layout, use_reentrant=False)  # type: ignore[return-value]

    def frozen(module: nn.Module) -> nn.Module:
        for name in ("k_proj", "compress_value"):
            getattr(module, name).requires_grad_(False)
        return module

    lengths = BATCHES["one sequence"]
    forms = {"again": attention(), "frozen": frozen(attention(compress_type="linear"))}
    expected = {name: passed(module, lengths, None, again) for name, module in forms.items()}

    def run(rank: int) -> dict[str, Found]:
        return {
            name: passed(module, lengths, context_parallel(module), again)
            for name, module in forms.items()
        }

    for found in on_ranks(2, run):
        for name, one in expected.items():
            assert_equal(found[name], one, name)


def test_a_rank_keeps_its_share_and_gathers_one_layer_s() -> None:
    """What a forward pass keeps is half of one process's, with 2 ranks; the backward pass holds
    gathered keys of one layer at a time."""
    layers, tokens = 4, 256
    ids = torch.randint(512, (tokens,), generator=torch.Generator().manual_seed(0))

    def kept(model: nn.Module, *inputs: Any) -> int:
        sizes: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(*inputs)
        return sum(sizes.values())

    def model() -> ToyNSALlama:
        return ToyNSALlama(nsa_config(num_hidden_layers=layers, num_attention_heads=16)).double()

    alone = kept(model(), ids, offsets_of([tokens]))

    def run(rank: int) -> tuple[int, int]:
        mine = model()
        shard = context_parallel(mine).shard(offsets_of([tokens]))
        held = kept(mine, shard.take(ids), shard)
        most, wait, held_now = 0, Gathering.wait, list[ReferenceType[Tensor]]()

        def counted(gathering: Gathering) -> list[Tensor]:
            nonlocal most
            found = wait(gathering)
            held_now.extend(ref(x) for x in found if x.shape[0] >= tokens)
            most = max(most, sum(x() is not None for x in held_now))
            return found

        Gathering.wait = counted  # type: ignore[method-assign]
        mine(shard.take(ids), shard).sum().backward()
        return held, most

    for held, most in on_ranks(2, run):
        assert held < 0.53 * alone
        assert most == 2, "keys and values of one layer"


def test_batches_of_the_same_lengths_are_laid_out_once() -> None:
    """Of the last few; and lengths on the host need no device."""

    def run(rank: int) -> None:
        module = attention()
        parallel = context_parallel(module)
        first = parallel.shard(offsets_of([64, 3]))
        assert parallel.shard(offsets_of([64, 3])) is first
        assert parallel.shard(offsets_of([64, 3]), "meta").positions.is_meta
        for tokens in range(KEPT):
            parallel.shard(offsets_of([tokens]))
        assert parallel.shard(offsets_of([64, 3])) is not first

    on_ranks(2, run)


class Names(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


def exchanges_of(names: Counter[str]) -> int:
    """How many exchanges began."""
    return sum(count for name, count in names.items() if name.startswith("c10d::"))


@pytest.mark.parametrize(("small", "count"), [(gathering.SMALL_BYTES, 6), (0, 8)])
def test_a_layer_exchanges_eight_times_at_most_and_lays_out_nothing(small: int, count: int) -> None:
    """Windows are laid out by the first layer of a batch's first step, for all; tokens and windows
    that are small are gathered together."""
    ids, ends = torch.arange(64), offsets_of([64])

    def run(rank: int) -> list[list[Counter[str]]]:
        gathering.SMALL_BYTES = small
        found = []
        for layers in (1, 2):
            model = ToyNSALlama(nsa_config(num_hidden_layers=layers))
            parallel, steps = context_parallel(model), []
            for _ in range(2):
                shard = parallel.shard(ends)
                with Names() as mode:
                    model(shard.take(ids), shard).sum().backward()
                steps.append(mode.names)
            found.append(steps)
        return found

    def total(names: Counter[str], part: str) -> int:
        return sum(count for name, count in names.items() if part in name)

    for one, two in on_ranks(2, run):
        assert [total(names, "lengths") for names in (*one, *two)] == [1, 0, 1, 0]
        exchanges = [exchanges_of(names) for names in (one[1], two[1])]
        assert exchanges == [count, 2 * count]


def test_keys_and_values_of_a_layer_travel_side_by_side() -> None:
    """So a pass has one gather of tokens and one of windows, and one sum of the gradients of each;
    separate keys and values of the sliding branch travel with the others."""

    def run(rank: int) -> list[tuple[str, int]]:
        counts: Counter[str] = Counter()

        def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                counts[name] += 1
                return function(*args)

            return call

        gathering.SMALL_BYTES = 0
        for name in ("start_gather", "start_reduce_scatter"):
            setattr(gathering, name, counted(name, getattr(gathering, name)))
        for form in ("avgpool", "separate"):
            module = attention(**EVERY[form])
            shard = context_parallel(module).shard(offsets_of([64]))
            x = shard.take(numbers(64, 48)).requires_grad_()
            module(x, shard).sum().backward()
        return sorted(counts.items())

    assert on_ranks(2, run)[0] == [("start_gather", 8), ("start_reduce_scatter", 4)]


def test_keys_and_values_travel_while_windows_are_attended_to() -> None:
    """In both passes, what needs windows alone runs before the gather of tokens is awaited; and
    the sums of their gradients, before anything waits for them."""
    tokens = 32
    ops = [
        *("windows_forward", "selected_and_window"),
        *("compressed_attention_backward", "selected_attention_backward"),
    ]

    def run(rank: int) -> list[str]:
        happened: list[str] = []
        gathering.SMALL_BYTES = 0

        def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                if not isinstance(args[0], Gathering):
                    happened.append(name)
                elif args[0].places.count == tokens:
                    happened.append(f"{name} tokens")
                return function(*args, **more)

            return call

        for owner, names in (
            (Gathering, ["start", "wait", "sum_gradients", "wait_for_sums"]),
            (sparse_attention, ops),
        ):
            for name in names:
                setattr(owner, name, noted(name, getattr(owner, name)))
        module = attention()
        shard = context_parallel(module).shard(offsets_of([2 * tokens]))
        x = shard.take(numbers(2 * tokens, 48)).requires_grad_()
        module(x, shard).sum().backward()
        return [name for name, _ in groupby(happened)]

    assert on_ranks(2, run)[0] == [
        *("start tokens", "windows_forward", "wait tokens", "selected_and_window"),
        *("start tokens", "compressed_attention_backward"),
        *("wait tokens", "selected_attention_backward", "sum_gradients tokens"),
        "wait_for_sums tokens",
    ]


def test_a_killed_rank_is_named_and_ends_the_job(tmp_path: Path) -> None:
    """The others leave their findings in files: they cannot meet in a last barrier either."""

    def run(rank: int) -> None:
        collectives.REPORT_SECONDS = 1.0
        module = attention()
        shard = context_parallel(module).shard(offsets_of([64]))
        x = shard.take(numbers(64, 48))
        module(x, shard)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LostRankError) as error:
            [module(x, shard) for _ in range(1000)]
        torch.save((str(error.value), time.monotonic() - began), tmp_path / str(rank))
        os._exit(0)

    on_ranks(3, run, timeout=10.0, lost=(0, 1, 2))
    for rank in (0, 1):
        text, seconds = torch.load(tmp_path / str(rank))
        assert "no sign of life from rank 2 of 3" in text
        assert seconds < 20


def test_what_cannot_be_shared_is_refused() -> None:
    module = attention()
    with pytest.raises(InvalidInputError, match=r"needs a process group, got none; call torch"):
        context_parallel(module)

    class OtherAttention(nn.Module):
        pass

    def run(rank: int) -> list[str]:
        other = nn.Sequential(module, OtherAttention())
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
        parallel = context_parallel(module, mesh["cp"])
        shard = parallel.shard(offsets_of([9]))
        model = ToyNSALlama(nsa_config(max_position_embeddings=8))
        calls: list[Callable[[], Any]] = [
            lambda: context_parallel(module, mesh),
            lambda: context_parallel(module, 3),  # type: ignore[arg-type]
            lambda: context_parallel(other),
            lambda: context_parallel(nn.Linear(2, 2)),
            lambda: parallel.shard(torch.tensor([0, 4, 3], dtype=torch.int32)),
            lambda: parallel.shard([0, 4]),  # type: ignore[arg-type]
            lambda: shard.take(torch.zeros(4)),
            lambda: model(torch.zeros(9, dtype=torch.int64), shard),
            lambda: model(shard.take(torch.zeros(9, dtype=torch.int64)), shard),
        ]
        texts = []
        for call in calls:
            with pytest.raises(InvalidInputError) as error:
                call()
            texts.append(str(error.value))
        return texts

    expected = [
        "mesh must have one dimension",
        "mesh must be a DeviceMesh or a process group",
        "1 of class OtherAttention",
        "the model must have attention, got none",
        "without decreasing, got [0, 4, 3]",
        "cu_seqlens must be a tensor, got list",
        "the batch's 9 tokens as its first dimension, got shape [4]",
        "the tokens of the layout, got [9]; pass shard.take",
        "at most max_position_embeddings=8 tokens, got 9",
    ]
    for texts in on_ranks(2, run):
        for text, part in zip(texts, expected, strict=True):
            assert part in text


def test_other_errors_are_not_taken_for_lost_ranks() -> None:
    with pytest.raises(RuntimeError, match="of its own"), naming_lost_ranks():
        raise RuntimeError("an error of its own")
