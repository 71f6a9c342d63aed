"""How a kernel is handed to Wave: all that decides what comes out, beside the kernel, its variant and Wave itself."""

import os
from typing import Any

# Wave's own cache gives what it compiled before without the files that are wanted here.
os.environ["WAVE_CACHE_ON"] = "0"

from wave_lang.kernel.wave.compile import WaveCompileOptions, wave_compile
from wave_lang.kernel.wave.scheduling.schedule import SchedulingType
from wave_lang.kernel.wave.utils.general_utils import get_default_scheduling_params

from attn_wave.kernels.attend import attend_kernel
from attn_wave.variant import Variant


def build(variant: Variant, arch: str, folder: str) -> Any:
    """Compiles into ``folder``: a .hsaco, and a .rocmasm beside it. Gives Wave's launch information."""
    # Wave changes a kernel object as it compiles it: always a fresh one
    kernel, substitutions, symbols = attend_kernel(variant)
    options = WaveCompileOptions(
        subs=substitutions | get_default_scheduling_params(),
        canonicalize=True,
        schedule=SchedulingType.NONE,
        dynamic_symbols=symbols,
        target=arch,
        device="hip",
        backend="llvm",
        wave_runtime=False,
        dump_binaries=folder,
        dump_intermediates=folder,
    )
    wave_compile(options, kernel)
    return options.kernel_launch_info
