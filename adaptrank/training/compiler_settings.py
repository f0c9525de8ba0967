"""Settings of PyTorch's compiler that hold only while a block is compiled.

To change a setting around every call of a block would cost as much as a small block. So the
settings change when the compiler says that it starts, and change back when it says that it ends.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

DYNAMO: dict[str, Any] = {
    # Otherwise every rank is a constant of the graph.
    "force_parameter_static_shapes": False,
    # Allocators register hooks on layers in the middle of a run, and a graph has to notice.
    "skip_nnmodule_hook_guards": False,
}
"""Settings of `torch._dynamo.config`."""
# "backed_size_oblivious" would let ranks of one and of many share a graph. With it, torch 2.13's
# inductor takes the strides of tensors as constants, without a guard.
SHAPES: dict[str, Any] = {
    # Otherwise two ranks that are equal once must stay equal.
    "use_duck_shape": False,
}
"""Settings of `torch.fx.experimental._config`."""


class BlockCompiler:
    """Changes the compiler's settings while it compiles a block."""

    def __init__(self) -> None:
        self._preparations: list[Callable[[], None]] = []
        """One for each block that is being called."""
        self._changes = ExitStack()
        """Settings to restore when the compiler ends."""

    @contextmanager
    def calling(self, prepare: Callable[[], None]) -> Iterator[None]:
        """Within the context, compile with the settings of a block.

        Args:
            prepare: called before the block is compiled.
        """
        self._register()
        self._preparations.append(prepare)
        try:
            yield
        finally:
            self._preparations.pop()

    def _register(self) -> None:
        """Ask the compiler to say when it starts and ends, unless it does."""
        from torch._dynamo.callback import callback_handler

        # `torch._dynamo.reset()` forgets who has asked.
        if self._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, *compilation: Any) -> None:
        if not self._preparations:
            return
        from torch._dynamo import config
        from torch.fx.experimental import _config

        shapes: Any = _config
        self._preparations[-1]()
        self._changes.enter_context(config.patch(**DYNAMO))
        self._changes.enter_context(shapes.patch(**SHAPES))

    def _end(self, *compilation: Any) -> None:
        self._changes.close()


BLOCK_COMPILER = BlockCompiler()
"""The compiler of this process."""
