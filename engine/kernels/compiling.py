"""Entry points as object code, compiled by numba with all that they call.

Numba makes machine code of each function, and optimises it anew within every function that calls it: with a hundred small
ones in one another that is three quarters of the time, and only the entry points' is kept. Here they are put together first,
and optimised once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import int64, njit
from numba.core.codegen import JITCodeLibrary
from numba.core.registry import cpu_target

# As arguments: of a number that is written out numba makes a version of the called function of its own, and of all that this
# calls with it.
NONE, ONE = np.int64(0), np.int64(1)

# For what other compiled functions call; Python cannot.
compiled: Any = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class _Linked(JITCodeLibrary):
    """A function and what it calls, as LLVM reads it; Python cannot call it."""

    def finalize(self) -> None:
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def object_code(self) -> bytes:
        """Optimised for this CPU."""
        self._ensure_finalized()
        self._optimize_final_module()
        self._final_module.verify()
        code: bytes = self.codegen._tm.emit_object(self._final_module)
        return code


def compile_entry_points(*functions: Callable[..., None]) -> dict[str, tuple[str, bytes]]:
    """Compile functions of integers for this CPU: by name, the symbol and the object file of each. Nothing of Python is
    called in there, so that the code loads without numba."""
    found = {}
    with _linked_only():
        for function in functions:
            signature = (int64,) * function.__code__.co_argcount
            entry = compiled(function)
            entry.compile(signature)
            result = entry.overloads[signature]
            found[function.__name__] = result.fndesc.llvm_func_name, result.library.object_code()
    return found


@contextmanager
def _linked_only() -> Iterator[None]:
    """Have numba make ``_Linked`` of what it compiles. It keeps that for as long as the process lives."""
    codegen = cpu_target.target_context.codegen()
    codegen._library_class = _Linked
    codegen.set_env = lambda name, env: None  # where Python's objects would be found
    try:
        yield
    finally:
        del codegen._library_class, codegen.set_env
