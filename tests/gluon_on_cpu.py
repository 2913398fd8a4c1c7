"""Runs a pipeline that is written in Gluon on the CPU, with its warps in random order.

Gluon has no interpreter. Here a generated file is executed twice: as it is, for its `launch` and
its plain kernels, which Triton's interpreter runs; and with PyTorch in place of Gluon's language,
for the pipeline. A group of warps is one thread. At a barrier any other one may go on, bulk copies
end at any later time, and a product whose operands change before it was waited for is an error, as
is a deadlock. Not modelled: the layouts of registers, and the threads within a group.
"""

from __future__ import annotations

import ast
import itertools
import random
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Warps(threading.Thread):
    """A group of warps, which runs only while the scheduler lets it."""

    def __init__(self, scheduler: Scheduler, job: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.scheduler, self.job = scheduler, job
        self.go, self.ready = threading.Semaphore(0), lambda: True
        self.failure: BaseException | None = None
        self.done = False
        self.products: list[Product] = []  # in flight
        self.stores: list[list[bool]] = []  # bulk stores: whether each has read its tile

    def run(self) -> None:
        self.go.acquire()
        try:
            self.job()
        except BaseException as error:  # the scheduler raises it
            self.failure = error
        self.done = True
        self.scheduler.back.release()


class Scheduler:
    """Lets one group run at a time, and another one, by chance, from each `pause` on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.back = threading.Semaphore(0)
        self.copies: list[Callable[[], None]] = []

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, and go on when `ready`."""
        warps = current()
        warps.ready = ready
        self.back.release()
        warps.go.acquire()

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Run all jobs to their ends, and all copies."""
        groups = [Warps(self, job) for job in jobs]
        for warps in groups:
            warps.start()
        while alive := [warps for warps in groups if not warps.done]:
            able = [warps for warps in alive if warps.ready()]
            if self.copies and (not able or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            assert able, "deadlock: no warp can go on"
            warps = self.random.choice(able)
            warps.go.release()
            self.back.acquire()
            if warps.failure:
                raise warps.failure
        for copy in self.copies:
            copy()


def current() -> Warps:
    warps = threading.current_thread()
    assert isinstance(warps, Warps)
    return warps


@dataclass
class Pointer:
    """Elements of a tensor's memory."""

    memory: Tensor
    at: Any = 0

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


@dataclass
class Shared:
    """Elements of shared memory: `at` says where each lies, 128 bytes of a row together."""

    memory: Tensor
    at: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    @property
    def shape(self) -> torch.Size:
        return self.at.shape

    def index(self, place: Any) -> Shared:
        return Shared(self.memory, self.at[int(place)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.at.narrow(dim, start, length))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.memory, self.at.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory, self.at.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert self.memory.numel() == self.at.numel() == torch.Size(shape).numel()
        return Shared(self.memory, torch.arange(self.memory.numel()).reshape(shape))

    def load(self, layout: Any = None) -> Tensor:
        return self.memory[self.at]

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.memory.dtype, (x.dtype, self.memory.dtype)
        self.memory[self.at] = x.expand(self.at.shape)


@dataclass
class Layout:
    """Bytes of a row that lie together; 0: a whole row."""

    swizzle_byte_width: int = 0
    element_bitwidth: int = 16
    rank: int = 2


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    """Shared memory that starts as NaN. Its first dimension counts tiles."""
    at = torch.arange(torch.Size(shape).numel()).reshape(shape)
    columns = layout.swizzle_byte_width // dtype.itemsize
    if columns and shape[-1] > columns:
        rows = at[0].numel() // shape[-1]
        parts = at.reshape(shape[0], shape[-1] // columns, rows, columns)
        at = parts.transpose(1, 2).reshape(shape)
    poison = float("nan") if dtype.is_floating_point else 0
    return Shared(torch.full((at.numel(),), poison, dtype=dtype), at)


class Barrier:
    """An mbarrier: phases end when all arrivals and bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def arrive(self, count: int = 1, nbytes: int = 0) -> None:
        self.missing -= count
        self.bytes += nbytes
        self.settle()

    def settle(self) -> None:
        assert self.missing >= 0, "more arrivals than a phase takes"
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


class Product:
    """A product in flight, whose operands must not change until it has been waited for."""

    def __init__(self, a: Any, b: Any, acc: Any, use_acc: bool) -> None:
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        self.before = [x.load().clone() for x in self.operands]
        self.result = value(a).float() @ value(b).float()
        assert value(a).dtype == value(b).dtype
        if use_acc:
            self.result = value(acc) + self.result

    def finish(self) -> None:
        for x, before in zip(self.operands, self.before, strict=True):
            now, before = x.load().nan_to_num(7e4), before.nan_to_num(7e4)
            # Rows past the end may be cleared meanwhile: what comes of them is hidden.
            changed = (now != before) & (now != 0)
            assert not changed.any(), "a product's operand changed while it was in flight"


def value(x: Any) -> Tensor:
    return x.load() if isinstance(x, Shared) else x.result if isinstance(x, Product) else x


class Language:
    """What the pipelines use of Gluon, on PyTorch's tensors, for one program."""

    def __init__(
        self, scheduler: Scheduler, program: tuple[int, ...], grid: tuple[int, ...]
    ) -> None:
        self.scheduler, self.program, self.grid = scheduler, program, grid
        self.barriers: dict[tuple[int, int], Barrier] = {}

    def names(self) -> dict[str, Any]:
        """What a file's functions call."""
        gl = self.namespace()
        jit = types.SimpleNamespace(jit=lambda f: f)
        names = {"gl": gl, "tl": gl, "gluon": jit, "triton": jit}
        return {**names, "torch": torch, "range": counted}

    def namespace(self) -> types.SimpleNamespace:
        def number(x: Any) -> Tensor:
            return x if isinstance(x, Tensor) else torch.tensor(x)

        def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
            at = number(pointer.at)
            if mask is None:
                assert bool((at >= 0).all())
                assert bool((at < pointer.memory.numel()).all())
                return pointer.memory[at]
            mask = mask.broadcast_to(torch.broadcast_shapes(at.shape, mask.shape))
            return torch.where(mask, pointer.memory[torch.where(mask, at, 0)], other)

        def store(pointer: Pointer, x: Tensor, mask: Any = True) -> None:
            at, mask = torch.broadcast_tensors(pointer.at, number(mask))
            pointer.memory[at[mask]] = x[mask].to(pointer.memory.dtype)

        return types.SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "int32", "int64")},
            **{name: getattr(torch, name) for name in ("float16", "bfloat16", "exp2", "log2")},
            constexpr=lambda x: x,
            program_id=lambda axis: torch.tensor(self.program[axis]),
            num_programs=lambda axis: torch.tensor(self.grid[axis]),
            load=load,
            store=store,
            arange=lambda start, end, layout=None: torch.arange(start, end),
            full=lambda shape, x, dtype, layout=None: torch.full(shape, x, dtype=dtype),
            expand_dims=lambda x, dim: x.unsqueeze(dim),
            convert_layout=lambda x, layout: x,
            where=lambda mask, x, y: torch.where(number(mask), x, y),
            minimum=lambda x, y: torch.minimum(number(x), number(y).to(number(x).dtype)),
            maximum=lambda x, y: torch.maximum(number(x), number(y).to(number(x).dtype)),
            reshape=lambda x, shape: x.reshape(shape),
            sum=lambda x, dim: x.sum(dim),
            max=lambda x, dim: x.amax(dim),
            cdiv=lambda x, y: (x + y - 1) // y,
            static_range=range,
            allocate_shared_memory=allocate,
            warp_specialize=self.warp_specialize,
            NVMMADistributedLayout=lambda **_: Layout(),
            DotOperandLayout=lambda **_: Layout(),
            SliceLayout=lambda dim, parent: Layout(),
            BlockedLayout=lambda *_: Layout(),
            DistributedLinearLayout=lambda **_: Layout(),
            SwizzledSharedLayout=lambda *_: Layout(),
            NVMMASharedLayout=Layout,
            shared_memory_descriptor=Shared,
            tensor=Tensor,
        )

    def hopper(self) -> dict[str, Any]:
        def wait_products(pending: int, deps: list[Any]) -> Any:
            self.scheduler.pause()
            products = current().products
            while len(products) > pending:
                products.pop(0).finish()
            found = [x if x in products else value(x) for x in deps]
            return found[0] if len(found) == 1 else tuple(found)

        def product(
            a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False
        ) -> Product:
            made = Product(a, b, acc, use_acc)
            current().products.append(made)
            return made if is_async else wait_products(0, [made])

        def bulk_load(source: Box, place: list[Any], bar: Shared, tile: Shared) -> None:
            barrier = self.barrier(bar)
            nbytes = tile.at.numel() * tile.dtype.itemsize

            def end() -> None:
                tile.store(source.read(place).reshape(tile.shape))
                barrier.bytes -= nbytes
                barrier.settle()

            self.scheduler.copies.append(end)

        def bulk_store(target: Box, place: list[Any], tile: Shared) -> None:
            read = [False]

            def end() -> None:
                target.write(place, tile.load())
                read[0] = True

            current().stores.append(read)
            self.scheduler.copies.append(end)

        def store_wait(pending: int) -> None:
            stores = current().stores
            old = stores[: len(stores) - pending]
            self.scheduler.pause(lambda: all(read[0] for read in old))

        mbarrier = types.SimpleNamespace(
            MBarrierLayout=Layout,
            init=self.init,
            expect=lambda bar, nbytes: self.barrier(bar).arrive(nbytes=nbytes),
            arrive=self.arrive,
            wait=self.wait,
        )
        return {
            "fence_async_shared": lambda: None,
            "mbarrier": mbarrier,
            "tma": types.SimpleNamespace(
                async_load=bulk_load, async_store=bulk_store, store_wait=store_wait
            ),
            "warpgroup_mma": product,
            "warpgroup_mma_wait": wait_products,
        }

    def barrier(self, bar: Shared) -> Barrier:
        return self.barriers[id(bar.memory), int(bar.at.flatten()[0])]

    def init(self, bar: Shared, count: int) -> None:
        self.barriers[id(bar.memory), int(bar.at.flatten()[0])] = Barrier(count)

    def arrive(self, bar: Shared, count: int, pred: Any = True) -> None:
        self.scheduler.pause()
        if pred:
            self.barrier(bar).arrive(count)

    def wait(self, bar: Shared, phase: Any) -> None:
        barrier, phase = self.barrier(bar), int(phase)
        self.scheduler.pause(lambda: barrier.phase & 1 != phase)

    def warp_specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(parts) - 1
        self.scheduler.run([lambda f=f, args=args: f(*args) for f, args in parts])


@dataclass
class Box:
    """A tensor as bulk copies read and write boxes of it."""

    tensor: Tensor
    shape: list[int]
    strides: list[int]
    box: list[int]
    layout: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def block_type(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(nbytes=torch.Size(self.box).numel() * self.dtype.itemsize)

    def _view(self, place: list[Any]) -> tuple[Tensor, list[int]] | None:
        """What of a box is inside."""
        whole = self.tensor.as_strided(self.shape, self.strides)
        inside = [
            min(n, size - int(at)) for n, size, at in zip(self.box, self.shape, place, strict=True)
        ]
        if min(inside) <= 0:
            return None
        for dim, (at, n) in enumerate(zip(place, inside, strict=True)):
            assert int(at) >= 0, "a coordinate below 0 is an illegal instruction"
            whole = whole.narrow(dim, int(at), n)
        return whole, inside

    def read(self, place: list[Any]) -> Tensor:
        found = torch.zeros(self.box, dtype=self.dtype)
        if view := self._view(place):
            found[tuple(slice(n) for n in view[1])] = view[0]
        return found

    def write(self, place: list[Any], x: Tensor) -> None:
        if view := self._view(place):
            view[0].copy_(x.reshape(self.box)[tuple(slice(n) for n in view[1])])


class OnTensors(ast.NodeTransformer):
    """What PyTorch's tensors do otherwise than Gluon's.

    x = x + y for x += y, which changes a tensor that another name may have; nothing for
    x.type.layout.
    """

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        of_type = isinstance(node.value, ast.Attribute) and node.value.attr == "type"
        return ast.Constant(None) if of_type and node.attr == "layout" else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.Assign:
        assert isinstance(node.target, ast.Name)
        self.generic_visit(node)
        read = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(read, node.op, node.value))


def on_tensors(text: str, path: Path) -> types.CodeType:
    """The code of Gluon functions, to be executed with a `Language`'s names."""
    tree = OnTensors().visit(ast.parse(text))
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


class Pipeline:
    """Stands in for a file's Gluon kernel: runs its programs one after another.

    Args:
        without: a line that is left out, to see that it is missed.
    """

    def __init__(self, path: Path, name: str, seed: int = 0, without: str = "") -> None:
        self.name, self.seed = name, seed
        text = path.read_text()
        if without:
            assert without in text
            text = text.replace(without, "pass")
        start = text.index("\nbulk_load =")  # the imports end
        self.code = on_tensors("\n" * text[:start].count("\n") + text[start:], path)
        self.grid: tuple[int, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Pipeline:
        self.grid = grid
        return self

    def __call__(self, *args: Any, num_warps: int) -> None:
        for number, program in enumerate(itertools.product(*(range(n) for n in self.grid))):
            language = Language(Scheduler(self.seed + number), program, self.grid)
            names = {**language.names(), **language.hopper()}
            names |= {"NamedTuple": NamedTuple, "TensorDescriptor": None}
            exec(self.code, names)
            names[self.name](*(argument(x) for x in args))


def counted(*bounds: Any) -> Iterator[Tensor]:
    """A loop's numbers, as tensors: a kernel may widen them."""
    return map(torch.tensor, range(*bounds))


def argument(x: Any) -> Any:
    """A launch's argument as the kernel sees it."""
    if isinstance(x, Tensor):
        return Pointer(
            x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0), x.storage_offset()
        )
    if hasattr(x, "block_shape"):
        return Box(x.base, list(x.shape), list(x.strides), list(x.block_shape), x.layout)
    return torch.tensor(x) if isinstance(x, int) else x
