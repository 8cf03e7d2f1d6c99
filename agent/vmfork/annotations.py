# SPDX-License-Identifier: Apache-2.0
"""The words of annotations that have to exist while a program runs, without the typing module.

That would be 0.7 MiB of an idle detector, and milliseconds of every start, for what nobody but a type checker looks at.
A type checker takes the real ones from here. At run time a protocol is a class like any other, and what a generic class
is of is forgotten.
"""

from __future__ import annotations

# Type checkers take this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any as Any
    from typing import Generic as Generic
    from typing import NoReturn as NoReturn
    from typing import ParamSpec as ParamSpec
    from typing import Protocol as Protocol
    from typing import Self as Self
    from typing import TextIO as TextIO
    from typing import TypeVar as TypeVar
else:
    Any = NoReturn = Self = TextIO = None

    class Protocol:
        """What other classes look like, without being their base."""

        __slots__ = ()

    class Generic:
        """A class of something: `Setting[float]` is `Setting`."""

        __slots__ = ()

        def __class_getitem__(cls, parameter: object) -> type:
            return cls

    def TypeVar(name: str, **constraints: object) -> None:
        """A name for a type."""

    ParamSpec = TypeVar
