"""Triton's interpreter, without what it looks for again and again.

It replaces the functions of Triton's language before each launch, and before each call of a function within a kernel,
and finds them by looking through all members of the modules. Their names do not change: this takes a third of the time
off small kernels, and replaces the same functions. Before Triton 3.9 it converts arrays of one element to integers as
NumPy no longer does.
"""

from functools import cache
from typing import Any


@cache
def quicken() -> None:
    """For the rest of the process. An interpreter that is built otherwise is left as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_attr") or not hasattr(interpreter, "_patch_builtin"):
        return

    @cache
    def builtins(package: Any) -> tuple[str, ...]:
        """As the interpreter finds them; those that are replaced at the moment are none, so it has to be at rest."""
        return tuple(name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None)))

    packages = [tl, tl.core, tl.tensor, tl.math]
    if hasattr(tl.core, "tensor_descriptor_base"):  # since Triton 3.3
        packages.append(tl.core.tensor_descriptor_base)
    for package in packages:
        builtins(package)

    def patch_builtin(package: Any, builder: Any, *scope: Any) -> None:
        names = builtins(package)
        if names and not tl.core.is_builtin(getattr(package, names[0])):
            return  # all are replaced already, by the kernel that calls this function
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)

    interpreter._patch_builtin = patch_builtin
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)  # which remembers what there was
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
