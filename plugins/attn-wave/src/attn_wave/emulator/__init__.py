"""Runs gfx942 machine code on a CPU, one lane-wide numpy operation an instruction: what it models stands in each room.

In order and functional: no timing, no hazards (``s_waitcnt`` and ``s_nop`` do nothing), transcendentals of numpy rather
than the chip's tables, matrix products summed by numpy, denormals kept, divisions correctly rounded. What is checked:
every address against the buffers of the launch, every LDS address against the LDS that the code object asks for, and
registers and LDS start as garbage that is NaN in every float type.
"""
