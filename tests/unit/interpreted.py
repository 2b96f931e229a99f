"""What kernels need to run in Triton's interpreter under the NumPy that is installed."""

from typing import Any

from triton.runtime import interpreter


def let_sizes_be_loop_bounds() -> None:
    """The interpreter takes int() of an array of one element, which NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
