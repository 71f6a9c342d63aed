"""A card behind Wave's real runtime: what its libamdhip64 is asked for is done by the emulator."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from attn_wave.emulator.code_object import CodeObject
from attn_wave.emulator.launch import Argument, Pointer, launch
from torch import Tensor

_SIZES = ctypes.c_uint32 * 6


class Card:
    """Modules by handle, and every launch: its stream and the bytes of its arguments."""

    def __init__(self) -> None:
        self.modules: list[CodeObject] = []
        self.launches: list[tuple[int, bytes]] = []
        self.tensors: dict[int, Pointer] = {}
        self.errors: list[BaseException] = []
        library = ctypes.CDLL("libamdhip64.so")
        load = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(self._load)
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ssize_t, ctypes.c_char_p)(self._function)
        run = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_ssize_t, ctypes.POINTER(_SIZES), ctypes.c_uint32, ctypes.c_ssize_t, ctypes.c_void_p,
            ctypes.c_size_t,
        )(self._launch)  # fmt: skip
        self._kept = load, function, run
        library.register_card(*self._kept)

    def knows(self, tensors: dict[str, Tensor], written: tuple[str, ...]) -> None:
        """The memory of the card: a launch that names an address of none of these fails."""
        self.tensors |= {t.data_ptr(): Pointer(t, name, name in written) for name, t in tensors.items()}

    def _load(self, path: bytes) -> int:
        self.modules.append(CodeObject.parse(Path(path.decode()).read_bytes()))
        return len(self.modules)

    def _function(self, module: int, name: bytes) -> int:
        return module if self.modules[module - 1].name == name.decode() else 0

    def _launch(self, function: int, sizes: object, shared: int, stream: int, arguments: int, size: int) -> int:
        try:
            code = self.modules[function - 1]
            raw = ctypes.string_at(arguments, size)
            self.launches.append((stream, raw))
            if size != code.argument_size or shared:
                raise AssertionError(f"{size} bytes of arguments and {shared} of LDS for {code}")
            words = struct.unpack(f"<{size // 8}q", raw)
            given: list[Argument] = [self.tensors.get(word, word) for word in words]
            grid = list(sizes.contents)  # type: ignore[attr-defined]
            launch(code, (grid[0], grid[1], grid[2]), (grid[3], grid[4], grid[5]), given)
        except BaseException as error:
            self.errors.append(error)
            return 1
        return 0
