"""Prints the divisors in the tests of src/gguf/config: `rope_freqs.weight` as the converter of llama.cpp
computes it for a Llama 3 model.

    pip install torch==2.15.0
    python llama3_divisors.py [THETA HEAD_DIM FACTOR]
"""

import math
import sys

import torch

theta, head_dim, factor = map(float, sys.argv[1:] or ["500000", "64", "32"])
low, high, original = 1.0, 4.0, 8192
divisors = []
for frequency in theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim):
    wavelength = 2 * math.pi / float(frequency)
    smooth = (original / wavelength - low) / (high - low)
    if wavelength < original / high:
        divisors.append(1.0)
    elif wavelength > original / low:
        divisors.append(factor)
    else:
        divisors.append(1 / ((1 - smooth) / factor + smooth))
print([float(f"{divisor:.7g}") for divisor in divisors])
