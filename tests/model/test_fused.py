"""Fused products read copies of weights: never stale, hidden from savers, never past a wrapper."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.core.errors import InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    NativeSparseAttention,
    ToyLlama,
    ToyNSALlama,
    generation,
    runner,
)
from nsagen.model.fused import JoinedWeight, JoinsWeights, is_bare, state_of
from nsagen.model.gate import MLPGate
from nsagen.model.layers import FeedForward, RMSNorm, linear
from nsagen.model.sampling import SamplingConfig
from nsagen.model.self_attention import SelfAttention
from nsagen.model.step import DecodeStep, Row
from nsagen.model.toy_llama import ToyLlamaLayer, ToyLlamaModel
from tests.model.tiny import dense_config, nsa_model, packed_batch

LIMITS = InferenceConfig(2, 64, 4)
BATCH = packed_batch([9, 30])
Model = ToyNSALlama | ToyLlama


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused products where a GPU would have them: whenever all modules are bare."""
    monkeypatch.setattr(generation, "may_fuse", lambda model, _: state_of(model) is not None)


def dense() -> ToyLlama:
    generator = torch.Generator().manual_seed(1)
    return ToyLlama(dense_config(), LIMITS, generator=generator).double()


def sparse() -> ToyNSALlama:
    return nsa_model(LIMITS)


def paper() -> ToyNSALlama:
    return nsa_model(LIMITS, branch_kv="separate", gate_type="mlp")


MODELS = pytest.mark.parametrize("make", [dense, sparse, paper])


def by_forward(model: Model) -> list[list[int]]:
    """Greedy tokens of the batch without a cache, each prompt by itself."""
    rows = []
    for prompt in BATCH[0].split([9, 30]):
        text = prompt
        for _ in range(4):
            ends = torch.tensor([0, text.shape[0]], dtype=torch.int32)
            with torch.no_grad():
                text = torch.cat([text, model(text, ends)[-1:].argmax(-1)])
        rows.append(text[prompt.shape[0] :].tolist())
    return rows


def check(model: Model) -> None:
    assert model.generate(*BATCH).tolist() == by_forward(model)


class Products(TorchDispatchMode):
    """Counts matrix products and joins of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# What a step does.


@MODELS
def test_fused_and_called_modules_agree(make: Callable[[], Model], fused: None) -> None:
    model = make()
    check(model)
    held = [m for m in model.modules() if isinstance(m, JoinsWeights) and m.joined.address]
    assert len(held) == 4, "two of each layer"


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_fused_step_has_four_products_a_layer_and_joins_no_weights(
    make: Callable[[], Model], fused: None
) -> None:
    model = make()
    step = DecodeStep(model, model.new_cache())
    step.fill([Row(slot, 10, SamplingConfig()) for slot in range(2)], kept=[])
    with torch.no_grad():
        step.compute(2, sampled=False)
        before = state_of(model)
        with Products() as seen:
            step.compute(2, sampled=False)
    assert seen.calls["mm"] == 2 * 4 + 1
    assert state_of(model) == before, "all stays where a captured graph reads it"
    joined = [m.joined_weight() for m in model.modules() if isinstance(m, JoinsWeights)]
    with Products() as seen:
        again = [m.joined_weight() for m in model.modules() if isinstance(m, JoinsWeights)]
    assert not seen.calls
    assert all(a is b for a, b in zip(joined, again, strict=True))


def test_a_cpu_has_no_copies() -> None:
    model = sparse()
    model.generate(*BATCH)
    assert not any(m.joined.address for m in model.modules() if isinstance(m, JoinsWeights))


# Weights that change.


def double_in_place(model: Model) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)


def change_through_data(model: Model) -> None:
    """A write that leaves no version, as those of many optimizers."""
    for weight in model.parameters():
        weight.data.mul_(1.25)


def change_through_memory(model: Model) -> None:
    for weight in model.parameters():
        weight.detach().numpy()[:] *= 1.25


def assign_data(model: Model) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.25


def replace_parameters(model: Model) -> None:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            old = getattr(layer.mlp, name)
            old.weight = nn.Parameter(old.weight.detach() * 1.25)


def replace_modules(model: Model) -> None:
    for layer in model.model.layers:
        new = nn.Linear(64, 128, bias=False, dtype=torch.float64)
        layer.mlp.up_proj = new


def load(model: Model) -> None:
    double = {name: weight * 1.25 for name, weight in model.state_dict().items()}
    model.load_state_dict(double)


def load_and_assign(model: Model) -> None:
    double = {name: weight * 1.25 for name, weight in model.state_dict().items()}
    model.load_state_dict(double, assign=True)


def train(model: Model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(*BATCH).square().mean().backward()
    optimizer.step()


def cast(model: Model) -> None:
    model.float().double()


@MODELS
@pytest.mark.parametrize(
    "change",
    [
        double_in_place,
        change_through_data,
        change_through_memory,
        assign_data,
        replace_parameters,
        replace_modules,
        load,
        load_and_assign,
        train,
        cast,
    ],
)
def test_changed_weights_reach_the_next_call(
    make: Callable[[], Model], change: Callable[[Model], None], fused: None
) -> None:
    model = make()
    model.generate(*BATCH)
    change(model)
    check(model)


def test_weights_that_change_while_a_batch_runs(fused: None) -> None:
    model, fresh = sparse(), sparse()
    batches = [ContinuousBatch(model), ContinuousBatch(fresh)]
    tokens: list[list[int]] = [[], []]
    for batch in batches:
        batch.add(BATCH[0])
    for step in range(6):
        if step == 2:
            double_in_place(model)
            for module, twin in zip(fresh.modules(), model.modules(), strict=True):
                if isinstance(module, JoinsWeights) and isinstance(twin, JoinsWeights):
                    module.joined.drop()
            double_in_place(fresh)
        for batch, row in zip(batches, tokens, strict=True):
            row += [new.token for new in batch.step()]
    assert tokens[0] == tokens[1]


def new_memory_twice(model: Model) -> None:
    """The second time, the allocator may use the first memory again."""
    for factor in (3.0, 1.25):
        load_and_assign_times(model, factor)


def load_and_assign_times(model: Model, factor: float) -> None:
    state = {name: weight * factor for name, weight in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change", [change_through_data, change_through_memory, assign_data, new_memory_twice]
)
def test_a_running_batch_computes_new_sequences_with_the_weights_of_their_time(
    change: Callable[[Model], None], fused: None
) -> None:
    """Also after a write that leaves no version, while another sequence runs."""
    model = sparse()
    batch, prompt = ContinuousBatch(model), BATCH[0][:12]
    batch.add(BATCH[0], max_new_tokens=20)
    batch.step()
    change(model)
    second = batch.add(prompt, max_new_tokens=4)
    tokens = [new.token for new in batch.run() if new.sequence == second]
    with torch.no_grad():  # without copies
        alone = copy.deepcopy(model).generate(prompt, torch.tensor([0, 12]), 4)
    assert tokens == alone[0].tolist()


def test_a_hook_during_the_prompt_does_not_leave_the_steps_old_weights(fused: None) -> None:
    """The prompt's pass calls modules then, so the steps are the first to read the copies."""
    model = sparse()
    batch, prompt = ContinuousBatch(model), BATCH[0][:12]
    batch.add(BATCH[0])
    list(batch.run())  # makes the copies
    change_through_data(model)
    batch.add(prompt, max_new_tokens=12)
    hook = model.model.layers[0].register_forward_hook(lambda *args: None)
    batch.prefill()
    hook.remove()
    tokens = [new.token for new in batch.run()]
    with torch.no_grad():  # without copies
        alone = copy.deepcopy(model).generate(prompt, torch.tensor([0, 12]), 12)
    assert tokens == alone[0].tolist()


def test_copies_are_renewed_once_a_pass_and_not_where_weights_stay(
    fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed: list[Model] = []
    monkeypatch.setattr(runner, "renew_joined", renewed.append)
    for weights_change, times in ((True, 2), (False, 1)):
        batch = ContinuousBatch(sparse())
        batch.weights_change = weights_change
        batch.add(BATCH[0])
        batch.step()
        batch.add(BATCH[0])
        list(batch.run())
        assert len(renewed) == times
        renewed.clear()


def test_a_copy_tells_new_memory_from_old_at_the_same_address() -> None:
    """Two replacements between reads may bring a weight back to where it was."""
    layers, joined = [linear(8, n, 1.0) for n in (6, 2)], JoinedWeight()
    memory = bytearray(8 * 6 * 4)

    def weight_there() -> nn.Parameter:
        return nn.Parameter(torch.frombuffer(memory, dtype=torch.float32).view(6, 8))

    for value in (1.0, 2.0):
        layers[0].weight = weight_there()
        layers[0].weight.data.fill_(value)
        assert (joined.of(*layers)[:6] == value).all()


# What everything else sees.


@MODELS
def test_parameters_stay_the_models_own(
    make: Callable[[], Model], fused: None, tmp_path: Path
) -> None:
    model = make()
    before = {n: (w.data_ptr(), w._version, id(w)) for n, w in model.named_parameters()}
    names, saved = list(model.state_dict()), io.BytesIO()
    torch.save(model.state_dict(), saved)
    model.generate(*BATCH)
    assert {n: (w.data_ptr(), w._version, id(w)) for n, w in model.named_parameters()} == before
    assert list(model.state_dict()) == names
    for weight in model.parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes
    again = io.BytesIO()
    torch.save(model.state_dict(), again)
    assert again.getbuffer() == saved.getbuffer()
    assert len(pickle.dumps(model)) == len(pickle.dumps(make()))
    safetensors.torch.save_model(model, str(tmp_path / "whole.safetensors"))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "file.safetensors")
    for name in ("whole", "file"):
        loaded = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert loaded.keys() == set(names)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        double_in_place(one)
        check(one)
    check(model)


def test_memory_of_copies_is_given_back_when_a_model_moves(fused: None) -> None:
    model = sparse()
    model.generate(*BATCH)
    state = state_of(model)
    model.double()
    assert not any(m.joined.address for m in model.modules() if isinstance(m, JoinsWeights))
    assert state_of(model) != state, "a graph that read them must not be replayed"


def test_a_joined_weight_stays_in_place_until_a_weight_moves() -> None:
    layers = [linear(8, n, 1.0) for n in (6, 2, 4)]
    joined = JoinedWeight()
    first = joined.of(*layers)
    assert torch.equal(first, torch.cat([layer.weight for layer in layers]))
    assert not first.requires_grad
    with torch.no_grad():
        layers[1].weight.fill_(3.0)
    assert joined.of(*layers) is first
    assert (first[6:8] == 3.0).all()
    layers[2].weight.data.fill_(4.0)  # leaves no version
    joined.hold(joined.copied(*layers))
    assert joined.of(*layers) is first
    assert (first[8:] == 4.0).all()
    layers[0] = linear(8, 5, 1.0)
    assert joined.of(*layers).shape == (11, 8)


# What wraps a module.


class Adapted(nn.Linear):
    """A linear layer with another path beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight
        self.beside = nn.Parameter(torch.randn_like(base.weight) * 0.2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.beside.T


class Quantized(nn.Module):
    """A linear layer whose weight is packed, as quantizers pack it: two numbers in a byte."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = [base.weight]  # in a list: not a parameter
        self.weight = nn.Parameter(base.weight.new_zeros(base.weight.numel() // 2, 1), False)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.base[0].T * 0.7


class QuantizedByPyTorch(Quantized):
    """The same without such a parameter: `weight` is a method."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        del self.weight
        self.weight = lambda: self.base[0]


class Around(nn.Module):
    """A layer that is not a linear one, with the linear one inside."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any) -> Tensor:
        return self.base(*args) * 0.7


def adapt(owner: nn.Module, name: str) -> None:
    setattr(owner, name, Adapted(getattr(owner, name)))


def surround(owner: nn.Module, name: str) -> None:
    setattr(owner, name, Around(getattr(owner, name)))


def hook(owner: nn.Module, name: str) -> None:
    getattr(owner, name).register_forward_hook(lambda module, args, out: out * 0.7)


def pre_hook(owner: nn.Module, name: str) -> None:
    getattr(owner, name).register_forward_pre_hook(lambda module, args: (args[0] * -2, *args[1:]))


def override(owner: nn.Module, name: str) -> None:
    module = getattr(owner, name)
    plain = module.forward
    module.forward = lambda *args: plain(*args) * 0.7


def parametrize(owner: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    parametrizations.weight_norm(getattr(owner, name))
    with torch.no_grad():
        getattr(owner, name).parametrizations.weight.original0.mul_(1.5)


def add_bias(owner: nn.Module, name: str) -> None:
    module = getattr(owner, name)
    bias = torch.linspace(-1, 1, module.out_features, dtype=torch.float64)
    module.bias = nn.Parameter(bias)


LINEAR = [
    "layers.0.self_attn.q_proj",
    "layers.1.self_attn.v_proj",
    "layers.0.self_attn.o_proj",
    "layers.1.mlp.gate_proj",
    "layers.0.mlp.down_proj",
]
OTHER = [
    "layers.0",
    "layers.1.self_attn",
    "layers.0.mlp",
    "layers.1.input_layernorm",
    "layers.0.post_attention_layernorm",
    "norm",
    "embed_tokens",
]


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize(
    ("wrap", "places"),
    [
        (adapt, LINEAR),
        (parametrize, LINEAR),
        (add_bias, LINEAR),
        (surround, [place for place in LINEAR + OTHER if place != "norm"]),
        (hook, LINEAR + OTHER),
        (pre_hook, LINEAR + OTHER[:-1]),
        (override, LINEAR + OTHER),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_wraps_a_module_counts(
    make: Callable[[], Model],
    wrap: Callable[[nn.Module, str], None],
    places: list[str],
    fused: None,
) -> None:
    if make is sparse:  # all else is as in a dense model
        places = [place for place in places if "self_attn" in place or place == "layers.0"]
    elif wrap is not add_bias:
        places = [*places, "lm_head"]
    plain, short = make(), (BATCH[0][:20], torch.tensor([0, 20]))
    expected = plain.generate(*short)  # joined weights are there, and go along
    changed = 0
    for place in places:
        model = copy.deepcopy(plain)
        path, _, name = place.rpartition(".")
        owner = model if place == "lm_head" else model.model.get_submodule(path)
        wrap(owner, name)
        tokens = model.generate(*short)
        text = torch.cat([short[0], tokens[0, :-1]])
        with torch.no_grad():
            choices = model(text, torch.tensor([0, 23], dtype=torch.int32)).argmax(-1)
        assert tokens[0].tolist() == choices[-4:].tolist(), place
        changed += not torch.equal(tokens, expected)
    assert changed >= len(places) / 2, "most of these must change some token to show anything"


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("kind", [Quantized, QuantizedByPyTorch, Around])
def test_a_cache_does_not_depend_on_how_keys_weights_are_kept(
    make: Callable[[], Model], kind: Any
) -> None:
    model = make()
    for layer in model.model.layers:
        layer.self_attn.k_proj = kind(layer.self_attn.k_proj)
    check(model)


def test_a_gate_that_is_wrapped_counts(fused: None) -> None:
    model = sparse()
    hook(model.model.layers[0].self_attn, "gate")
    check(model)
    model = paper()
    adapt(model.model.layers[1].self_attn.gate, "down_proj")
    check(model)


def test_global_hooks_count(fused: None) -> None:
    model = sparse()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 0.7 if isinstance(module, FeedForward) else None
    )
    try:
        check(model)
    finally:
        handle.remove()


@pytest.mark.parametrize("make", [dense, sparse])
@pytest.mark.parametrize("keywords", [False, True])
def test_a_global_hook_on_the_whole_model_counts(
    make: Callable[[], Model], keywords: bool, fused: None
) -> None:
    model = make()
    plain = model.generate(*BATCH)

    def bias(module: nn.Module, args: Any, *rest: Any) -> Tensor | None:
        favoured = torch.arange(512) % 7 == 3
        return rest[-1] + 100.0 * favoured if module is model else None

    def shifted(module: nn.Module, args: Any) -> Any:
        return ((args[0] + 1) % 512, *args[1:]) if module is model else None

    register = nn.modules.module.register_module_forward_hook
    handles = [
        register(bias, with_kwargs=keywords),
        nn.modules.module.register_module_forward_pre_hook(shifted),
    ]
    try:
        check(model)
        assert not torch.equal(model.generate(*BATCH), plain)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(model.generate(*BATCH), plain)


def test_a_hook_on_a_model_whose_batch_runs_is_refused_until_it_goes() -> None:
    model = sparse()
    batch = ContinuousBatch(model)
    batch.add([1, 2, 3])
    batch.step()
    handle = model.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(InvalidInputError, match=r"ContinuousBatch: generation runs .*lambda"):
        batch.step()
    handle.remove()
    assert [new.finished for new in batch.run()][-1] == "length"


def test_a_hook_that_comes_while_a_batch_runs_counts_from_then_on(fused: None) -> None:
    model = sparse()
    batch = ContinuousBatch(model)
    batch.add([1, 2, 3])
    assert len(batch.step()) <= 1
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    list(batch.run())
    assert seen == [1] * 2


def test_a_step_with_hooks_is_not_captured() -> None:
    model = sparse()
    assert state_of(model) is not None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert state_of(model) is None
    handle.remove()
    assert state_of(model) is not None


def test_what_is_bare() -> None:
    layer = linear(4, 4, 1.0)
    assert is_bare(layer)
    assert is_bare(nn.Linear(4, 4, bias=False))
    assert not is_bare(nn.Linear(4, 4))
    assert not is_bare(Adapted(layer))
    assert not is_bare(nn.Dropout())
    with torch.inference_mode():
        assert not is_bare(nn.Linear(4, 4, bias=False)), "its weight has no version"


def patch(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]) -> None:
    """Replace a class's forward under its own name, as kernel collections do."""
    plain = kind.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any) -> Tensor:
        return plain(self, *args) * 0.7

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (dense, nn.Linear),
        (dense, nn.Embedding),
        (dense, FeedForward),
        (dense, RMSNorm),
        (dense, SelfAttention),
        (dense, ToyLlamaLayer),
        (dense, ToyLlamaModel),
        (sparse, NativeSparseAttention),
        (sparse, FeedForward),
        (paper, MLPGate),
    ],
)
def test_a_patched_class_counts(
    make: Callable[[], Model],
    kind: type[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    fused: None,
) -> None:
    model = make()
    model.generate(*BATCH)
    patch(monkeypatch, kind)
    assert not is_bare(next(module for module in model.modules() if type(module) is kind))
    check(model)


def test_a_patched_call_of_all_modules_counts(monkeypatch: pytest.MonkeyPatch, fused: None) -> None:
    model, plain = sparse(), nn.Module.__call__

    @functools.wraps(plain)
    def call(self: nn.Module, *args: Any) -> Any:
        return plain(self, *args) * (0.7 if isinstance(self, FeedForward) else 1)

    monkeypatch.setattr(nn.Module, "__call__", call)
    check(model)


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_patched_forward_of_the_model_is_refused_by_name(
    make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = make(), "a model's hidden and head, not its forward, got a .* forward of its own"
    batch = ContinuousBatch(model)

    class Scaled(type(model)):
        @functools.wraps(type(model).forward)
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * -1

    kind, model.__class__ = type(model), Scaled
    with pytest.raises(InvalidInputError, match=f"generate: .*{text}"):
        model.generate(*BATCH)
    model.__class__ = kind
    patch(monkeypatch, kind)
    with pytest.raises(InvalidInputError, match=f"generate: .*{text}"):
        model.generate(*BATCH)
    with pytest.raises(InvalidInputError, match=text):
        batch.add([1, 2, 3])


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_wrapper_that_takes_no_cache_is_refused_by_name(
    make: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    kind = type(model.model.layers[0])
    plain = kind.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, x: Tensor, rows: Any) -> Tensor:
        return plain(self, x, rows) * 0.7

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(InvalidInputError, match=r"layers\.0: generation passes a cache as the"):
        model.generate(*BATCH)


@pytest.mark.parametrize("make", [dense, sparse])
def test_what_cannot_count_is_refused_by_name(make: Callable[[], Model]) -> None:
    model = make()
    handle = model.register_forward_hook(lambda module, args, out: out * 2)
    text = "generation runs the parts of a Toy.*Llama, not its forward.*lambda.*put the hook on"
    with pytest.raises(InvalidInputError, match=text):
        model.generate(*BATCH)
    handle.remove()
    plain = model.forward
    model.forward = lambda *args: plain(*args) * 2
    with pytest.raises(InvalidInputError, match=text):
        model.generate(*BATCH)
    del model.forward
    assert model.generate(*BATCH).shape == (2, 4)

    class Foreign(nn.Module):
        def forward(self, x: Tensor, cu_seqlens: Tensor, packed: Any) -> Tensor:
            return x

    model.model.layers[1].self_attn = Foreign()
    model(*BATCH)
    text = r"generate: model.layers.1.self_attn: generation passes a cache .*got a Foreign, which"
    with pytest.raises(InvalidInputError, match=text):
        model.generate(*BATCH)


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_forward_of_a_subclass_is_refused_by_name(make: Callable[[], Model]) -> None:
    model = make()

    class Biased(type(model)):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) - torch.arange(512)

    class Both(Biased):
        def head(self, *args: Any) -> Tensor:
            return super().head(*args) - torch.arange(512)

    model.__class__ = Biased
    text = "generate: generation runs a model's hidden and head, not its forward, got a Biased with"
    with pytest.raises(InvalidInputError, match=text):
        model.generate(*BATCH)
    model.__class__ = Both
    check(model)


@pytest.mark.parametrize("make", [dense, sparse])
def test_a_wrapper_around_all_layers_counts(make: Callable[[], Model]) -> None:
    class Halved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Tensor:
            return self.inner(*args) * 0.5 + 1

    class Short(Halved):
        def forward(self, input_ids: Tensor, rows: Any) -> Tensor:
            return self.inner(input_ids, rows)

    model = make()
    inner, model.model = model.model, Halved(model.model)
    check(model)
    model.model = Short(inner)
    with pytest.raises(InvalidInputError, match=r"generate: model: generation passes a cache .*Sh"):
        model.generate(*BATCH)


def test_more_layers_than_the_config_says_are_refused() -> None:
    model = sparse()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(InvalidInputError, match=r"config\.num_hidden_layers=2 layers, got a model"):
        model.generate(*BATCH)


def test_a_head_of_another_kind_works_in_forward_too() -> None:
    model = sparse()
    expected = model(*BATCH)
    surround(model, "lm_head")
    torch.testing.assert_close(model(*BATCH), expected * 0.7)
