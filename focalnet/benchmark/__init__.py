"""The code that `focalnet bench` and the scripts of bench/ share: runtimes to compare, and how they are timed.

`runtimes` defines the runtimes of a FocalNet and `architectures` other networks. `turns` times them in turns, each in
its own process (`worker`). `timing` compares calls within one process, and `operators` uses it for the operator.
`counters` counts operators and bytes. `rows` stores results and `tables` prints them. `peaks`, `processor` and
`environment` describe the machine, `floors` computes lower bounds, and `torchvision_stub` lets timm be imported
without torchvision.
"""
