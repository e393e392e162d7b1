"""Runs a share of the tests where one is asked for (`python -m tests.gpu`), and makes Triton's interpreter,
where that is what runs the kernels, twice as fast.

It patches `triton.language` when a kernel starts, and again whenever a kernel calls another function, which
finds everything patched already and costs a millisecond. Here it is done once for each set of modules a
launch. What is patched, and when it is undone, stays the same. Written for Triton 3.9; where another version
has other parts, it is left as it is.
"""

from __future__ import annotations

import os

import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

SHARE = "TRAMONTANE_TEST_SHARE"  # "1/4": of the tests that are collected, the second of four shares
_PARTS = ("_patch_lang", "_LangPatchScope", "GridExecutor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if share := os.environ.get(SHARE):
        which, of = map(int, share.split("/"))
        items[:] = items[which::of]


def patch_once_a_launch() -> None:
    patch, start = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()  # in this launch; launches come one at a time
    modules: dict[object, frozenset[str]] = {}

    def patch_if_new(function):
        if function not in modules:
            seen = function.__globals__.values()
            modules[function] = frozenset(m.__name__ for m in seen if m is tl or m is tl.core)
        if modules[function] in patched:
            return interpreter._LangPatchScope()  # nothing to undo
        patched.add(modules[function])
        return patch(function)

    def run(executor, *arguments, **options):
        patched.clear()
        try:
            return start(executor, *arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_if_new
    interpreter.GridExecutor.__call__ = run


if triton.knobs.runtime.interpret and all(hasattr(interpreter, part) for part in _PARTS):
    patch_once_a_launch()
