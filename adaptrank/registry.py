"""Registries of classes by name: everything that a folder defines, and every user's subclass."""

import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

from adaptrank._errors import UserTypeError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Read-only mapping of class names to all concrete subclasses that are defined by now."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._classes: dict[str, type[T]] = {}
        self._unlisted: set[str] = set()

    def add(self, cls: type[T], listed: bool = True) -> None:
        """Add a class; the base class calls this for every subclass.

        Args:
            cls: the class.
            listed: whether it is one of those to choose from. One that is not is still found by its
                name.
        Raises:
            TypeError: if another class has that name already.
        """
        known = self._classes.get(cls.__name__)
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserTypeError(
                f"Two {self._kind}s are called {cls.__name__!r}: "
                f"{known.__module__}.{known.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}. The class name is the method's name "
                f"everywhere; rename one."
            )
        self._classes[cls.__name__] = cls
        if listed:
            self._unlisted.discard(cls.__name__)
        else:
            self._unlisted.add(cls.__name__)

    def import_folder(self, package: str, path: Iterable[str]) -> None:
        """Import every file of a package, so that the folder is the only list."""
        for module in pkgutil.iter_modules(path):
            import_module(f"{package}.{module.name}")

    def __getitem__(self, name: str) -> type[T]:
        cls = self._classes[name]
        if inspect.isabstract(cls):
            raise KeyError(name)
        return cls

    def __iter__(self) -> Iterator[str]:
        listed = self._classes.keys() - self._unlisted
        return iter(sorted(name for name in listed if not inspect.isabstract(self._classes[name])))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{self._kind}s: {', '.join(self)}"
