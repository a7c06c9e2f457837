"""The kernels for CUDA, in Triton, which comes with torch's CUDA builds; imported where they are used.

With ``TRITON_INTERPRET=1`` they run on the CPU, slowly, which is how the tests compare them with their references.
"""
