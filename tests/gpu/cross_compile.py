"""Compiles the specimens of one module, a JSON line each: `python -m tests.gpu.cross_compile NAME`, or of
NAME:0/4 the first, fifth, ninth ...

A process of its own, since the interpreter, once chosen, stays for a process."""

from __future__ import annotations

import importlib
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

from tests.gpu.machine_code import compile_for


def main(names: list[str]) -> None:
    for named in names:
        name, _, share = named.partition(":")
        first, of = map(int, share.split("/")) if share else (0, 1)
        module = importlib.import_module(f"tests.gpu.specimens.{name}")
        for specimen in module.specimens()[first::of]:
            for architecture in specimen.architectures:
                code = compile_for(specimen, architecture)
                loop = code.hot_loop("HGMMA")
                facts = {
                    "name": specimen.name,
                    "architecture": architecture,
                    "hgmma": code.count("HGMMA"),
                    "spills": code.spills,
                    "registers": code.registers,
                    "shared": code.shared,
                    "instructions": len(code.instructions),
                    "lane_instructions": code.lane_instructions("HGMMA"),
                    "per_weight": code.lane_instructions("HGMMA") / specimen.weights
                    if specimen.weights
                    else 0,
                    "matrix": specimen.matrix,
                    "overlaps": specimen.overlaps,
                    "waits": code.count("ACQBULK"),
                    "lets_go": code.count("PREEXIT"),
                    "too_early": code.accesses_before("ACQBULK"),
                    "budget": specimen.per_weight,
                    "mix": dict(loop.mix.most_common(16)) if loop else {},
                }
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
