"""A machine that runs PTX on a CPU: what the compiler made of a kernel, with every address checked."""
