# SPDX-License-Identifier: Apache-2.0
"""Every exception distbelief raises on purpose.

DistbeliefError
├── ConfigurationError      the user's input, refused before anything starts
├── UserCodeError           a function of the user raised; the message begins with its traceback
├── TrainingFailed          the job stopped without reaching its end
├── CheckpointError         a checkpoint cannot be read, or is of another model
│   ├── OtherFormat         another version of distbelief wrote it, in a way that this one does not read
│   └── OutOfReach          its store could not be asked, or its file not be looked at
└── ChannelError            a call did not come back with an answer
    ├── PeerLost            the other side is gone; the call may or may not have run
    ├── DeadlineExceeded    no answer in time; the call may or may not have run
    ├── ProtocolError       bytes that are no message of ours
    ├── AuthenticationError the other side does not know the job's key
    ├── Fenced              the caller is an old incarnation and has been replaced
    ├── NotReady            the role has just been started again and has no parameters yet
    │   └── Behind          it has those of a checkpoint, and would take newer ones
    └── RemoteError         the method raised on the other side
"""

from collections.abc import Callable
from functools import partial


class DistbeliefError(Exception):
    """Base of all errors raised on purpose."""


class ConfigurationError(DistbeliefError):
    """What the user asked for cannot work; nothing has been started."""

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(f"{problem}\nhint: {hint}")
        self.problem, self.hint = problem, hint

    def __reduce__(self) -> tuple[Callable[..., "ConfigurationError"], tuple[str]]:
        return partial(ConfigurationError, hint=self.hint), (self.problem,)


class UserCodeError(DistbeliefError):
    """A model, loss, dataset or metric function of the user raised inside a role."""


class TrainingFailed(DistbeliefError):
    """The job stopped before its end; the message says why and what was kept."""


class CheckpointError(DistbeliefError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class OtherFormat(CheckpointError):
    """A checkpoint is whole, and another version of distbelief wrote it in a way that this one does not read."""


class OutOfReach(CheckpointError):
    """A checkpoint is in a store that cannot be asked now, or in a file that this process may not read."""

    def __init__(self, place: object, reason: object) -> None:
        super().__init__(
            f"{place} is out of reach: {reason}\nhint: what is there is as it was; try again later, or as "
            "somebody who may read it"
        )


class ChannelError(DistbeliefError):
    """A call to another role did not come back with an answer."""


class PeerLost(ChannelError):
    """The connection broke; the call may or may not have run."""


class DeadlineExceeded(ChannelError):
    """No answer within the deadline; the call may or may not have run."""


class ProtocolError(ChannelError):
    """The bytes received are not a message of this protocol."""


class AuthenticationError(ChannelError):
    """The peer did not prove knowledge of the job's key."""


class Fenced(ChannelError):
    """The caller's incarnation has been replaced; it must end itself."""


class NotReady(ChannelError):
    """The role was started again and waits for its parameters; ask again."""


class Behind(NotReady):
    """A shard has come back from a checkpoint; who has newer parameters may offer them before it goes on."""


class RemoteError(ChannelError):
    """The method raised on the other side; the message carries its traceback."""
