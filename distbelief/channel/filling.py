# SPDX-License-Identifier: Apache-2.0
"""The answer of a method that fills a large tensor: what is filled travels while the method goes on.

Without this a shard of 4.2e7 parameters would send for 40 ms and apply a push for 24 ms, one after the other, while a
core idles.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Filling(Generic[T]):
    """The answer of an exported method that fills its one `Out` tensor, of shape (n,), from the front.

    The method goes on, alone, until it is through: nothing else is asked of its role before. Where memory is shared,
    and for the first piece, it goes on at once; over TCP a thread does the rest while the role's own thread sends.
    What it raises once something has travelled ends its role: nobody can be told any more.
    """

    def __init__(
        self, value: T, pieces: Iterator[int], copy: Callable[[int, int], object] = lambda start, stop: None
    ) -> None:
        """`pieces` does the work; after each piece it says how many numbers are as they shall be.

        Where they are not in the tensor itself, `copy` brings those from `start` to `stop` there: as soon as they are
        made where they travel, otherwise all of them at the end, which takes less time.
        """
        self.value, self.filled = value, 0
        """The answer, and how many numbers of the tensor are filled."""
        self._pieces, self._copy = pieces, copy
        self._beside: threading.Thread | None = None
        self._news = threading.Condition()
        self._error: BaseException | None = None
        self.over = False
        """Whether the method is through."""

    def advance(self) -> bool:
        """Do one more piece; whether there was one."""
        made = next(self._pieces, None)
        self._fill(self.filled if made is None else made, over=made is None)
        return not self.over

    def _fill(self, made: int, *, over: bool) -> None:
        if made > self.filled:
            self._copy(self.filled, made)
        with self._news:
            self.filled, self.over = max(self.filled, made), over
            self._news.notify_all()

    def go_on_beside(self) -> None:
        """Do the rest in a thread."""
        self._beside = threading.Thread(target=self._go_on, name="distbelief-filling", daemon=True)
        self._beside.start()

    def _go_on(self) -> None:
        try:
            while self.advance():
                continue
        except BaseException as error:
            with self._news:
                self._error, self.over = error, True
                self._news.notify_all()

    def fill(self, numbers: int) -> None:
        """Return when so many are filled. Raises RuntimeError when the method raised something."""
        with self._news:
            self._news.wait_for(lambda: self.filled >= numbers or self.over)
        self._check()
        if self.filled < numbers:
            raise RuntimeError(f"a method filled {self.filled} numbers of its tensor and has {numbers} to fill")

    def finish(self) -> None:
        """Return when the method is through. Raises what it raised, from a thread as the cause of a RuntimeError."""
        if self._beside is None:
            self._fill(max(self._pieces, default=0), over=True)
        else:
            self._beside.join()
        self._check()

    def _check(self) -> None:
        # Not the error itself: one of the channel's would end a connection, not the role that is half through.
        if self._error is not None:
            raise RuntimeError("a method broke off when part of its answer had travelled") from self._error
