"""Tensor parallel by key/value heads: styles for `parallelize_module`.

A rank has some key/value heads and the query heads of their groups. Selection, compression, gates
and caches are each head's own, so attention exchanges nothing; a layer's two sums follow o_proj and
down_proj, as in a dense model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from nsagen.core.errors import InvalidInputError
from nsagen.distributed.collectives import start_sum_in_place, sum_over
from nsagen.model import NativeSparseAttention, ToyLlama, ToyNSALlama
from nsagen.model.checks import require
from nsagen.model.compression import Holder, local_of
from nsagen.model.gate import MLPGate
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.self_attention import SelfAttention

_WHERE = "tensor_parallel"
_log = logging.getLogger("nsagen.distributed")

COMPRESSION = ("compress_key", "compress_value", "intra_block_pe", "intra_block_pe_value")
"""Parameters, or modules of them, whose first dimension is key/value heads."""

_INPUT = "hidden_states"
"""What Transformers calls the input of a layer's attention, which it passes by name."""


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread a model's heads and feed-forwards over the ranks of a mesh, in place.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, mesh["tp"])
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])

    Inputs and outputs stay what they were, on every rank alike; so do `generate`, whose caches have
    the rank's own heads, and the names of the parameters, which become DTensors.

    Args:
        model: a `NativeSparseAttention`, `ToyNSALlama` or `ToyLlama`, or a Transformers model that
            `apply_nsa` has swapped, with projections of their own for queries, keys and values, and
            without norms of heads. Its head stays whole, and so do experts.
        mesh: of one dimension.

    Returns:
        the model.

    Raises:
        InvalidInputError: key/value heads or feed-forwards that the ranks cannot share, parameters
            that are not floating-point, a mesh of several dimensions, another model. Nothing has
            changed then.
    """
    return parallelize_module(model, mesh, tensor_parallel_plan(model, mesh))


def tensor_parallel_plan(model: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """The plan that `tensor_parallel` gives `parallelize_module`, checked against a mesh.

    Raises:
        InvalidInputError: as `tensor_parallel`.
    """
    require(
        isinstance(mesh, DeviceMesh) and mesh.ndim == 1,
        _WHERE,
        "mesh must be a DeviceMesh of one dimension",
        repr(mesh),
        'pass the tensor parallel one, e.g. mesh["tp"]',
    )
    attention = [m for m in model.modules() if isinstance(m, NSAOps | SelfAttention)]
    require(
        bool(attention),
        _WHERE,
        "the model must be a NativeSparseAttention, ToyNSALlama or ToyLlama, or a Transformers "
        "model that apply_nsa has swapped",
        type(model).__name__,
        "pass the model itself",
    )
    for name, module in model.named_modules():
        check_divisible(name or type(model).__name__, module, mesh.size())
    for name, parameter in model.named_parameters():
        require(
            parameter.is_floating_point() and not isinstance(parameter, DTensor),
            _WHERE,
            "parameters must be plain and floating-point",
            f"{name}: {type(parameter).__name__} of {parameter.dtype}",
            "spread the model before FSDP and before quantizing it, and only once",
        )
    for name, module in model.named_modules():
        check_linear(name or type(model).__name__, module)
    if isinstance(model, NativeSparseAttention):
        return {"": HeadParallel()}
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, NSAOps | SelfAttention):
            plan[name] = HeadParallel()
        elif _is_feed_forward(module):
            plan[name] = FeedForwardParallel()
    toy = isinstance(model, ToyNSALlama | ToyLlama)
    if toy and model.config.vocab_size % mesh.size() == 0:
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def spread_heads(model: nn.Module) -> None:
    """Spread the attention of a swapped model over the ranks over which Transformers' own plan,
    such as `tp_plan="auto"`, has spread the rest, in place.

    Attention whose heads the ranks cannot share stays whole on each; a line of the log says why.
    """
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
        return
    (mesh,) = meshes
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, NSAOps):
            try:
                check_divisible(name, module, mesh.size())
                check_linear(name, module)
            except InvalidInputError as error:
                _log.warning("%s; this attention stays whole on each rank", error)
            else:
                plan[name] = HeadParallel()
    parallelize_module(model, mesh, plan)


def _is_feed_forward(module: Any) -> bool:
    """Whether a module is a gated feed-forward of three linear layers, nsagen's or another's."""
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def check_divisible(name: str, module: nn.Module, size: int) -> None:
    """Check that `size` ranks can share a module's heads, or its hidden features.

    Raises:
        InvalidInputError: names the module and its number.
    """
    rule, count = "", 0
    if isinstance(module, NSAOps | SelfAttention):
        rule, count = "num_kv_heads must be a multiple of the ranks", module.num_kv_heads
        layers = _projections(module)
        single = len(layers) > 1 and all(isinstance(layer, nn.Linear) for layer in layers)
        norms = [n for n in ("q_norm", "k_norm") if getattr(module, n, None) is not None]
        require(
            single and not norms,
            f"{_WHERE}: {name}",
            "queries, keys and values must have linear projections of their own, and no norms",
            ", ".join(norms) or "one joined projection",
            "use context parallelism",
        )
    elif _is_feed_forward(module):
        rule = "intermediate_size must be a multiple of the ranks"
        count = cast(Any, module).gate_proj.out_features
    advice = "use fewer ranks for heads, and the others for sequences or batches"
    require(count % size == 0, f"{_WHERE}: {name}", rule, f"{count} and {size}", advice)


def check_linear(name: str, module: Any) -> None:
    """Check that the layers of a module that ranks share compute what `nn.Linear` does.

    Raises:
        InvalidInputError: names the module and the layers' classes.
    """
    layers: list[Any] = []
    if isinstance(module, NSAOps | SelfAttention):
        layers = [*_projections(module), module.o_proj]
        gate = getattr(module, "gate", None)
        layers += [gate.up_proj, gate.down_proj] if isinstance(gate, MLPGate) else [gate]
        layers = [layer for layer in layers if layer is not None]
    elif _is_feed_forward(module):
        layers = [module.gate_proj, module.up_proj, module.down_proj]
    others = {type(x).__name__ for x in layers if type(x).forward is not nn.Linear.forward}
    require(
        not others,
        f"{_WHERE}: {name}",
        "layers that ranks share must compute what torch.nn.Linear does",
        ", ".join(sorted(others)),
        "spread the model first, or use context parallelism",
    )


def _projections(module: Any) -> Sequence[nn.Module]:
    """The layers of queries, keys and values; one where they are joined."""
    if not isinstance(module, NSAOps):
        return module.joined_layers()
    return module.projections() if hasattr(module, "k_proj") else [module]


class _Shared(ParallelStyle):
    """A module whose layers read one input: that input's gradient is summed over the ranks once.

    Within it tensors and weights are this rank's own: a DTensor's operations cost the host several
    times as much as plain ones.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_divisible(type(module).__name__, module, device_mesh.size())
        check_linear(type(module).__name__, module)

        group = device_mesh.get_group()

        def shared(x: Any) -> Tensor:
            if isinstance(x, DTensor):
                whole = x.redistribute(placements=[Replicate()])
                return whole.to_local(grad_placements=[Partial()])
            return _GradientSum.apply(x, group)

        def share(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (shared(args[0]), *args[1:]), keywords
            return args, {**keywords, _INPUT: shared(keywords[_INPUT])}

        self.layers(module, device_mesh)
        module.register_forward_pre_hook(share, with_kwargs=True)
        return module

    def layers(self, module: Any, mesh: DeviceMesh) -> None:
        raise NotImplementedError


class FeedForwardParallel(_Shared):
    """The style of a `FeedForward`, or another of gate_proj, up_proj and down_proj: each rank has
    some of its hidden features."""

    def layers(self, module: Any, mesh: DeviceMesh) -> None:
        for layer in (module.gate_proj, module.up_proj):
            _spread_linear(layer, mesh, _Columns)
        _spread_linear(module.down_proj, mesh, _Rows)


class HeadParallel(_Shared):
    """The style of a `NativeSparseAttention` or `SelfAttention`: each rank has some key/value
    heads, with their query heads, gates and compression."""

    def layers(self, module: Any, mesh: DeviceMesh) -> None:
        module.head_ranks = mesh.size()
        for layer in _projections(module):
            _spread_linear(layer, mesh, _Columns)
        _spread_linear(module.o_proj, mesh, _Rows)
        if not isinstance(module, NSAOps):
            return
        if isinstance(module.gate, MLPGate):
            _spread_linear(module.gate.up_proj, mesh, _Whole)
            _spread_linear(module.gate.down_proj, mesh, _Columns)
        else:
            _spread_linear(module.gate, mesh, _Columns)
        for name in COMPRESSION:
            _spread_heads(module, name, getattr(module, name), mesh)


class _Sum(torch.autograd.Function):
    """The sum of the ranks' parts of a tensor, whose gradient every rank has.

    This and the others do what a DTensor's redistribution and `to_local` do, in a fraction of
    the host's time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


LARGE_BYTES = 1 << 26
"""Of a product over which its sum takes longer than another exchange costs."""


def _product_bytes(x: Tensor, weight: Tensor) -> int:
    kind, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return x.shape[:-1].numel() * weight.shape[0] * dtype.itemsize


class _SummedProduct(torch.autograd.Function):
    """x [..., in] times weight [out, in], summed over the ranks in place: half of the rows while
    the others are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.dtypes, kind = (x.dtype, weight.dtype), x.device.type
        if torch.is_autocast_enabled(kind):
            x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
        ctx.save_for_backward(x, weight)
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        halves = zip(x.flatten(0, -2).chunk(2), y.flatten(0, -2).chunk(2), strict=True)
        sums = []
        for rows, out in halves:
            with torch.autocast(kind, enabled=False):
                torch.mm(rows, weight.t(), out=out)
            sums.append(start_sum_in_place(out, group))
        for one in sums:
            one.wait()
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), dy, (wants_x, wants_weight, _) = (
            ctx.saved_tensors,
            gradients[0],
            ctx.needs_input_grad,
        )
        dx = dy.matmul(weight).to(ctx.dtypes[0]) if wants_x else None
        if not wants_weight:
            return dx, None, None
        return dx, dy.flatten(0, -2).t().mm(x.flatten(0, -2)).to(ctx.dtypes[1]), None


class _GradientSum(torch.autograd.Function):
    """A tensor that every rank has, and of whose gradient each computes a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return sum_over(gradients[0], ctx.group), None


class _Local(torch.autograd.Function):
    """This rank's part of a spread weight, by DTensor's private fields: `to_local` and `from_local`
    cost the host 1.8 times as much, without their checks."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.spec = weight._spec
        local = weight._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> DTensor:
        return DTensor(gradients[0], ctx.spec, requires_grad=False)


class _Columns(nn.Linear):
    """A linear layer of which each rank has some outputs."""

    placements: ClassVar[dict[str, Placement]] = {"weight": Shard(0), "bias": Shard(0)}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else _Local.apply(self.bias)
        return F.linear(x, _Local.apply(self.weight), bias)


class _Rows(nn.Linear):
    """A linear layer of which each rank has some inputs; the ranks' products are summed."""

    placements: ClassVar[dict[str, Placement]] = {"weight": Shard(1), "bias": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        weight, group = (
            _Local.apply(self.weight),
            cast(DTensor, self.weight).device_mesh.get_group(),
        )
        if not torch.compiler.is_compiling() and _product_bytes(x, weight) >= LARGE_BYTES:
            y = _SummedProduct.apply(x, weight, group)
        else:
            y = _Sum.apply(F.linear(x, weight), group)
        return y if self.bias is None else y + local_of(self.bias)


class _Whole(nn.Linear):
    """A linear layer that every rank has, before layers that are spread: each rank computes a
    part of the gradient of its weights."""

    placements: ClassVar[dict[str, Placement]] = {"weight": Replicate(), "bias": Replicate()}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            None
            if p is None
            else p.redistribute(placements=p.placements).to_local(grad_placements=[Partial()])
            for p in cast(Any, (self.weight, self.bias))
        )
        return F.linear(x, cast(Tensor, weight), bias)


def _spread_linear(layer: Any, mesh: DeviceMesh, kind: type[Any]) -> None:
    """Make a layer one of these, in place: its forward would mix DTensors and plain tensors."""
    for name, parameter in [*layer.named_parameters(recurse=False)]:
        _register(layer, name, parameter, mesh, kind.placements[name])
    layer.__class__ = kind


def _spread_heads(module: nn.Module, name: str, holder: Holder, mesh: DeviceMesh) -> None:
    if isinstance(holder, nn.Parameter):
        _register(module, name, holder, mesh, Shard(0))
    elif holder is not None:
        for part, parameter in [*holder.named_parameters(recurse=False)]:
            _register(holder, part, parameter, mesh, Shard(0))


def _register(
    module: nn.Module, name: str, parameter: Tensor, mesh: DeviceMesh, placement: Any
) -> None:
    spread = distribute_tensor(parameter.detach(), mesh, [placement])
    module.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))
