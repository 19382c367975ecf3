# SPDX-License-Identifier: Apache-2.0
"""A tape of what a program does to tensors, from which any memory it filled can be made again.

While a Tape is entered the program computes as ever: it draws its random numbers in its own order and may look at any
value. Each operation that makes or changes memory is noted, with the state that the random numbers had. So memory can
be given back while the program still runs (a storage of no bytes is left), and made again, when it is used or after the
end, by going through the few operations that led to its content and no others.
"""

import contextlib
import gc
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from distbelief.errors import ConfigurationError

_OVERWRITING = frozenset(
    ["copy_", "zero_", "fill_", "uniform_", "normal_", "random_", "exponential_", "log_normal_", "cauchy_"]
)
"""Operations that leave nothing of what their first operand held. One that is missing here costs time, nothing else."""

_UNSEEN = frozenset(
    [Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__deepcopy__,
     Tensor.__reduce_ex__, Tensor.__dlpack__, Tensor.share_memory_]
)  # fmt: skip
"""What reads a tensor's memory, or gives it away, without an operation."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the program: how it looks at one of the numbered memories."""

    memory: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool
    negative: bool

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor over this storage."""
        plain = torch.empty(0, dtype=self.dtype, device=storage.device)
        plain.set_(storage, self.offset, self.shape, self.stride)
        plain = plain.conj() if self.conjugate else plain
        return torch._neg_view(plain) if self.negative else plain


@dataclass(frozen=True, slots=True)
class _Operation:
    """A line of the tape: a function, its arguments with a View for each tensor, and what else its result rests on."""

    function: Callable[..., Any]
    arguments: tuple[Any, Mapping[str, Any]]
    reads: frozenset[int]
    """The memories whose content it uses."""
    writes: frozenset[int]
    """The memories that it changes or makes."""
    made: tuple[int | None, ...]
    """For each tensor that it returns the memory that came into being with it."""
    random_state: Tensor | None
    default_dtype: torch.dtype

    def run(self, operand: Callable[[View], Tensor]) -> Mapping[int, torch.UntypedStorage]:
        """The memories made, as they were made then. Random numbers of the process stay where they are."""
        args, kwargs = _each(self.arguments, View, operand)
        default, outer = torch.get_default_dtype(), torch.get_rng_state()
        try:
            torch.set_default_dtype(self.default_dtype)
            if self.random_state is not None:
                torch.set_rng_state(self.random_state)
            with torch.no_grad():
                returned = every(self.function(*args, **kwargs), Tensor)
        finally:
            torch.set_default_dtype(default)
            torch.set_rng_state(outer)
        pairs = zip(self.made, returned, strict=True)
        return {memory: tensor.untyped_storage() for memory, tensor in pairs if memory is not None}


@final
class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what happens while it is entered; fills at most `at_work_bytes`, but for the operands of one operation."""

    def __init__(self, at_work_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at_work_bytes = at_work_bytes
        self._operations: list[_Operation] = []
        self._writers: list[list[int]] = []
        """For each memory the operations that wrote to it, in order; the first one made it."""
        self._sizes: list[int] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._numbers: dict[int, int] = {}
        """The memory of a storage by `id`, which holds as long as the object is among the storages."""
        self._full: dict[int, None] = {}
        """The memories that can be given back, the one used longest ago first."""
        self._empty: set[int] = set()
        """The memories that have been given back."""
        self._shared: set[int] = set()
        """The memories that may change without an operation: their content is noted whenever one uses them."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of the program and note it."""
        kwargs = kwargs or {}
        arguments = _each((tuple(args), kwargs), Tensor, self.view)
        used = {view.memory for view in every(arguments, View)}
        if func.is_view or torch.Tag.inplace_view in func.tags:
            with self._room(used):
                return func(*args, **kwargs)
        overwritten = self._overwritten(func, args, arguments)
        for memory in used - overwritten:
            self._fill(memory)
        for memory in overwritten & self._empty:
            self._storages[memory].resize_(self._sizes[memory])
            self._empty.discard(memory)
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator")
            state = (torch.default_generator if generator is None else generator).get_state()
            if generator is not None:
                arguments[1]["generator"] = None
        default = torch.get_default_dtype()
        returned = func(*args, **kwargs)
        made = tuple(self._new(tensor) for tensor in every(returned, Tensor))
        writes = {memory for memory in made if memory is not None} | _written(func, arguments)
        if writes:
            reads = frozenset(used - overwritten)
            self._note(_Operation(func, arguments, reads, frozenset(writes), made, state, default))
        self._give_back(used | writes)
        return returned

    # the memories

    def view(self, tensor: Tensor) -> View:
        """The tensor as the tape knows it. What no operation made is noted as it is. Raises ConfigurationError."""
        if is_lazy(tensor):
            raise ConfigurationError(
                "the model computes with lazy layers while it is built, to find their shapes, which cannot be followed",
                hint="give the shapes, such as nn.Linear(16, 32) for nn.LazyLinear(32), or use partitions=1",
            )
        storage = tensor.untyped_storage()
        memory = self._numbers.get(id(storage))
        if memory is None:
            memory = self._add(storage)
        if not self._writers[memory] or memory in self._shared:
            bytes_ = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            arguments = (bytes_.clone(),), dict[str, Any]()
            clone, now = torch.ops.aten.clone.default, torch.get_default_dtype()
            self._note(_Operation(clone, arguments, frozenset(), frozenset([memory]), (memory,), None, now))
        place = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
        return View(memory, tensor.dtype, *place, tensor.is_conj(), tensor.is_neg())

    def share(self, tensor: Tensor) -> None:
        """From now on somebody may read and write this tensor's memory without an operation."""
        memory = self.view(tensor).memory
        self._fill(memory)
        self._shared.add(memory)
        self._full.pop(memory, None)

    def _add(self, storage: torch.UntypedStorage) -> int:
        memory = len(self._sizes)
        self._numbers[id(storage)] = memory
        self._storages[memory] = storage
        self._sizes.append(storage.nbytes())
        self._writers.append([])
        if storage.device.type != "cpu" or not storage.resizable():
            self._shared.add(memory)
        return memory

    def _new(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()
        return None if id(storage) in self._numbers else self._add(storage)

    def _note(self, operation: _Operation) -> None:
        for memory in operation.writes:
            self._writers[memory].append(len(self._operations))
        self._operations.append(operation)

    def _overwritten(self, func: Any, args: Sequence[Any], arguments: Any) -> set[int]:
        """The memory of the first operand, when all of it is written to and none of it read; else none."""
        if func.overloadpacket.__name__ not in _OVERWRITING or not args[0].is_contiguous():
            return set()
        first, *others = every(arguments, View)
        whole = args[0].nbytes == self._sizes[first.memory]
        return {first.memory} if whole and all(view.memory != first.memory for view in others) else set()

    # giving memory back and making it again

    @contextlib.contextmanager
    def _room(self, memories: set[int]) -> Iterator[None]:
        """Room without content: making views checks that the memory is large enough."""
        for memory in memories & self._empty:
            self._storages[memory].resize_(self._sizes[memory])
        yield
        for memory in memories:
            self._sizes[memory] = self._storages[memory].nbytes()
        for memory in memories & self._empty:
            self._storages[memory].resize_(0)

    def _fill(self, memory: int) -> None:
        if memory in self._empty:
            content = self.content(memory)
            self._storages[memory].resize_(content.nbytes())
            self._storages[memory].copy_(content)
            self._empty.discard(memory)

    def _give_back(self, used: set[int]) -> None:
        for memory in used - self._shared:
            self._full.pop(memory, None)
            self._full[memory] = None
        excess = sum(self._sizes[memory] for memory in self._full) - self._at_work_bytes
        for memory in list(self._full):
            # Small memories stay: together they are little, and making them again takes as long as for large ones.
            if excess > 0 and memory not in used and self._sizes[memory] * 1024 >= self._at_work_bytes:
                self._storages[memory].resize_(0)
                self._empty.add(memory)
                del self._full[memory]
                excess -= self._sizes[memory]

    def content(self, memory: int) -> torch.UntypedStorage:
        """What the memory holds after the last operation on the tape; new, so the caller's own."""
        needed = self._needed(memory)
        last_use = {each: number for number in needed for each in self._touched(number)}
        made: dict[int, torch.UntypedStorage] = {}
        for number in needed:
            made.update(self._operations[number].run(partial(self._operand, made, number)))
            for each in self._touched(number) - {memory}:
                if last_use[each] == number:
                    made.pop(each, None)
        return made[memory]

    def _needed(self, memory: int) -> list[int]:
        """The operations that lead to what the memory holds, in order."""
        needed, open_ = set[int](), [(memory, len(self._operations))]
        while open_:
            each, before = open_.pop()
            if not self._unchanged(each, before):
                writer = self._writers[each][bisect_left(self._writers[each], before) - 1]
                if writer not in needed:
                    needed.add(writer)
                    open_ += [(read, writer) for read in self._operations[writer].reads]
        return sorted(needed)

    def _touched(self, number: int) -> frozenset[int]:
        return self._operations[number].reads | self._operations[number].writes

    def _unchanged(self, memory: int, since: int) -> bool:
        """Whether the storage itself still holds what it held before operation `since`."""
        here = memory in self._storages and memory not in self._empty and memory not in self._shared
        return here and self._writers[memory][-1] < since

    def _operand(self, made: dict[int, torch.UntypedStorage], number: int, view: View) -> Tensor:
        if self._unchanged(view.memory, number):
            return view.of(self._storages[view.memory])
        if view.memory not in made:
            made[view.memory] = torch.UntypedStorage(self._sizes[view.memory])  # type: ignore[no-untyped-call]
        return view.of(made[view.memory])

    def close(self) -> int:
        """Let go of all storages. Returns how many bytes that were given back somebody else still means to use."""
        empty = [(self._sizes[memory], weakref.ref(self._storages[memory])) for memory in self._empty]
        self._storages.clear()
        self._numbers.clear()
        if any(storage() is not None for _, storage in empty):
            gc.collect()  # takes a while, and is mostly not needed
        return sum(size for size, storage in empty if storage() is not None)


@final
class Sharing(TorchFunctionMode):
    """Tells the tape, while both are entered, of memory that is read or given away without an operation."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, on memory that has its content."""
        if func in _UNSEEN:
            with _disable_current_modes():
                self._tape.share(args[0])
        return func(*args, **kwargs or {})


def _each(structure: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The nested tuples, lists and dicts again, with everything of this kind changed."""
    if isinstance(structure, kind):
        return change(structure)
    if isinstance(structure, tuple | list):
        return type(structure)(_each(part, kind, change) for part in structure)
    if isinstance(structure, dict):
        return {name: _each(part, kind, change) for name, part in structure.items()}
    return structure


def every(structure: Any, kind: type) -> list[Any]:
    """Everything of this kind in nested tuples, lists and dicts."""
    found: list[Any] = []
    _each(structure, kind, found.append)
    return found


def _written(func: Any, arguments: tuple[Any, Mapping[str, Any]]) -> set[int]:
    """The memories of the operands that the function is declared to change."""
    declared = func._schema.arguments
    given = dict(zip((argument.name for argument in declared), arguments[0], strict=False)) | dict(arguments[1])
    changed = [given.get(each.name) for each in declared if each.alias_info is not None and each.alias_info.is_write]
    return {view.memory for view in every(changed, View)}
