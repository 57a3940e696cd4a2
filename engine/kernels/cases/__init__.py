"""Launches that `engine/kernels/bench.py` measures. A function for each kernel takes a device and sizes, and makes a `Launch`.

    attention.py   attention over K/V and over latents, and the small kernels around it
    dense.py       products, norms, rotary embedding
    experts.py     routing and experts, launched as `layers.moe_cuda` does it
    step.py        gathering a step's inputs, and choosing its tokens

`Launch.num_bytes` counts each input and output of a launch once, and nothing that passes between the kernels of a chain.
"""
