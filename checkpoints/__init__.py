"""Conversion between published checkpoints and this model's, tensor by tensor.

`layouts` says how tensors are called and configs are written elsewhere, `plan` matches a source against a target,
`files` reads and writes safetensors shard by shard, `convert` puts them together.
"""
