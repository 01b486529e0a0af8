"""What `focalnet bench` and the scripts of bench/ share: runtimes to compare, and how they are timed.

`runtimes` says what can run a model, `architectures` what other networks there are, `turns` lets them take turns in
processes of their own (`worker` is such a process), `timing` compares calls within one process, `operators` does so
for the operator, `counters` counts what needs no clock, `tables` shows rows, `peaks` and `environment` have the
machine's rates and facts, `torchvision_stub` lets timm be imported.
"""
