"""Run a script as `__main__` in this process, whose Ray and workers have started already."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import sys
import types
import warnings
from pathlib import Path

import pytest
import ray

__all__ = ["run_as_main"]


def run_as_main(script: Path, *arguments: str) -> str:
    """Run a script in the Ray session of all tests, and return what it prints.

    Workers cannot import what the script defines, as in a run of its own. `ray.init()` joins the session, and
    `ray.shutdown()` does not end it.
    """
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "__main__", module)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        patch.setattr(ray, "init", functools.partial(ray.init, ignore_reinit_error=True))
        patch.setattr(ray, "shutdown", lambda: None)
        try:
            exec(compile(script.read_text(), str(script), "exec"), module.__dict__)
        finally:
            module.__dict__.clear()
            gc.collect()
    return printed.getvalue()
