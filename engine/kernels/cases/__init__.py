"""Launches for `bench`: a function for each kernel, from a device and sizes to a `Launch`.

    attention.py   of K/V and of latents
    dense.py       products, norms, rotary embedding
    experts.py     routing and experts, as `layers.moe_cuda` launches them
    step.py        both ends of a step

What a launch must read and write is counted once: its inputs and outputs, and not what passes between its kernels.
"""
