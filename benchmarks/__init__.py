"""What the library costs and what it gains; `python -m benchmarks` lists it."""

import pathlib

ROOMS = ('costs', 'trained')

# `python -m benchmarks.NAME`, whichever of them NAME lies in.
__path__ += [str(pathlib.Path(__file__).parent / room) for room in ROOMS]
