"""What `focalnet bench` and the scripts of bench/ share: runtimes to compare, and how they are timed.

`runtimes` says what can run a model, `turns` lets them take turns in processes of their own (`worker` is such a
process), `timing` compares calls within one process, `operators` does so for the operator, `tables` shows rows,
`environment` has the facts of the machine.
"""
