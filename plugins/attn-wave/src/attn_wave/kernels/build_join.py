"""How a kernel of the second phase is handed to Wave: with the options of the first, which decide what comes out."""

import os
from typing import Any

# Wave's own cache gives what it compiled before without the files that are wanted here.
os.environ["WAVE_CACHE_ON"] = "0"

from wave_lang.kernel.wave.compile import WaveCompileOptions, wave_compile
from wave_lang.kernel.wave.scheduling.schedule import SchedulingType
from wave_lang.kernel.wave.utils.general_utils import get_default_scheduling_params

from attn_wave.join_variant import JoinVariant
from attn_wave.kernels.join import join_kernel


def build_join(variant: JoinVariant, arch: str, folder: str) -> Any:
    """Compiles into ``folder``: a .hsaco, and a .rocmasm beside it. Gives Wave's launch information."""
    kernel, substitutions, symbols = join_kernel(variant)
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
